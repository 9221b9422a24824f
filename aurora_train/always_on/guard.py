"""Keeps the machine usable: if processor and device share memory and it runs short, the run saves and stops.

A machine that runs out of memory does not refuse allocations: it stalls for minutes with everything on it, until the
kernel kills a process. So the run stops while a save still fits. A thread reads how much is left; the loop asks once
per step, and waits for running steps only after a low reading, because what counts is the memory left between steps.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import psutil

from aurora_train.checkpoint import durable, frozen
from aurora_train.errors import UserError
from aurora_train.machine.holders import NOTHING_BYTES, Holders
from aurora_train.machine.memory import (
    HostMemory,
    give_back_freed,
    host_memory,
    memory_pressure,
    process_memory,
)
from aurora_train.machine.profile import this_machine
from aurora_train.plan.account import save_bytes, sharded_bytes, trained_bytes
from aurora_train.units import size

EXIT_LOW_MEMORY = 77  # short of memory: saved and stopped; the same command continues
LOW_MEMORY = "low memory"  # the first line of the reason for such a stop

_LOOK_SECONDS, _LOOK_SECONDS_NEAR = 0.5, 0.1  # between readings; near: less than twice what is needed is left
_LOOKS_BACK = 20  # readings that show how fast other programs grow
_SETTLED_STEPS = 3  # after so many steps a run's memory no longer grows
# The assumed duration of a save until one is measured: meanwhile other programs keep growing. Their growth counts up to
# a share of memory, because most programs that grow fast soon stop.
_SAVE_SECONDS, _SAVED_PER_SECOND, _GROWTH_SHARE = 2.0, 250e6, 1 / 4
_FLOOR_SHARE, _FLOOR_BYTES = 0.02, 128 * 2**20  # memory that must be left beside a save
# A machine that swaps still has memory, but stalls. Percent of the last ten seconds; share of memory.
_STALLED, _SCARCE = 25.0, 1 / 8


class Guard:
    """Context manager around the steps: inside it, `asked` returns when and why to stop.

    Args:
        save_bytes: the memory that a save takes; 0 if another process saves.
        written_bytes: how much a save writes; by default as much.
        saving: whether a save is under way, so that its copy of the state is already there.
        in_place: whether saves make no copy: one that is under way then holds no memory between two steps.
        later_bytes: `save_bytes` of the next save, asked for when one has ended; by default it stays.
        enabled: if False, never asks for a stop.
        root: the folder that holds /proc and /sys.
    """

    def __init__(
        self,
        save_bytes: int,
        written_bytes: int | None = None,
        *,
        saving: Callable[[], bool] = lambda: False,
        in_place: bool = False,
        later_bytes: Callable[[], int] | None = None,
        enabled: bool = True,
        root: Path = Path("/"),
    ):
        self.why: str | None = None  # the reason for the stop, once it was requested
        self._enabled, self._root, self._saving = enabled, root, saving
        self._in_place, self._later_bytes = in_place, later_bytes
        if not enabled:
            return
        memory = host_memory(root)
        self._floor = _floor(memory)
        self._take_in(save_bytes)
        written = save_bytes if written_bytes is None else written_bytes
        self._save_seconds, self._saving_since = _SAVE_SECONDS + written / _SAVED_PER_SECOND, None
        self._lowest = math.inf  # fewest bytes left since the last reading between two steps
        self._stalled = 0.0  # percent of the time, if the machine swaps
        self._near = False  # whether to read more often, and between two steps
        self._given_back = False  # whether memory was returned to the system the last time
        self._lock = threading.Lock()
        self._beside: deque = deque(maxlen=_LOOKS_BACK)  # (time, bytes not held by other programs)
        self._decided, self._asked = -math.inf, math.inf  # last times, in time.monotonic()
        self._step_seconds = 0.0
        self._first = self._step = None
        self._before = Holders.now(root, None)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory guard", daemon=True)

    def __enter__(self) -> Guard:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._enabled:
            self._ended.set()

    def asked(self, step: int, settle: Callable[[], None]) -> str | None:
        """Between two steps: why the run must stop, in lines of which the first is LOW_MEMORY; None to continue.

        `settle` waits until every dispatched step is done; it is called only if memory is scarce.
        """
        if not self._enabled:
            return None
        if self._first is None:
            self._first = step
            self.look()
        self._step, before, self._asked = step, self._asked, time.monotonic()
        self._step_seconds = max(self._asked - before, 0.0)
        if self._near and self.why is None and self._asked >= self._decided + _LOOK_SECONDS:
            self._decide(settle)
        return self.why

    # ---- the thread

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS_NEAR if self._near else _LOOK_SECONDS):
            with contextlib.suppress(OSError, psutil.Error):  # a process ended meanwhile
                self.look()

    def look(self) -> None:
        """Read what is left and, once after the first steps, which processes hold the rest."""
        memory = host_memory(self._root)
        with self._lock:
            self._lowest = min(self._lowest, memory.usable)
        self._beside.append((time.monotonic(), memory.usable + process_memory()["anonymous"]))
        self._stalled = self._stalls(memory)
        self._time_saves()
        ahead = self._grown_by(memory, self._until_next() + self._save_seconds)
        self._near = self._stalled > 0 or self._lowest - ahead < 2 * self._needed
        if self._before.step is None and self._step is not None and self._step >= self._first + _SETTLED_STEPS:
            self._before = Holders.now(self._root, self._step)

    def _take_in(self, save_bytes: int) -> None:
        self._needed = save_bytes + self._floor
        self._held_by_a_save = 0 if self._in_place else save_bytes

    def _time_saves(self) -> None:
        saving, since = self._saving(), self._saving_since
        if since is not None and not saving:
            self._save_seconds = max(time.monotonic() - since, _SAVE_SECONDS)
            if self._later_bytes is not None:  # the first save of a run also writes what is frozen
                self._take_in(self._later_bytes())
        self._saving_since = (since or time.monotonic()) if saving else None

    def _grown_by(self, memory: HostMemory, seconds: float) -> float:
        """Bytes by which other programs will have grown after `seconds`, at the rate of the last seconds."""
        return min(falling(list(self._beside)) * seconds, _GROWTH_SHARE * memory.size)

    def _stalls(self, memory: HostMemory) -> float:
        """Percent of the time that processes wait for memory, if it is scarce and swap fills; else 0."""
        grown = memory.swap_used - self._before.elsewhere["swap in use"] > self._floor
        full = memory.swap_total > 0 and memory.swap_free < memory.swap_total / 10
        if memory.usable > _SCARCE * memory.size or not (grown or full):
            return 0.0
        share = memory_pressure(self._root)
        return share if share >= _STALLED else 0.0

    # ---- the decision

    def _decide(self, settle: Callable[[], None]) -> None:
        settle()
        memory, within = self._from_here_on()
        self._stalled = self._stalls(memory)
        short = self._short(memory, within)
        hurried = self._given_back or self._stalled or falling(list(self._beside)) > NOTHING_BYTES
        self._given_back = short is not None and not hurried
        if self._given_back:
            # Garbage may hold the copy of the previous save, and glibc freed memory. Collecting may take a second.
            give_back_freed()
            memory, _ = self._from_here_on()
            short = self._short(memory, math.inf)
        self._decided = time.monotonic()
        if short is not None:
            grown = Holders.now(self._root, self._step).what_grew(self._before)
            self.why = f"{LOW_MEMORY}\n  {short}\n  {grown}"

    def _from_here_on(self) -> tuple[HostMemory, float]:
        """(memory now, fewest bytes left since the last call)."""
        memory = host_memory(self._root)
        with self._lock:
            within, self._lowest = self._lowest, memory.usable
        return memory, within

    def _until_next(self) -> float:
        """Seconds until no step is running again: a step is dispatched before the previous one has ended."""
        return max(2 * self._step_seconds, _LOOK_SECONDS)

    def _short(self, memory: HostMemory, within: float) -> str | None:
        """A description of the shortage, or None. `within`: bytes left at the worst moment of the previous steps.

        There must be enough left for the floor within the next step, and for a save and the floor until that save has
        ended, while other programs continue to grow at their rate.
        """
        if self._stalled:
            swap = f"{size(memory.swap_used)} of {size(memory.swap_total)} swap in use"
            return f"processes waited for memory in {self._stalled:.0f} % of the last ten seconds, {swap}"
        rate, until_next = falling(list(self._beside)), self._until_next()
        falls = f", falling by {size(rate)} a second" if rate > NOTHING_BYTES else ""
        if within - self._grown_by(memory, until_next) < self._floor:
            return f"{_of(within, memory)} left within a step{falls}, but {size(self._floor)} are needed"
        # The copy of a running save is freed before another one is made.
        left = memory.usable + (self._held_by_a_save if self._saving() else 0)
        if left - self._grown_by(memory, until_next + self._save_seconds) < self._needed:
            return f"{_of(memory.usable, memory)} left{falls}, a save needs {size(self._needed)}"
        return None


def falling(readings: list[tuple[float, float]]) -> float:
    """Bytes per second by which readings (seconds, bytes) fall, by thirds: a single drop does not count."""
    third = len(readings) // 3
    if third == 0:
        return 0.0
    parts = [readings[:third], readings[third : 2 * third], readings[2 * third : 3 * third]]
    means = [[sum(column) / third for column in zip(*part, strict=True)] for part in parts]
    (t0, first), (t1, second), (t2, last) = means
    return max(min((first - second) / (t1 - t0), (second - last) / (t2 - t1)), 0.0)


def guard_of(session, saving: Callable[[], bool]) -> Guard:
    """The guard of a session's run, as `memory.guard` sets it; `saving` as in Guard."""
    written, in_place = trained_bytes(session.blueprint.state), session.plan.saves_in_place
    return Guard(
        _save(session), written, saving=saving, in_place=in_place, later_bytes=lambda: _save(session),
        enabled=_wanted(session),
    )  # fmt: skip


