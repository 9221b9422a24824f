"""Sealed folders: every accident to every kind of file is seen; what was not finished does not count."""

import json
import random
import shutil

import pytest

from aurora_train.checkpoint import durable

FILES = {"manifest.ocdbt": 300, "state/d/abc": 5000, "state/_METADATA": 120, "empty": 0, "deep/er/one": 1}


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "7"
    draw = random.Random(3)
    for name, size in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(size))
    durable.seal(folder, {"step": 7, "data_step": 9})
    return folder


def test_a_sealed_folder_is_intact_and_says_what_it_holds(sealed):
    assert durable.is_sealed(sealed) and durable.faults(sealed) == []
    manifest = json.loads((sealed / durable.MANIFEST).read_text())
    assert set(manifest["files"]) == set(FILES) and manifest["step"] == 7 and manifest["data_step"] == 9
    assert {name: size for name, (size, _) in manifest["files"].items()} == FILES


def test_a_folder_without_its_manifest_does_not_count(sealed):
    (sealed / durable.MANIFEST).unlink()
    assert not durable.is_sealed(sealed)


@pytest.mark.parametrize("name", [name for name, size in FILES.items() if size])
def test_a_flipped_bit_a_cut_a_longer_and_a_missing_file_are_each_named(sealed, name):
    draw, path = random.Random(name), sealed / name
    good = path.read_bytes()
    at = draw.randrange(len(good))
    flipped = bytearray(good)
    flipped[at] ^= 1 << draw.randrange(8)
    for damaged in (bytes(flipped), good[: len(good) // 2], b"", good + b"\0"):
        path.write_bytes(damaged)
        assert [line.split(":")[0] for line in durable.faults(sealed)] == [name]
    path.unlink()
    assert durable.faults(sealed) == [f"{name}: missing"]
    path.write_bytes(good)
    assert durable.faults(sealed) == []


def test_no_flipped_bit_of_the_manifest_itself_passes_for_another_state(sealed, tmp_path):
    """A flip either is seen, or is one that changes no word of the manifest (a blank for another)."""
    good = (sealed / durable.MANIFEST).read_bytes()
    said = json.loads(good)
    for bit in range(len(good) * 8):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        (sealed / durable.MANIFEST).write_bytes(flipped)
        if not durable.faults(sealed):
            assert json.loads(flipped) == said, f"bit {bit} was not seen"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"files": 3}', b'{"files": {"a": 1}}'])
def test_a_manifest_that_is_not_one_is_a_fault_and_not_a_crash(sealed, content):
    (sealed / durable.MANIFEST).write_bytes(content)
    assert durable.faults(sealed)


def test_a_copied_folder_is_as_good(sealed, tmp_path):
    shutil.copytree(sealed, tmp_path / "elsewhere" / "7")
    assert durable.faults(tmp_path / "elsewhere" / "7") == []
