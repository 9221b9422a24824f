"""Runs beside each other share their frozen parameters on disk, and each of them is whole without the others."""

import os
import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from aurora_train.checkpoint import durable, frozen, parts
from aurora_train.checkpoint.layout import Unread
from aurora_train.errors import UserError

FLAT = {
    "frozen.embedding": Unread(np.arange(96, dtype=np.float32).reshape(24, 4).astype(ml_dtypes.bfloat16)),
    "frozen.stack.units.0000.scale": Unread(np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 4), 1),
}


def written(folder: Path, flat, content: str) -> str:
    frozen.write(folder, flat)
    return frozen.seal(folder, flat, content, [])


def store(root: Path, run: str, flat=FLAT) -> Path:
    """Store frozen parameters as a run's first save does. Returns their folder."""
    folder = root / run / "checkpoints" / frozen.FOLDER
    folder.parent.mkdir(parents=True)
    content = frozen.content_of(flat)
    digest = frozen.shared(folder, content) or written(folder, flat, content)
    frozen.refuse_damage(folder, digest)
    assert parts.stored(folder).keys() == flat.keys()
    return folder


def on_disk(*folders: Path) -> int:
    """Bytes of the files of these folders, each inode once."""
    found = {(s.st_dev, s.st_ino): s.st_blocks * 512 for folder in folders for path in folder.rglob("*")
             if path.is_file() and path.name != durable.MANIFEST for s in [path.stat()]}  # fmt: skip
    return sum(found.values())


def digest(folder: Path) -> str:
    return durable.manifest(folder)["digest"]


def test_the_same_parameters_are_stored_once_and_each_run_is_whole_without_the_others(tmp_path):
    one, two = store(tmp_path, "one"), store(tmp_path, "two")
    assert on_disk(one, two) == on_disk(one) == on_disk(two) > 0 and digest(one) == digest(two)
    shutil.copytree(tmp_path / "two", tmp_path / "elsewhere" / "copy")
    shutil.rmtree(tmp_path / "one")
    for folder in (two, tmp_path / "elsewhere" / "copy" / "checkpoints" / frozen.FOLDER):
        frozen.refuse_damage(folder, digest(two))
    third = store(tmp_path, "third")
    assert on_disk(two, third) == on_disk(two)


@pytest.mark.parametrize("changed", ["a value", "a dtype", "a name"])
def test_other_parameters_are_stored_apart(changed, tmp_path):
    flat = dict(FLAT)
    if changed == "a name":
        flat["frozen.head"] = flat.pop("frozen.embedding")
    else:
        array = flat["frozen.embedding"].leaf
        flat["frozen.embedding"] = Unread(array + 1 if changed == "a value" else array.astype(np.float16))
    one, two = store(tmp_path, "one"), store(tmp_path, "two", flat)
    assert on_disk(one, two) == on_disk(one) + on_disk(two)


def test_damaged_parameters_are_not_shared_and_it_is_said(tmp_path, caplog):
    one = store(tmp_path, "one")
    victim = max((path for path in one.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    two = store(tmp_path, "two")
    assert f"those of {tmp_path / 'one'} cannot be shared: {victim.relative_to(one)}" in caplog.text
    assert on_disk(one, two) == on_disk(one) + on_disk(two)
    with pytest.raises(UserError, match="damaged or missing"):
        frozen.refuse_damage(one, digest(one))


def test_between_two_file_systems_the_parameters_are_stored_again_and_it_is_said(tmp_path, caplog):
    places = [place for place in (Path("/dev/shm"), Path(tempfile.gettempdir())) if os.access(place, os.W_OK)]
    other = next((place for place in places if place.stat().st_dev != tmp_path.stat().st_dev), None)
    if other is None:
        pytest.skip("there is no second file system here")
    store(tmp_path, "one")
    away = other / f"aurora-{os.getpid()}"
    try:
        (tmp_path / "two").mkdir()
        away.mkdir()
        (tmp_path / "two" / "checkpoints").symlink_to(away)
        folder, content = tmp_path / "two" / "checkpoints" / frozen.FOLDER, frozen.content_of(FLAT)
        assert frozen.shared(folder, content) is None and not folder.exists()
        assert f"those of {tmp_path / 'one'} cannot be shared: Invalid cross-device link" in caplog.text
        frozen.refuse_damage(folder, written(folder, FLAT, content))
    finally:
        shutil.rmtree(away)


def test_an_unsealed_folder_of_another_run_is_no_source(tmp_path):
    one = store(tmp_path, "one")
    (one / durable.MANIFEST).unlink()
    two = store(tmp_path, "two")
    assert on_disk(one, two) == on_disk(one) + on_disk(two)
