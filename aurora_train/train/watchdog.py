"""A run that hangs ends by itself: every stack is written down, nothing suspect is saved, a supervisor may restart it.

A driver that stops answering, a network disk that stalls and a loader whose thread is gone look alike from inside:
nothing happens. How long nothing may happen is learned from the run: many times what that kind of work took before.
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

EXIT_HUNG = 76  # no progress within the budget; nothing was saved; the same command goes on from the newest checkpoint
FLOOR_SECONDS = 300.0  # no budget is shorter: a disk may spin up, a laptop may swap
FIRST_SECONDS = 3600.0  # of work that was not seen before
TIMES = 30.0  # what took a while may take this many times as long
_LOOK_EVERY_SECONDS = 1.0


class Budgets:
    """How long each kind of work may take: learned, or `fixed` seconds for every kind."""

    def __init__(self, fixed: float | None = None):
        self.fixed = fixed
        self._longest: dict[str, float] = {}

    def took(self, kind: str, seconds: float) -> None:
        """Work of a kind ended after so many seconds."""
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
        folder: of the run; `hang-<time>.txt` with all stacks goes there, and an event.
        fixed: seconds for every kind of work instead of learned ones.
        enabled: False watches nothing.
    """

    def __init__(self, folder: Path, events: Path, *, fixed: float | None = None, enabled: bool = True):
        self.folder, self.events, self.enabled = folder, events, enabled
        self.budgets = Budgets(fixed)
        self.step = 0  # the last one that is on record
        self._work: tuple[str, float, float] | None = None  # (kind, began, deadline) of time.monotonic()
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
        """Watch a stretch of work. Inside another one, that one's clock stands still and then starts anew.

        `learn` is False where a short stretch says nothing of how long that kind of work may take: the caller tells
        `budgets` what it took.
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
            if asleep > 2 * _LOOK_EVERY_SECONDS:  # the whole process was stopped (Ctrl-Z, a debugger, a starved box)
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
            # Not through the log's own handle: the thread that holds its lock may be the one that hangs.
            with open(self.events, "ab+") as handle:
                torn = handle.tell() and (handle.seek(-1, os.SEEK_END), handle.read(1))[1] != b"\n"
                handle.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
        except OSError:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        message = (
            f"\nhang: {kind} made no progress for {seconds:.0f} s; nothing was saved since the newest checkpoint\n"
            f"  every stack is in {stacks}\n  the same command goes on; train.watchdog=off does not watch\n"
        )
        os.write(2, message.encode())
        os._exit(EXIT_HUNG)
