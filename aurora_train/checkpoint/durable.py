"""A save counts only when every byte of it is on disk and listed: fsync, then a manifest of sizes and hashes.

Orbax checks no data (a flipped bit loads silently) and syncs neither its metadata nor its folders. The manifest is
written last and atomically, so a folder with one is whole, and a folder without one is the remains of a crash.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import xxhash

from aurora_train.files import sync, write_atomically

MANIFEST = "manifest.aurora.json"
_CHUNK_BYTES = 1 << 19  # small enough to be hashed while it is still in the processor's cache


def seal(folder: Path, record: dict, inside: list[str] = []) -> dict:  # noqa: B006 (never written to)
    """fsync every file and folder of `folder`, then write the manifest, then fsync the parent. Returns the manifest.

    `folder` itself is synced before the manifest is written, because the manifest lists names that must be on disk.
    `inside`: folders in it that are sealed already, of which only the manifests are listed.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and (name.split("/")[0] not in inside or name.split("/")[1:] == [MANIFEST]):
            files[name] = _hash_and_sync(path)
    for path in [*sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True), folder]:
        sync(path)
    manifest = {"format": 1, **record, **({"parts": inside} if inside else {}), "files": files}
    manifest["digest"] = _digest(manifest)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
    sync(folder.parent)
    return manifest


def is_sealed(folder: Path) -> bool:
    """Whether a save was finished."""
    return (folder / MANIFEST).is_file()


def manifest(folder: Path) -> dict:
    """The content of a folder's manifest; {} where it is missing or unreadable."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def parts(folder: Path) -> list[str]:
    """The folders in a sealed folder that other processes wrote (`checkpoint.parts`)."""
    return manifest(folder).get("parts", [])


def num_bytes(folder: Path) -> int:
    """Total size of the files that a folder's manifest, and those of its parts, list."""
    files = manifest(folder).get("files", {})
    own = sum(size for size, _ in files.values()) if isinstance(files, dict) else 0
    return own + sum(num_bytes(folder / part) for part in parts(folder))


def faults(folder: Path, read: Callable[[int], None] | None = None) -> list[str]:
    """What differs between a sealed folder and its manifest, one line per file; [] if it is intact.

    Reads every byte; `read(n)` is called after each chunk of n bytes.
    """
    files, lines = _listed(folder)
    for name, (size, digest) in files.items():
        fault = _size_fault(folder / name, name, size)
        if fault is None and (actual := _hash(folder / name, read)) != digest:
            fault = f"{name}: xxh3 {actual}, expected {digest}"
        if fault:
            lines.append(fault)
    return lines


def quick_faults(folder: Path) -> list[str]:
    """Like `faults`, but compares names and sizes only: no data is read."""
    files, lines = _listed(folder)
    return lines + [line for name, (size, _) in files.items() if (line := _size_fault(folder / name, name, size))]


def _listed(folder: Path) -> tuple[dict, list[str]]:
    """(the files of a manifest and of its parts' by name, why a manifest among them cannot be trusted)."""
    if not is_sealed(folder):
        return {}, [f"{MANIFEST}: missing"]
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return {}, [f"{MANIFEST}: unreadable ({error})"]
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        return {}, [f"{MANIFEST}: its content has changed since it was written"]
    if not all(re.fullmatch(r"process-\d+", part) for part in content.get("parts", [])):
        return {}, [f"{MANIFEST}: names a part that is none"]
    files, lines = dict(content["files"]), []
    for part in content.get("parts", []):
        inner, more = _listed(folder / part)
        files |= {f"{part}/{name}": entry for name, entry in inner.items()}
        lines += [f"{part}/{line}" for line in more]
    return files, lines


def _size_fault(path: Path, name: str, size: int) -> str | None:
    if not path.is_file():
        return f"{name}: missing"
    actual = path.stat().st_size
    return None if actual == size else f"{name}: {actual} bytes, expected {size}"


def _digest(manifest: dict) -> str:
    """xxh3 of a manifest's content, independent of how its text is laid out."""
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
