"""Saves a run. If a save fails, training continues with a warning, and stops if saving fails for too long.

A disk that is full, read-only or failing is no reason to discard hours of steps that are still in memory. On a full
disk, older rolling checkpoints are deleted for the new one; if that is not enough or would not help, the save is
retried later, and training continues meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import time
from datetime import UTC, datetime

import jax

from aurora_train import facts, files
from aurora_train.checkpoint.store import SaveFailed
from aurora_train.errors import UserError
from aurora_train.train.evaluations import Judged
from aurora_train.train.oom import refused
from aurora_train.units import duration

EXIT_UNSAVED = 74  # EX_IOERR: saving failed for longer than the config allows; the newest checkpoint is intact
_RETRY_SECONDS = 30.0
_MEMORY = (
    "a save takes memory of the host beside the step: free some memory, then run the same command again; it continues "
    "from the newest checkpoint"
)


class Saver:
    """The saves of one loop, which begins at the saved step `last`.

    They are made as the plan says: a copy of the state is written in the background, or the state is written in place
    while training waits.
    """

    def __init__(self, session, process, metrics, voice, progress, *, last: int):
        self._store, self._folder = session.store, session.run.folder
        self._facts = facts.sha256(session.recipe.known)  # every checkpoint names it
        self._patience = 60 * session.config.checkpoint.patience_minutes  # seconds without being able to save
        self._watchdog, self._energy = process.watchdog, process.energy
        self._metrics, self._voice, self._progress = metrics, voice, progress
        self._in_place = session.plan.saves_in_place
        self._waited_s = 0.0  # how long training waited while the newest save was written in place
        self.last = last  # the newest step that is saved or being saved
        self._committed = last
        self._failing_since: float | None = None
        self._tried_at = 0.0
        self._scores: dict[int, Judged] = {}  # not attached yet

    @property
    def failing(self) -> bool:
        """Whether the newest save failed."""
        return self._failing_since is not None

    @property
    def under_way(self) -> bool:
        """Whether a save has not been committed yet. Unless it was made in place, it holds a copy of the state."""
        return self.last != self._committed and not self.failing

    def overdue(self) -> bool:
        """Whether saving has failed for longer than the config allows."""
        return self.failing and time.monotonic() - self._failing_since > self._patience

    def retry_due(self) -> bool:
        """Whether a failed save should be retried at the current step.

        Processes that save together do so only where a save is due: by their clocks, they would not agree.
        """
        return not self._store.writers.others and self.failing and time.monotonic() - self._tried_at > _RETRY_SECONDS

    def save(self, state, step: int) -> None:
        """Copy the state out and write it in the background, or write it in place; the previous save ends first."""
        self.finish()
        if step == self._committed:
            return  # this step was requested again while it was being saved
        self.last, self._tried_at = step, time.monotonic()
        saved = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"data_step": int(jax.device_get(state.data_step)), "saved": saved, "facts": self._facts}
        if (energy := self._energy.summary()) is not None:
            record["energy"] = energy
        for attempt in ("first", "with room made"):
            try:
                with refused(f"saving step {step}", _MEMORY), self._watchdog.during("a save", learn=False):
                    began = time.monotonic()
                    first = functools.partial(self._sync_records, step)
                    self._store.save(step, state, record, copy=not self._in_place, first=first)
                    self._waited_s = time.monotonic() - began
                return
            except SaveFailed as error:
                if attempt == "first" and self._make_room(step, error):
                    continue
                self._failed(step, error)
                return

    def finish(self, *, wait: bool = True) -> None:
        """Record the end of the background save; with `wait`, wait for it."""
        try:
            with refused("writing a checkpoint", _MEMORY), self._watchdog.during("a save", learn=False):
                step = self._store.wait() if wait else self._store.finished()
        except SaveFailed as error:
            if not self._make_room(self.last, error):
                self._failed(self.last, error)
            else:
                self._failing_since, self._tried_at = self._failing_since or time.monotonic(), 0.0
            return
        if step is None:
            return
        # Record the duration of the whole save, not the time we blocked: only a run's last save blocks from its start.
        self._watchdog.budgets.took("a save", time.monotonic() - self._tried_at)
        self._attach()
        given_up = []
        with contextlib.suppress(OSError, UserError):  # it is committed; the next save deletes what is left over
            given_up = self._store.retain()
        again = " again" if self.failing else ""
        how = f" in place: training waited {duration(self._waited_s)}" if self._in_place else ""
        waited = {"in_place_seconds": round(self._waited_s, 3)} if self._in_place else {}
        self._voice(f"saved step {step}{again}{how}", "save", step, given_up=given_up, **waited)
        self._committed, self._failing_since = step, None
        self._progress.alarm(None)

    def settle(self, state, step: int, asked) -> bool:
        """At the end of a run, save the state of this step, with retries. False if it cannot be saved.

        `asked` returns whether a stop was requested: then it does not wait for room.
        """
        while True:
            if step != self.last or self.failing:
                self.save(state, step)
            self.finish()
            if not self.failing:
                return True
            if self._store.writers.agreed(lambda: self._tried_at != 0.0 and (self.overdue() or bool(asked()))):
                return False
            if self._tried_at != 0.0:  # else room was made for another attempt
                time.sleep(min(_RETRY_SECONDS, 1 + self._patience / 10))

    def attach_score(self, step: int, score: Judged) -> None:
        """Attach the evaluation of a saved step, at once or when there is room."""
        if step == self.last or step in self._store.steps():
            self._scores[step] = score
            self._attach()

    def _sync_records(self, step: int) -> None:
        """Sync the records of steps up to this one, before its checkpoint counts."""
        try:
            self._metrics.sync()
            files.sync(self._folder)
        except (OSError, UserError) as error:
            fault = error if isinstance(error, OSError) else error.__cause__
            full = fault.errno in files.NO_SPACE
            raise SaveFailed(step, fault.strerror, self._metrics.path, needed=1 << 20, no_space=full) from error

    def _attach(self) -> None:
        for step in list(self._scores):
            try:
                score = self._scores[step]
                self._store.attach_score(step, score.value, lower_is_better=score.lower_is_better)
            except UserError:
                return  # retried with the next save
            del self._scores[step]

    def _make_room(self, step: int, error: SaveFailed) -> bool:
        given_up = self._store.make_room(error.needed) if error.no_space else []
        if given_up:
            listed = ", ".join(map(str, given_up))
            text = f"the disk is full: gave up the rolling checkpoints {listed} for step {step}"
            self._voice(text, "room", step, given_up=given_up, why=error.what)
        return bool(given_up)

    def _failed(self, step: int, error: SaveFailed) -> None:
        first = not self.failing
        self._failing_since = self._failing_since or time.monotonic()
        self._tried_at = time.monotonic()
        self._voice.record("save_failed", step, why=str(error), newest=self._committed)
        self._progress.alarm(f"NOT SAVED since step {self._committed}: {error.reason}")
        if first:
            self._voice(f"{error}\n  training continues; the save will be retried")
