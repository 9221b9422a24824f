"""Reads a checkpoint of a run that may train on meanwhile, whose trainer deletes all but the newest checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from aurora_train.checkpoint import durable
from aurora_train.checkpoint.store import CheckpointStore
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


def require_step(store: CheckpointStore, step: int | None, where: str) -> int:
    """The step to read: the requested one, or the newest. UserError if it does not exist."""
    steps = store.steps()
    if not steps:
        raise UserError("this run has no checkpoint yet", where=where, hint="`aurora resume RUN` continues it")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise UserError(f"no checkpoint of step {step}", where=where, hint=f"there are: {', '.join(map(str, steps))}")
    return step


def refuse_damage(store: CheckpointStore, step: int) -> None:
    """Raise UserError if a checkpoint's bytes differ from those that were saved. Readers never walk back silently."""
    lines = durable.faults(store.folder / str(step))
    if lines:
        others = ", ".join(map(str, store.steps()))
        raise UserError(
            f"the checkpoint of step {step} is damaged",
            where=str(store.folder / str(step)),
            why="\n  ".join(lines),
            hint=f"choose another with --step (available: {others}), or let `aurora resume RUN` walk back to one",
        )
    store.refuse_frozen_damage(step)
