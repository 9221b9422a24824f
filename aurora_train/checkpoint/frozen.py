"""The parameters that a run does not train are written once; every checkpoint's manifest names them by their digest.

They are stored in `frozen/` beside the checkpoints, in the same form. The folder is sealed before the first checkpoint
that needs it, and retention never deletes it, because no checkpoint can be read without it.

Runs in one folder that freeze the same parameters, such as several adapters of one base, share the bytes on disk: the
files of the later run are hard links to those of the earlier. Each folder is whole for whoever reads or copies it, and
the bytes are there until the last run is deleted.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from aurora_train.checkpoint import durable, writer
from aurora_train.errors import UserError
from aurora_train.files import sync, write_atomically

log = logging.getLogger("aurora_train")

FOLDER = "frozen"
_PREFIX = "frozen."


def is_frozen(name: str) -> bool:
    """Whether a canonical name belongs to the frozen part of a state."""
    return name.startswith(_PREFIX)


def shared(folder: Path, content: str) -> str | None:
    """Make `folder`, which must not exist, of hard links to the same parameters of another run. Returns its digest.

    The other run lies beside this one, and every byte is read and compared with its manifest. None, and no folder, if
    there is no such run; a link that cannot be made, and damage, are reported in the log.
    """
    for seal in sorted(folder.parents[2].glob(f"*/{folder.parent.name}/{FOLDER}/{durable.MANIFEST}")):
        other = seal.parent
        if durable.manifest(other).get("content") != content:
            continue
        try:
            _link(other, folder)
            lines = durable.faults(folder)
        except (OSError, UserError) as error:
            lines = [getattr(error, "strerror", None) or str(error)]
        if not lines:
            log.info("frozen parameters: %d bytes shared with %s", durable.num_bytes(folder), other.parents[1])
            return _digest(folder)
        log.warning("the frozen parameters are stored once more, because those of %s cannot be shared: %s",
                    other.parents[1], lines[0])  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _link(other: Path, folder: Path) -> None:
    """Hard links to the files of a sealed folder, and a manifest of its own, written last. Raises OSError."""
    folder.mkdir()
    for path in sorted(other.rglob("*")):  # a folder comes before what it holds
        mine = folder / path.relative_to(other)
        if path.is_dir():
            mine.mkdir()
        elif path.name != durable.MANIFEST:
            os.link(path, mine)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)
    write_atomically(folder / durable.MANIFEST, (other / durable.MANIFEST).read_bytes())
    sync(folder.parent)


def content_of(flat: dict[str, Any]) -> str:
    """xxh3 (128 bits) over names, shapes, dtypes and bytes of the named leaves, read one at a time.

    Of two runs of one base it is the same, while the files that Orbax writes have random names.
    """
    hasher = xxhash.xxh3_128()
    for name, leaf in sorted(flat.items()):
        hasher.update(f"{name} {leaf.dtype} {list(leaf.shape)}\n".encode())
        hasher.update(np.ascontiguousarray(leaf.read()).reshape(-1).view(np.uint8))
    return hasher.hexdigest()


def write(folder: Path, flat: dict[str, Any]) -> None:
    """Save the named leaves as `folder`, which must not exist.

    They never change, so they are read as they are written (`layout.Unread`), and no copy of them all is made.
    """
    from orbax.checkpoint import v1 as ocp

    with writer.options():
        ocp.save_checkpointables(folder, {writer.STATE: flat})


def seal(folder: Path, flat: dict[str, Any], content: str | None, inside: list[str]) -> str:
    """Seal what `write` and other processes wrote. Returns its digest. `content`: None if it cannot be shared."""
    return durable.seal(folder, {"frozen": len(flat), "content": content}, inside)["digest"]


def refuse_other(folder: Path, digest: str) -> None:
    """UserError if the folder's digest is not `digest`."""
    _refuse([] if _digest(folder) == digest else _other(folder), folder)


def refuse_damage(folder: Path, digest: str) -> None:
    """Raise UserError if the folder is missing, has another digest, or has a changed byte. Reads all of it."""
    _refuse(faults(folder, digest), folder)


def faults(folder: Path, digest: str, read: Callable[[int], None] | None = None) -> list[str]:
    """What differs between a folder and the frozen parameters of a digest, as `durable.faults` says it."""
    return durable.faults(folder, read) if _digest(folder) == digest else _other(folder)


def _digest(folder: Path) -> str | None:
    try:
        return json.loads((folder / durable.MANIFEST).read_text())["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _other(folder: Path) -> list[str]:
    if not folder.is_dir():
        return ["the folder is missing"]
    return [f"{durable.MANIFEST}: not the manifest that the checkpoints were saved with"]


def _refuse(lines: list[str], folder: Path) -> None:
    if lines:
        raise UserError(
            "the frozen parameters of this run are damaged or missing",
            where=str(folder),
            why="\n  ".join(lines),
            hint="restore this folder from a copy: every checkpoint of the run needs it, and it is written only once",
        )
