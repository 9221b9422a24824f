"""Small files written so that a reader, or a crash, sees the old content or the new one; and the cache's place."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path

from aurora_train.errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # of a disk, and of a user's or a folder's share of one


def cache_folder() -> Path:
    """Where prepared data and compiled programs are shared between runs: $AURORA_CACHE or ~/.cache/aurora_train."""
    return Path(os.environ.get("AURORA_CACHE") or Path.home() / ".cache" / "aurora_train")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file atomically and durably: written beside, fsync'd, renamed over, folder fsync'd.

    Raises UserError where the disk is full or the folder may not be written.
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
    """Make a folder and those above it, so that a power cut cannot take its name. Raises OSError.

    Its parent is synced where the folder is there already, too: whoever made it may have been killed before that.
    """
    if not path.parent.is_dir():
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # a parent that may be passed through, but not read
        sync(path.parent)


def sync(path: Path) -> None:
    """Put a file's bytes, or a folder's names and renames, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value) -> None:
    """A JSON record, atomically and durably."""
    write_atomically(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path, default=None):
    """A JSON record, or `default` where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return default
