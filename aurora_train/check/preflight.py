"""Checks before a run starts or continues: whether it can be written, whether a save has room, and the clock."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from datetime import UTC, datetime, timedelta

from aurora_train.checkpoint import durable, frozen
from aurora_train.checkpoint.store import MARGIN_BYTES
from aurora_train.errors import UserError
from aurora_train.files import NO_SPACE
from aurora_train.plan.account import trained_bytes, tree_bytes
from aurora_train.record.voice import Voice
from aurora_train.units import duration, size

_CLOCK_GRACE = timedelta(seconds=1)


def refuse_unwritable(run) -> None:
    """UserError if no file can be created in the run folder or in its checkpoints: a save would fail hours later.

    A full disk is not refused here, because older checkpoints may make room.
    """
    for folder in (run.folder, run.checkpoints):
        if not folder.is_dir():
            continue
        try:
            with contextlib.closing(tempfile.TemporaryFile(dir=folder)):
                pass
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise UserError(
                    f"cannot write the run folder: {error.strerror}", where=str(folder),
                    hint="fix its permissions or those of the mount, then run the same command again",
                ) from error  # fmt: skip


def refuse_no_room(session) -> None:
    """UserError if the disk has no room for one checkpoint, even after deletion of all that may be deleted."""
    run, store, state = session.run, session.store, session.blueprint.state
    if run.step() >= session.config.train.steps or run.follows:
        return  # everything is saved, or another process saves
    needed = trained_bytes(state) + MARGIN_BYTES
    if not durable.is_sealed(run.checkpoints / frozen.FOLDER):
        needed += tree_bytes(state.frozen)
    there = run.checkpoints if run.checkpoints.is_dir() else run.folder
    free = shutil.disk_usage(there).free
    spare = sum(durable.num_bytes(run.checkpoints / str(step)) for step in store.spare())
    if free + spare < needed:
        older = f" and older checkpoints hold {size(spare)}" if spare else ""
        raise UserError(
            "no room for a checkpoint", where=str(there),
            why=f"one takes {size(needed)}, {size(free)} are free{older}",
            hint="make room, or start on another disk with --run",
        )  # fmt: skip


def clock_behind(records: list[dict]) -> tuple[timedelta, datetime] | None:
    """(how far the clock is behind the newest of a run's records, that record's time); None if it is not behind."""
    times = [time for record in records if (time := _when(record.get("time"))) is not None]
    behind = max(times, default=datetime.min.replace(tzinfo=UTC)) - datetime.now(UTC)
    return (behind, max(times)) if behind > _CLOCK_GRACE else None


def _when(time) -> datetime | None:
    """The datetime of an event's ISO time or of a log step's seconds since 1970; None if it is neither."""
    try:
        return datetime.fromisoformat(time) if isinstance(time, str) else datetime.fromtimestamp(time, UTC)
    except (ValueError, TypeError, OverflowError, OSError):
        return None


def say_clock(behind, step: int, voice: Voice) -> None:
    """Record that the clock was set back. This is not refused, because nothing in a run is ordered by the clock."""
    if behind is None:
        return
    how_far, newest = behind
    voice(
        f"the clock is {duration(how_far.total_seconds())} before this run's newest record ({newest:%Y-%m-%d %H:%M:%S} "
        "UTC): recorded times will not be ascending; steps, saves and retention do not depend on it",
        "clock", step, behind_seconds=round(how_far.total_seconds(), 3), newest=newest.isoformat(),
    )  # fmt: skip
