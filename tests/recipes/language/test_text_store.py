"""The prepared store: whole or absent whatever kills its preparation; damage is seen; unchanged text is not re-read."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import config, text, write_folder

from aurora_train.data import prepared
from aurora_train.data.prepared import DamagedStore
from aurora_train.errors import UserError
from language.prepare import prepare
from language.store import SPLITS, Store

# A process that prepares argv[1] into argv[2] and ends itself with SIGKILL (or stops with SIGSTOP) at a moment:
# the n-th progress call that says argv[3], or the n-th fsync.
CHILD = """
import os, signal, sys
sys.path[:0] = sys.argv[5].split(os.pathsep)
from corpora import config
from pathlib import Path
from language.prepare import prepare
moment, number = sys.argv[3].rsplit(":", 1)
how = getattr(signal, sys.argv[4])
calls = 0
def at(what):
    global calls
    calls += what == moment
    if what == moment and calls == int(number):
        print("now", flush=True)
        os.kill(os.getpid(), how)
def progress(done, total, what):
    print(what, flush=True)
    at(what)
real = os.fsync
def fsync(descriptor):
    at("fsync")
    real(descriptor)
os.fsync = fsync
print(prepare(config(sys.argv[1], "bpe"), Path(sys.argv[2]), progress=progress).fingerprint, flush=True)
"""


def child(source: Path, cache: Path, moment: str, how: str = "SIGKILL") -> subprocess.Popen:
    places = os.pathsep.join(str(Path(__file__).parents[up]) for up in (2, 3)) + os.sep + "recipes"
    arguments = [sys.executable, "-c", CHILD, str(source), str(cache), moment, how, places]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("store") / "text", documents=30)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    return prepare(config(source, "bpe"), tmp_path_factory.mktemp("undisturbed")).fingerprint


MOMENTS = ["hashing the source:15", "training the tokenizer:1", "tokenizing:1", "fsync:1", "fsync:7", "fsync:16"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_preparation_killed_at_any_moment_is_made_again_and_the_same(source, undisturbed, tmp_path, moment):
    killed = child(source, tmp_path, moment)
    output, _ = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL and "now" in output
    assert prepare(config(source, "bpe"), tmp_path).fingerprint == undisturbed
    assert [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name] == []


def test_a_store_killed_before_its_rename_is_not_there_and_after_it_is_whole(source, undisturbed, tmp_path):
    files = 2 + 3 * 4 + 2 + 1  # tokenizer, four files a split, two held-out texts, manifest
    child(source, tmp_path / "before", f"fsync:{files + 1}").communicate(timeout=60)  # the folder, before the rename
    child(source, tmp_path / "after", f"fsync:{files + 2}").communicate(timeout=60)  # its parent, after the rename
    (half,), (whole,) = (list((tmp_path / when).glob("text-*/")) for when in ("before", "after"))
    assert ".tmp-" in half.name and ".tmp-" not in whole.name
    assert Store(whole).fingerprint == undisturbed


def test_a_second_process_waits_for_the_first_and_reuses_its_store(source, undisturbed, tmp_path):
    first = child(source, tmp_path, "tokenizing:1", "SIGSTOP")
    assert "now\n" in iter(first.stdout.readline, "")  # stopped, and it holds the lock
    second = child(source, tmp_path, "never:1")
    heard = []
    for line in iter(second.stdout.readline, ""):
        heard.append(line.strip())
        if line.startswith("waiting"):
            first.send_signal(signal.SIGCONT)
    assert first.wait(60) == second.wait(60) == 0
    assert heard[-1] == undisturbed and "tokenizing" not in heard
    assert any(line.startswith("waiting for another process") for line in heard)
    first.stdout.close(), second.stdout.close()


def test_an_unchanged_source_is_not_read_again(source, tmp_path):
    settings = config(source)
    first = prepare(settings, tmp_path)
    for path in source.rglob("*.py"):
        os.utime(path, (1e9, 1e9))
    said = []
    again = prepare(settings, tmp_path, progress=lambda done, total, what: said.append(what))
    assert again.fingerprint == first.fingerprint and set(said) <= {"hashing the source"}


@pytest.fixture
def small(tmp_path):
    return write_folder(tmp_path / "small", documents=10, lines=4)


def test_a_changed_file_is_seen_even_with_its_old_size_and_time(small, tmp_path):
    before = prepare(config(small), tmp_path / "cache")
    path = small / "part0" / "document0.py"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:-2] + b"9\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and path.stat().st_mtime_ns == times.st_mtime_ns
    assert prepare(config(small), tmp_path / "cache").fingerprint != before.fingerprint


def test_a_corpus_that_was_moved_is_the_same_corpus(small, tmp_path):
    before = prepare(config(small), tmp_path / "cache")
    moved = small.rename(tmp_path / "elsewhere")
    assert prepare(config(moved), tmp_path / "cache").folder == before.folder


def test_sequence_is_not_part_of_a_store_but_tokenizer_and_split_are(small, tmp_path):
    def folder(**settings):
        return prepare(config(small, **settings), tmp_path / "cache").folder

    assert folder(sequence=8) == folder(sequence=16)
    assert len({folder(), folder(kind="bpe"), folder(kind="bpe", vocab=280), folder(holdout_test=0.3)}) == 4


FILES = ["tokens-train.bin", "documents-test.npy", "names-train.jsonl", "tokenizer.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_seen_named_and_mended(small, tmp_path, caplog, monkeypatch, name, damage):
    monkeypatch.setattr(prepared, "_verified", set())  # a fresh process verifies hashes
    sound = prepare(config(small), tmp_path / "cache")
    monkeypatch.setattr(prepared, "_verified", set())
    path = sound.folder / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(DamagedStore, match=f"damaged: {name}") as caught:
        Store(sound.folder)
    assert str(sound.folder) in caught.value.where and "delete" in caught.value.hint
    again = prepare(config(small), tmp_path / "cache")
    assert again.fingerprint == sound.fingerprint
    assert f"damaged: {name}" in caplog.text and "preparing it again" in caplog.text


def test_a_full_disk_is_one_message_and_leaves_nothing_behind(source, undisturbed, tmp_path):
    prepare(config(source, max_documents=3, holdout_validation=0), tmp_path)  # so that the hashes are known
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(UserError, match="cannot write the prepared data"):
            prepare(config(source, "bpe"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.tmp-*"))
    assert prepare(config(source, "bpe"), tmp_path).fingerprint == undisturbed


def test_a_cache_that_cannot_be_written_is_one_message(small, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write the prepared data") as caught:
        prepare(config(small), tmp_path / "file" / "cache")
    assert "AURORA_CACHE" in caught.value.hint


def test_a_source_that_changes_while_it_is_read_is_not_served(small, tmp_path):
    def touch(done, total, what):
        if what == "tokenizing":
            (small / "part0" / "document0.py").write_text("changed under way\n")

    with pytest.raises(UserError, match="changed while it was read"):
        prepare(config(small), tmp_path / "cache", progress=touch)
    assert not list((tmp_path / "cache").glob("text-*/"))


def test_a_copy_is_never_both_trained_on_and_held_out(tmp_path):
    folder = write_folder(tmp_path / "text", documents=20)
    for i in range(20):
        (folder / f"copy{i}.py").write_text(text(i), encoding="utf-8")
    made = prepare(config(folder, holdout_test=0.3), tmp_path / "cache")
    texts = {
        split: {made.text(split, i) for i in range(made.num_documents(split))} for split in SPLITS
    }
    assert sum(map(len, texts.values())) == len(set.union(*texts.values())) == 20
    assert made.manifest["skipped"]["repeats another document"]["count"] == 20


def test_a_document_keeps_its_split_when_others_come_and_go(tmp_path):
    folder = write_folder(tmp_path / "text", documents=60)
    before = prepare(config(folder), tmp_path / "cache")
    for path in list(folder.rglob("document1*.py")):
        path.unlink()
    after = prepare(config(folder), tmp_path / "cache")
    for split in SPLITS:
        left = {name for name in before.names(split) if "document1" not in name}
        assert left == set(after.names(split))


def test_the_manifest_says_what_was_read_and_what_was_left_out(small, tmp_path):
    (small / "bad.py").write_bytes(b"\xff\xfe\x00")
    (small / "blank.py").write_text(" \n")
    (small / "LICENSE").write_text("do as you like")
    made = prepare(config(small), tmp_path / "cache")
    manifest = json.loads(json.dumps(made.describe()))
    assert manifest["skipped"]["not UTF-8"] == {"count": 1, "names": ["bad.py"]}
    assert manifest["skipped"]["empty"] == {"count": 1, "names": ["blank.py"]}
    assert manifest["licence"] == "see LICENSE"
    assert sum(split["documents"] for split in manifest["splits"].values()) == 11
    for split, counts in manifest["splits"].items():
        assert counts["tokens"] == counts["bytes"] + counts["documents"] == made.offsets(split)[-1]
