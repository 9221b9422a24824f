"""Ends a run that hangs: every stack is written to a file, nothing suspect is saved, and a supervisor may restart it.

A driver that stops answering, a network disk that stalls and a loader whose thread has died look alike from inside:
nothing happens. The run itself shows how long that may last: a multiple of what that kind of work took before.

Of several processes each has one. A step waits for the slowest of them, so whoever does something else (a save, a
score) says so to the others, whose clocks then start anew; and whoever finds a hang lets all of them write their
stacks, because only one of them shows the cause.
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

from aurora_train.machine import processes

EXIT_HUNG = 76  # no progress within the budget; nothing was saved; the same command resumes
FLOOR_SECONDS = 300.0  # no budget is shorter: a disk may spin up, a laptop may swap
FIRST_SECONDS = 3600.0  # budget of a kind of work that was not seen before
STEP = "a step"  # the kind of work in which processes wait for each other
TIMES = 30.0  # a budget as a multiple of the longest time so far
_LOOK_EVERY_SECONDS = 1.0
_SAY_EVERY_SECONDS = 10.0  # that this process does something that the others wait for


def append_event(events: Path, record: dict) -> None:
    """Append to an event log without its own handle, whose lock may be held by a thread that hangs."""
    with open(events, "ab+") as handle:
        torn = handle.tell() and (handle.seek(-1, os.SEEK_END), handle.read(1))[1] != b"\n"
        handle.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")


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
        folder: the run's folder, in which `hang-<time>.txt` with all stacks is written; `-process-<i>` is added where
            another process leads.
        events: the log that the leader writes.
        fixed: seconds for every kind of work instead of learned ones.
        enabled: False watches nothing.
    """

    def __init__(self, folder: Path, events: Path, *, fixed: float | None = None, enabled: bool = True):
        self.folder, self.events, self.enabled = folder, events, enabled
        self.budgets = Budgets(fixed)
        self.step = 0  # the last recorded step
        self._work: tuple[str, float, float] | None = None  # (kind, began, deadline) in time.monotonic()
        self._anew = 0.0  # when another process last said that it does what this one waits for
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.enabled:
            processes.on("busy", lambda process, message: self._start_anew())
            processes.on("hang", self._end_with)
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

    def _start_anew(self) -> None:
        """Give the current work its whole budget again: another process does what this one waits for."""
        self._anew = time.monotonic()  # `_work` is the main thread's to write

    def _look(self) -> None:
        last = said = time.monotonic()
        while not self._ended.wait(_LOOK_EVERY_SECONDS):
            now = time.monotonic()
            asleep, last, work = now - last - _LOOK_EVERY_SECONDS, now, self._work
            if work is None:
                continue
            kind, began, deadline = work
            deadline = max(deadline, self._anew + self.budgets.of(kind))
            if asleep > 2 * _LOOK_EVERY_SECONDS:  # the whole process was stopped (by Ctrl-Z, a debugger, high load)
                if self._work is work:
                    self._work = (kind, began, deadline + asleep)
            elif now > deadline:
                processes.tell("hang", doing=kind, seconds=now - began)
                self._end(kind, now - began, processes.name(processes.index()))
            elif kind != STEP and now - said > _SAY_EVERY_SECONDS:
                processes.tell("busy")
                said = now

    def _end_with(self, process: int, message: dict) -> None:
        """End this process because another one found a hang."""
        self._end(message["doing"], message["seconds"], processes.name(process))

    def _end(self, kind: str, seconds: float, found_by: str) -> None:
        now = datetime.now(UTC)
        of = "" if processes.leads() else f"-process-{processes.index()}"
        stacks = self.folder / f"hang-{now:%Y%m%dT%H%M%S}{of}.txt"
        by = f", says {found_by}" if processes.count() > 1 else ""
        try:
            with open(stacks, "w") as handle:
                handle.write(f"{kind}: no progress for {seconds:.0f} s\n\n")
                handle.flush()
                faulthandler.dump_traceback(handle, all_threads=True)
            record = {
                "event": "hang", "step": self.step, "time": now.isoformat(timespec="milliseconds"), "doing": kind,
                "seconds": round(seconds, 1), "stacks": stacks.name,
            }  # fmt: skip
            if processes.leads():
                append_event(self.events, record | ({"found_by": found_by} if by else {}))
        except OSError:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        message = (
            f"\nhang: {kind} made no progress for {seconds:.0f} s{by}; nothing was saved since the newest checkpoint\n"
            f"  every stack is in {stacks}\n  the same command resumes; train.watchdog=off disables this check\n"
        )
        os.write(2, message.encode())
        os._exit(EXIT_HUNG)


def watchdog_of(config, run) -> Watchdog:
    """The watchdog of this process of a run. The leader also records the name of a process that is lost."""
    setting = config.train.watchdog
    fixed = 60 * setting if isinstance(setting, int | float) else None
    watchdog = Watchdog(run.folder, run.events, fixed=fixed, enabled=setting != "off")

    def lost(who: str) -> None:
        if processes.leads():
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            append_event(run.events, {"event": "lost", "step": watchdog.step, "time": now, "process": who})

    processes.at_loss(lost)
    return watchdog