def refuse_full(session) -> None:
    """UserError (status 77) if the state and a save of it do not fit in what is left, before anything is allocated."""
    if not _wanted(session):
        return
    state, places, memory = session.blueprint.state, session.blueprint.shardings, host_memory()
    needed = _save(session) + _floor(memory)
    if this_machine().unified or this_machine().device_memory_bytes is None:  # the state lies in this memory too
        needed += sharded_bytes(state, places) * session.mesh.local_mesh.devices.size
    if memory.usable < needed:
        raise _Full(
            f"too little memory is left to continue: {_of(memory.usable, memory)}",
            why=f"the state and a save of it take {size(needed)}; {Holders.now(Path('/'), None).who_holds()}",
            hint="close other programs, then run the same command again; memory.guard=off disables this check",
        )


class _Full(UserError):
    status = EXIT_LOW_MEMORY


def _wanted(session) -> bool:
    setting = session.config.memory.guard
    return setting == "on" or (setting == "auto" and this_machine().unified)


def _save(session) -> int:
    """Bytes of memory that a save by this process takes."""
    if session.run.follows:
        return 0
    state = session.blueprint.state
    if durable.is_sealed(session.run.checkpoints / frozen.FOLDER):
        state = state._replace(frozen={})
    return save_bytes(state, in_place=session.plan.saves_in_place)


def _floor(memory: HostMemory) -> int:
    return max(int(_FLOOR_SHARE * memory.size), _FLOOR_BYTES)


def _of(left: float, memory: HostMemory) -> str:
    return f"{size(max(left, 0))} of {size(memory.size)}" + (" (cgroup)" if memory.size < memory.total else "")
