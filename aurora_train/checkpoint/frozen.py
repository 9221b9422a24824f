"""The parameters that a run does not train are written once; every checkpoint's manifest names them by their digest.

They are stored in `frozen/` beside the checkpoints, in the same form. The folder is sealed before the first checkpoint
that needs it, and retention never deletes it, because no checkpoint can be read without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aurora_train.checkpoint import durable, writer
from aurora_train.errors import UserError

FOLDER = "frozen"
_PREFIX = "frozen."


def is_frozen(name: str) -> bool:
    """Whether a canonical name belongs to the frozen part of a state."""
    return name.startswith(_PREFIX)


def write(folder: Path, flat: dict[str, Any]) -> str:
    """Save the named leaves as `folder`, which must not exist, and seal it. Returns its digest.

    They never change, so they are read as they are written (`layout.Unread`), and no copy of them all is made.
    """
    from orbax.checkpoint import v1 as ocp

    with writer.options():
        ocp.save_checkpointables(folder, {writer.STATE: flat})
    return durable.seal(folder, {"frozen": len(flat)})["digest"]


def shapes(folder: Path, digest: str) -> dict[str, Any]:
    """Shape and dtype of every frozen leaf by canonical name. UserError if the folder's digest is not `digest`."""
    from orbax.checkpoint import v1 as ocp

    _refuse([] if _digest(folder) == digest else _other(folder), folder)
    return dict(ocp.metadata(folder).metadata)


def refuse_damage(folder: Path, digest: str) -> None:
    """Raise UserError if the folder is missing, has another digest, or has a changed byte. Reads all of it."""
    _refuse(durable.faults(folder) if _digest(folder) == digest else _other(folder), folder)


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
