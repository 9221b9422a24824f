"""A folder of prepared data: complete or absent, below the cache, under a hash of everything that decides it.

`made` opens such a folder, or has it written into a temporary folder, which is synced and renamed. A killed preparation
leaves a temporary folder that the next one removes; two processes that need the same folder wait for each other on a
file lock. `Prepared` is what every reader of such a folder shares: the manifest with each file's size and hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from aurora_train.errors import UserError
from aurora_train.files import sync

log = logging.getLogger("aurora_train")

MANIFEST = "manifest.json"
_HASH_AT_MOST_BYTES = 1 << 28  # larger files are checked by size when opened, and by hash in `verify(full=True)`
_verified: set[tuple[str, str]] = set()


class DamagedStore(UserError):
    """Raised if a folder's files differ from those in its manifest."""


class Prepared:
    """An open, read-only folder of prepared data. Arrays are read from disk as they are accessed.

    Attributes:
        manifest: source, counts per split, tokenizer, files and what else was recorded; JSON-able.
        fingerprint: sha256 hex over the folder's key and the hash of every file.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / MANIFEST).read_text())
        except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self._damaged(f"{MANIFEST} is missing or cut short") from error
        if fingerprint_of(self.manifest) != self.manifest.get("fingerprint"):
            raise self._damaged(f"{MANIFEST} was changed")
        self.fingerprint = self.manifest["fingerprint"]
        self.verify()
        self._arrays: dict[str, np.ndarray] = {}

    def verify(self, full: bool = False) -> None:
        """Compare every file with the manifest: sizes always, hashes once per process or if `full`.

        Raises DamagedStore, which names the first file that differs.
        """
        seen = (str(self.folder), self.fingerprint)
        for name, recorded in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != recorded["bytes"]:
                raise self._damaged(f"{name} is missing or has another size")
            if full or (seen not in _verified and recorded["bytes"] <= _HASH_AT_MOST_BYTES):
                if hash_file(path) != recorded["xxh3"]:
                    raise self._damaged(f"{name} has other contents")
        _verified.add(seen)

    def _damaged(self, what: str) -> DamagedStore:
        return DamagedStore(
            f"the prepared data is damaged: {what}",
            where=str(self.folder),
            hint="delete this folder; the next run prepares it again from the source",
        )

    def array(self, name: str, dtype: str | None = None) -> np.ndarray:
        """A file's array, read from disk as it is accessed: .npy as it is, else of `dtype`."""
        if name not in self._arrays:
            path = self.folder / name
            if path.suffix == ".npy":
                self._arrays[name] = np.load(path, mmap_mode="r")
            else:
                kind = np.dtype(dtype)
                self._arrays[name] = np.memmap(path, kind, mode="r") if path.stat().st_size else np.empty(0, kind)
        return self._arrays[name]

    def lines(self, name: str) -> list[str]:
        """The strings in a file of JSON lines."""
        if name not in self._arrays:
            with (self.folder / name).open() as file:
                self._arrays[name] = [json.loads(line) for line in file]
        return self._arrays[name]

    def describe(self) -> dict:
        """The manifest without its list of files, for provenance."""
        return {name: value for name, value in self.manifest.items() if name != "files"} | {"folder": str(self.folder)}


Kind = TypeVar("Kind", bound=Prepared)


def made(kind: type[Kind], folder: Path, write: Callable[[Path], dict], progress: Callable) -> Kind:
    """The open `folder`; it is made first if it does not exist or is damaged.

    `write(temporary)` writes the files into a folder that exists, and returns the manifest without "files" and
    "fingerprint"; whatever it raises leaves nothing behind. Raises UserError for a cache that cannot be written.
    """
    if folder.exists():
        try:
            return kind(folder)
        except DamagedStore as damage:
            log.warning("%s; preparing it again", damage.what)
    with locked(folder.with_name(f"{folder.name}.lock"), progress):
        _clear_debris(kind, folder)
        if not folder.exists():
            _make(folder, write)
        return kind(folder)


def _make(folder: Path, write: Callable[[Path], dict]) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    with writing(folder.parent):
        temporary.mkdir()
    try:
        manifest = write(temporary)
        with writing(folder.parent):
            manifest["files"] = {
                path.name: {"bytes": path.stat().st_size, "xxh3": hash_file(path)}
                for path in sorted(temporary.iterdir())
            }
            manifest["fingerprint"] = fingerprint_of(manifest)
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            _publish(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # half a store should not keep a full disk full
        raise


@contextmanager
def locked(path: Path, progress: Callable) -> Iterator[None]:
    """An exclusive lock, which the kernel releases however its holder dies."""
    with writing(path.parent):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(0, None, "waiting for another process that prepares the same data")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """In this context, a full disk or a missing permission becomes a UserError, because the user has to fix it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "cannot write the prepared data",
            where=str(folder),
            why=str(error),
            hint="free some space, or name another folder in the environment variable AURORA_CACHE",
        ) from error


def _clear_debris(kind: type[Prepared], folder: Path) -> None:
    """Under the lock: remove what killed preparations left, and a damaged folder."""
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(stale)
    if folder.exists():
        try:
            kind(folder)
        except DamagedStore:
            shutil.rmtree(folder)


def _publish(temporary: Path, folder: Path) -> None:
    """Make the files durable, then visible: after a power cut the folder is complete or absent."""
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    temporary.rename(folder)
    sync(folder.parent)


def key_of(decisive: dict) -> str:
    """sha256 hex over all that decides a folder's contents, as plain JSON."""
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def fingerprint_of(manifest: dict) -> str:
    """sha256 hex over the key and the files' sizes and hashes, which decide every array read from the folder."""
    return key_of({name: manifest.get(name) for name in ("format", "key", "files")})


def hash_file(path: Path) -> str:
    """xxh3-64 hex of a file: detects accidents, not malice."""
    hasher = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def changed(name: str) -> UserError:
    """The error of a source whose files are not those that were listed before they were read."""
    return UserError(f"{name} changed while it was read", where="data.source", hint="run the command again")
