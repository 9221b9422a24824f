"""The identity of a source: the size and hash of each of its files, independent of where they lie.

Free of jax. Hashes are remembered below the cache under (path, size, mtime, ctime, inode); a file that was touched
within two seconds of being hashed is hashed again, since its clock may not show a second change.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aurora_train.errors import UserError

_RACY_NS = 2_000_000_000  # a file changed this shortly before it was hashed may have changed again unnoticed


def listed(files: Sequence[tuple[str, Path]], cache: Path, progress: Callable) -> list[tuple[str, int, str]]:
    """(name, bytes, sha256) of every (name, path), at least one. `cache`: the folder in which hashes are remembered."""
    first = hashlib.sha256(os.fsencode(files[0][1])).hexdigest()[:16]
    memory = cache / f"hashes-{first}.json"
    known = _load_hashes(memory)
    hashed, listing, changed = {}, [], False
    for done, (name, path) in enumerate(files):
        try:
            status = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        entry = known.get(str(path))
        if not entry or entry[:4] != stamp:
            changed, settled = True, time.time_ns() - _RACY_NS > max(stamp[1:3])
            entry = [*(stamp if settled else [-1] * 4), _hash_file(path)]
            progress(done, len(files), "hashing the source")
        hashed[str(path)] = entry
        listing.append((name, status.st_size, entry[4]))
    if changed:
        _write_atomically(memory, json.dumps(hashed))
    return listing


def unreadable(path, error) -> UserError:
    """The error of a file that cannot be opened."""
    return UserError(f"cannot read {path}", where="data.source", why=str(error))


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def _load_hashes(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}  # only a cache: everything is hashed again


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")  # several processes may do this at once
    temporary.write_text(text)
    temporary.replace(path)
