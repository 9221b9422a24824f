"""Ends a run that hangs: every stack is written to a file, nothing suspect is saved, and a supervisor may restart it.

A driver that stops answering, a network disk that stalls and a loader whose thread has died look alike from inside:
nothing happens. The run itself shows how long that may last: a multiple of what that kind of work took before.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

EXIT_HUNG = 76  # no progress within the budget; nothing was saved; the same command resumes
FLOOR_SECONDS = 300.0  # no budget is shorter: a disk may spin up, a laptop may swap
FIRST_SECONDS = 3600.0  # budget of a kind of work that was not seen before
TIMES = 30.0  # a budget as a multiple of the longest time so far
_LOOK_EVERY_SECONDS = 1.0


class Budgets:
    """The time that each kind of work may take: learned, or `fixed` seconds for every kind."""

    def __init__(self, fixed: float | None = None):
        self.fixed = fixed
        self._longest: dict[str, float] = {}

    def took(self, kind: str, seconds: float) -> None:
        """Record that work of a kind took so many seconds."""
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def of(self, kind: str) -> float:
        """Seconds that work of a kind may take from now."""
        if self.fixed is not None:
            return self.fixed
        longest = self._longest.get(kind)
        return FIRST_SECONDS if longest is None else max(FLOOR_SECONDS, TIMES * longest)


class Watchdog:
    """Context manager: inside it, work within `during(kind)` that exceeds its budget ends the process.

    Args:
        folder: the run's folder, in which `hang-<time>.txt` with all stacks is written.
        fixed: seconds for every kind of work instead of learned ones.
        enabled: False watches nothing.
    """

    def __init__(self, folder: Path, events: Path, *, fixed: float | None = None, enabled: bool = True):
        self.folder, self.events, self.enabled = folder, events, enabled
        self.budgets = Budgets(fixed)
        self.step = 0  # the last recorded step
        self._work: tuple[str, float, float] | None = None  # (kind, began, deadline) in time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.enabled:
            self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._work = None
        self._ended.set()

    @contextlib.contextmanager
    def during(self, kind: str, *, learn: bool = True):
        """Watch a stretch of work. Inside another one, the outer clock stops and then starts anew.

        `learn` is False if the length of a stretch says nothing about how long that kind of work may take: the caller
        then reports the time to `budgets` itself.
        """
        before, now = self._work, time.monotonic()
        self._work = (kind, now, now + self.budgets.of(kind))
        try:
            yield
            if learn:
                self.budgets.took(kind, time.monotonic() - now)
        finally:
            if before is not None:
                kind, now = before[0], time.monotonic()
                before = (kind, now, now + self.budgets.of(kind))
            self._work = before

    def _look(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(_LOOK_EVERY_SECONDS):
            now = time.monotonic()
            asleep, last, work = now - last - _LOOK_EVERY_SECONDS, now, self._work
            if work is None:
                continue
            kind, began, deadline = work
            if asleep > 2 * _LOOK_EVERY_SECONDS:  # the whole process was stopped (by Ctrl-Z, a debugger, high load)
                if self._work is work:
                    self._work = (kind, began, deadline + asleep)
            elif now > deadline:
                self._end(kind, now - began)

    def _end(self, kind: str, seconds: float) -> None:
        now = datetime.now(UTC)
        stacks = self.folder / f"hang-{now:%Y%m%dT%H%M%S}.txt"
        try:
            with open(stacks, "w") as handle:
                handle.write(f"{kind}: no progress for {seconds:.0f} s\n\n")
                handle.flush()
                faulthandler.dump_traceback(handle, all_threads=True)
            record = {
                "event": "hang", "step": self.step, "time": now.isoformat(timespec="milliseconds"), "doing": kind,
                "seconds": round(seconds, 1), "stacks": stacks.name,
            }  # fmt: skip
            # Written without the log's own handle, because the hanging thread may hold its lock.
            with open(self.events, "ab+") as handle:
                torn = handle.tell() and (handle.seek(-1, os.SEEK_END), handle.read(1))[1] != b"\n"
                handle.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
        except OSError:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        message = (
            f"\nhang: {kind} made no progress for {seconds:.0f} s; nothing was saved since the newest checkpoint\n"
            f"  every stack is in {stacks}\n  the same command resumes; train.watchdog=off disables this check\n"
        )
        os.write(2, message.encode())
        os._exit(EXIT_HUNG)
