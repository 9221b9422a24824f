"""A save counts only when every byte of it is on disk and listed: fsync, then a manifest of sizes and hashes.

Orbax checks no data (a flipped bit loads silently) and syncs neither its metadata nor its folders. The manifest is
written last and atomically, so a folder with one is whole, and a folder without one is the remains of a crash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from aurora_train.files import sync, write_atomically

MANIFEST = "manifest.aurora.json"
_CHUNK_BYTES = 1 << 19  # read and hashed while it is in the processor's cache


def seal(folder: Path, record: dict) -> dict:
    """fsync every file and folder of `folder`, then write the manifest, then fsync the parent. Returns it.

    `folder` is synced before too: its own names must not be on the disk later than the manifest's, which claims them.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = _hash_and_sync(path)
    for path in [*sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True), folder]:
        sync(path)
    manifest = {"format": 1, **record, "files": files}
    manifest["digest"] = _digest(manifest)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
    sync(folder.parent)
    return manifest


def is_sealed(folder: Path) -> bool:
    """Whether a save was finished."""
    return (folder / MANIFEST).is_file()


def manifest(folder: Path) -> dict:
    """What a folder's manifest says; {} where there is none that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def num_bytes(folder: Path) -> int:
    """Of the files that a folder's manifest lists."""
    files = manifest(folder).get("files", {})
    return sum(size for size, _ in files.values()) if isinstance(files, dict) else 0


def faults(folder: Path, read: Callable[[int], None] | None = None) -> list[str]:
    """What differs between a sealed folder and its manifest, one line a file; [] for an intact one.

    Every byte is read; `read` is told how many, as they are.
    """
    files, lines = _listed(folder)
    for name, (size, digest) in files.items():
        found = _size_fault(folder / name, name, size)
        if found is None and (actual := _hash(folder / name, read)) != digest:
            found = f"{name}: xxh3 {actual}, expected {digest}"
        if found:
            lines.append(found)
    return lines


def quick_faults(folder: Path) -> list[str]:
    """As `faults`, but of names and sizes alone: no byte of the data is read."""
    files, lines = _listed(folder)
    return lines + [line for name, (size, _) in files.items() if (line := _size_fault(folder / name, name, size))]


def _listed(folder: Path) -> tuple[dict, list[str]]:
    """(the files of a manifest by name, []), or ({}, [why it cannot be believed])."""
    if not is_sealed(folder):
        return {}, [f"{MANIFEST}: missing"]
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return {}, [f"{MANIFEST}: unreadable ({error})"]
    if not isinstance(found, dict) or found.pop("digest", None) != _digest(found):
        return {}, [f"{MANIFEST}: not what was written"]
    return found["files"], []


def _size_fault(path: Path, name: str, size: int) -> str | None:
    if not path.is_file():
        return f"{name}: missing"
    there = path.stat().st_size
    return None if there == size else f"{name}: {there} bytes, expected {size}"


def _digest(manifest: dict) -> str:
    """xxh3 of what a manifest says, however its text is laid out."""
    return xxhash.xxh3_64_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _hash_and_sync(path: Path) -> tuple[int, str]:
    digest = _hash(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size, digest
    finally:
        os.close(descriptor)


def _hash(path: Path, read: Callable[[int], None] | None = None) -> str:
    hasher, chunk = xxhash.xxh3_64(), bytearray(_CHUNK_BYTES)
    with open(path, "rb", buffering=0) as handle:
        while size := handle.readinto(chunk):
            hasher.update(memoryview(chunk)[:size])
            if read:
                read(size)
    return hasher.hexdigest()
