"""Writes small files so that a reader or a crash sees either the old or the new content; locates the cache folder;
hashes large files once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from pathlib import Path

from aurora_train.errors import UserError

_RACY_NS = 2_000_000_000  # a file changed this shortly before it was hashed may have changed again unnoticed
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # the disk is full, or the quota of a user or folder


def cache_folder() -> Path:
    """Where prepared data and compiled programs are shared between runs: $AURORA_CACHE or ~/.cache/aurora_train."""
    return Path(os.environ.get("AURORA_CACHE") or Path.home() / ".cache" / "aurora_train")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file atomically and durably: write a new file beside it, fsync, rename, fsync the folder.

    Raises UserError if the disk is full or the folder is not writable.
    """
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", where=str(path)) from error


def make_folder(path: Path) -> None:
    """Create a folder and its parents durably: they survive a power cut. Raises OSError.

    The parent is synced even if the folder already exists, because its creator may have been killed before syncing.
    """
    if not path.parent.is_dir():
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # the parent may be searchable but not readable
        sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names and renames, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value) -> None:
    """Write a JSON record atomically and durably."""
    write_atomically(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path, default=None):
    """The content of a JSON file, or `default` if it does not exist. UserError if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise UserError("this file is not JSON", where=str(path), why=str(error)) from error


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of a folder, by name; [] if it is none."""
    return sorted(folder.glob("*.gguf")) if folder.is_dir() else []


def gguf_in(folder: Path) -> str | None:
    """A hint that names the GGUF files in a folder that was named instead; None if there are none."""
    return f"name the file in it: {' or '.join(map(str, found))}" if (found := gguf_files(folder)) else None


def sha256(path: Path) -> str:
    """sha256 hex of a file's bytes. Raises OSError.

    It is remembered in the cache folder under the file's path, size, times and inode, because weights take minutes to
    hash. A file that was touched within two seconds of being hashed is not remembered.
    """
    path = path.resolve()
    status = path.stat()
    stamp = [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    memory = cache_folder() / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    known = None
    with contextlib.suppress(UserError, OSError):  # it only saves time
        known = read_json(memory)
    if isinstance(known, dict) and known.get("stamp") == stamp and isinstance(known.get("sha256"), str):
        return known["sha256"]
    settled = time.time_ns() - _RACY_NS > max(status.st_mtime_ns, status.st_ctime_ns)
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if settled:
        with contextlib.suppress(UserError):
            write_json(memory, {"stamp": stamp, "sha256": found})
    return found
