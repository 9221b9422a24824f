"""A save counts only when every byte of it is on disk and listed: fsync, then a manifest of sizes and hashes.

Orbax checks no data (a flipped bit loads silently) and syncs neither its metadata nor its folders. The manifest is
written last and atomically, so a folder with one is whole, and a folder without one is the remains of a crash.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import xxhash

from aurora_train.files import sync, write_atomically

MANIFEST = "manifest.aurora.json"
_CHUNK_BYTES = 1 << 22


def seal(folder: Path, facts: dict) -> dict:
    """fsync every file and folder under `folder`, then write the manifest, then fsync the parent. Returns it."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = _hash_and_sync(path)
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        sync(path)
    manifest = {"format": 1, **facts, "files": files}
    manifest["digest"] = _digest(manifest)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
    sync(folder.parent)
    return manifest


def is_sealed(folder: Path) -> bool:
    """Whether a save was finished."""
    return (folder / MANIFEST).is_file()


def faults(folder: Path) -> list[str]:
    """What differs between a sealed folder and its manifest, one line a file; [] for an intact one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: unreadable ({error})"]
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _digest(manifest):
        return [f"{MANIFEST}: not what was written"]
    lines = []
    for name, (size, digest) in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            lines.append(f"{name}: missing")
        elif path.stat().st_size != size:
            lines.append(f"{name}: {path.stat().st_size} bytes, expected {size}")
        elif _hash(path) != digest:
            lines.append(f"{name}: xxh3 {_hash(path)}, expected {digest}")
    return lines


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


def _hash(path: Path) -> str:
    hasher = xxhash.xxh3_64()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()
