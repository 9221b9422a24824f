"""Hashes of large files are remembered, and a changed file is hashed again."""

import hashlib
import os
import time

import pytest

from aurora_train import files


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    settle(path, monkeypatch)
    return path


def settle(path, monkeypatch):
    """As if the file had been written long ago."""
    now = time.time_ns()
    monkeypatch.setattr(files.time, "time_ns", lambda: now + 10**12)


def test_a_second_start_does_not_read_a_file_again(file, monkeypatch):
    wanted = hashlib.sha256(b"one").hexdigest()
    assert files.sha256(file) == wanted
    monkeypatch.setattr(files.hashlib, "file_digest", None)  # reading it again would fail
    assert files.sha256(file) == wanted
    monkeypatch.chdir(file.parent)
    assert files.sha256(file.relative_to(file.parent)) == wanted


def test_a_file_of_the_same_size_and_time_but_replaced_or_rewritten_is_hashed_again(file):
    files.sha256(file)
    before = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.sha256(file) == hashlib.sha256(b"two").hexdigest()
    other = file.with_name("other")
    other.write_bytes(b"six")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)
    assert files.sha256(file) == hashlib.sha256(b"six").hexdigest()


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    files.sha256(path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"stamp": 1}'])
def test_a_damaged_memory_is_replaced(content, file):
    wanted = files.sha256(file)
    (memory,) = (file.parent / "cache" / "hashes").iterdir()
    memory.write_text(content)
    assert files.sha256(file) == wanted and wanted in memory.read_text()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(file, monkeypatch):
    file.with_name("full").write_text("a file where the folder should be")
    monkeypatch.setenv("AURORA_CACHE", str(file.with_name("full")))
    assert files.sha256(file) == hashlib.sha256(b"one").hexdigest()
