"""Reads a checkpoint of a run that may train on meanwhile, whose trainer deletes all but the newest checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from aurora_train.checkpoint import durable
from aurora_train.checkpoint.store import CheckpointStore, refuse_damage, require_step
from aurora_train.errors import UserError


class Deleted(UserError):
    """A checkpoint was deleted while it was read."""


@contextlib.contextmanager
def reading(store: CheckpointStore, step: int):
    """In this context, whatever fails because the checkpoint is there no more is raised as `Deleted`."""
    try:
        yield
    except Exception as error:  # of the system, of Orbax, or what a reader says of a file that is missing
        if durable.is_sealed(store.folder / str(step)):
            raise
        store.outdated = True
        raise Deleted(
            f"the checkpoint of step {step} was deleted while it was read", where=str(store.folder),
            why="the run trains on, and keeps its newest checkpoints only (checkpoint.keep)",
            hint="run the command again; or copy the run folder, and read the copy",
        ) from error  # fmt: skip


def opened(store: CheckpointStore, step: int | None, where: str, read: Callable[[int], Any]) -> tuple[int, Any]:
    """(the step, `read(step)`) of the requested checkpoint, or of the newest, after its bytes were compared.

    If the newest is deleted meanwhile, there is a newer one, which is read instead. UserError as `require_step` and
    `refuse_damage` say; `Deleted` for a requested one.
    """
    while True:
        chosen = require_step(store, step, where)
        try:
            with reading(store, chosen):
                refuse_damage(store, chosen)
                return chosen, read(chosen)
        except Deleted:
            if step is not None:
                raise
