"""Measured energy in joules: from the counters of NVIDIA GPUs and of the processor package, or from a wall plug.

Nothing is estimated. Each source says how it measures, what it covers and how far off its sampling can be; a machine
without a readable source is "not measured". A source includes everything on what it covers, not only this run.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from aurora_train.errors import UserError
from aurora_train.machine import nvml

COMMAND = "command:"  # how a plug's setting begins that is no file
GPU, PROCESSOR, BOX = "GPU", "processor package", "box"  # what a source may cover

_POWERCAP = Path("/sys/class/powercap")
_POWER_SECONDS, _COUNTER_SECONDS, _PLUG_SECONDS = 0.1, 0.5, 1.0  # between two readings
_PLUG_TIMEOUT = 5.0  # seconds; what takes longer is no reading
TICK_SECONDS = 1.0  # between two calls of what else is done in the meter's thread
_GAP = 10.0  # readings of power further apart than this many periods are not joined: what was between is unknown
_FAILED = 3  # readings in a row that fail before it is said
_MOST_WATTS = 3000.0  # of one GPU; a counter that seems to have gone faster did not wrap, it began again
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")


class Unreadable(Exception):
    """A source did not give a number this time."""


class Source:
    """One meter. `joules` since it was made, after `sample` has been called at least every `period_s` seconds.

    `error_joules` bounds what sampling can have added or lost: for a counter its resolution at either end (how far it
    lags behind is not published); for power, integrated by trapezoids, half the change between two readings over their
    distance (exact for a power that moves in one direction between them). The device's own accuracy is not in it.
    `gap_s` seconds are not measured.
    """

    method = coverage = ""
    period_s = _COUNTER_SECONDS

    def __init__(self, name: str, read: Callable[[], float]):
        self.name, self._read, self.lock = name, read, threading.Lock()
        self.joules = self.error_joules = self.gap_s = 0.0
        self.failures = 0  # readings in a row
        self._last: tuple[float, float] | None = None
        self.sample(time.monotonic())
        if self._last is None:
            raise Unreadable(self.fault)

    fault = ""  # why the newest reading failed

    def sample(self, now: float) -> None:
        """Read it. `now` in seconds of any clock that goes evenly."""
        try:
            value = self._read()
        except (Unreadable, nvml.Refused, OSError, ValueError) as error:
            self.failures, self.fault = self.failures + 1, str(error) or type(error).__name__
            return
        if self._last is not None:
            self._add(*self._last, now, value)
        self._last, self.failures = (now, value), 0

    def restart(self, now: float) -> None:
        """Forget what was measured, and begin at `now`."""
        self.joules = self.error_joules = self.gap_s = 0.0
        self._last = None
        self.sample(now)

    def _add(self, before: float, old: float, now: float, new: float) -> None:
        raise NotImplementedError

    @property
    def read_at(self) -> float:
        """When the newest reading that succeeded was made, in seconds of the caller's clock."""
        return self._last[0] if self._last else 0.0

    def describe(self) -> dict:
        """JSON-able: what it is, what it covers, and what it has measured."""
        return {
            "name": self.name, "method": self.method, "coverage": self.coverage, "joules": round(self.joules, 3),
            "error_joules": float(f"{self.error_joules:.3g}"), "gap_seconds": round(self.gap_s, 1),
            **({"lost": self.fault} if self.failures >= _FAILED else {}),
        }  # fmt: skip


class Counter(Source):
    """A counter of joules. It wraps at one of `wraps_at`; else a smaller value means that it began again at 0."""

    def __init__(self, name, read, *, method: str, coverage: str, wraps_at: tuple[float, ...], resolution: float):
        self.method, self.coverage = method, coverage
        self._wraps_at, self._resolution = wraps_at, resolution
        super().__init__(name, read)

    def _add(self, before, old, now, new):
        spent = new - old
        if spent < 0:
            rounds = [new - old + top for top in self._wraps_at if old <= top]
            possible = [joules for joules in rounds if joules <= _MOST_WATTS * max(now - before, 1.0)]
            if possible:
                spent = min(possible)
            else:  # the driver was loaded again: what was used before that, since the last reading, is not known
                spent, self.gap_s = new, self.gap_s + now - before
        self.joules += spent
        self.error_joules = 2 * self._resolution


class Power(Source):
    """Readings of watts, integrated by trapezoids."""

    def __init__(self, name, read, *, method: str, coverage: str, period_s: float = _POWER_SECONDS):
        self.method, self.coverage, self.period_s = method, coverage, period_s
        super().__init__(name, read)

    def _add(self, before, old, now, new):
        if now - before > max(_GAP * self.period_s, 2.0):
            self.gap_s += now - before
            return
        self.joules += (old + new) / 2 * (now - before)
        self.error_joules += abs(new - old) / 2 * (now - before)


# ---- the sources of a machine


def sources(gpus, plug: str | None, powercap: Path = _POWERCAP) -> list[Source]:
    """Every source that can be read here, in the order of preference. UserError for a plug that gives no watts."""
    found = [source for gpu in gpus if (source := gpu_source(gpu)) is not None]
    return [*found, *_rapl(powercap), *([_plug(plug)] if plug else [])]


def gpu_source(gpu) -> Source | None:
    """The counter of a GPU's energy, else its power, integrated; None if it has neither."""
    try:
        # 64 bits of millijoules; some drivers keep 32 of them, which wrap after 1.2 kWh.
        return Counter(
            gpu.name, gpu.joules, method="NVML total energy", coverage=GPU, wraps_at=(2**32 / 1e3,), resolution=1e-3
        )
    except Unreadable:
        pass
    try:
        return Power(gpu.name, gpu.watts, method="NVML power, integrated", coverage=GPU)
    except Unreadable:
        return None


def _rapl(powercap: Path) -> list[Source]:
    """Package domains ("intel-rapl:0", also on AMD). Subdomains and `psys` overlap with them and are left out."""
    found = []
    for folder in sorted(powercap.glob("intel-rapl:[0-9]*")):
        try:
            label = (folder / "name").read_text().strip()
            if folder.name.count(":") != 1 or not label.startswith("package"):
                continue
            top = int((folder / "max_energy_range_uj").read_text()) / 1e6
            read = _file_reader(folder / "energy_uj", 1e-6)
            found.append(
                Counter(label, read, method="RAPL", coverage=PROCESSOR, wraps_at=(top,), resolution=61e-6)
            )  # 61 uJ: the coarsest unit of the register (Intel SDM, volume 3, RAPL)
        except (OSError, ValueError, Unreadable):  # mostly: Linux lets only root read it
            continue
    return found


def _file_reader(path: Path, scale: float) -> Callable[[], float]:
    return lambda: scale * int(path.read_text())


def _plug(setting: str) -> Source:
    command = setting.removeprefix(COMMAND).strip() if setting.startswith(COMMAND) else None

    def read() -> float:
        text = Path(setting).read_text() if command is None else _output(command)
        number = _NUMBER.search(text)
        if number is None or float(number[0]) < 0:
            raise Unreadable(f"it gave no watts but {text.strip()[:60]!r}")
        return float(number[0])

    try:
        return Power("plug", read, method="wall plug, power integrated", coverage=BOX, period_s=_PLUG_SECONDS)
    except Unreadable as error:
        raise UserError(
            f"the plug gives no reading: {error}", where="energy.plug",
            hint="a file, or `command:` and a command, that gives the watts as its first number, as in `86.5`",
        ) from None  # fmt: skip


def _output(command: str) -> str:
    try:
        ended = subprocess.run(
            shlex.split(command), capture_output=True, text=True, timeout=_PLUG_TIMEOUT, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise Unreadable(f"`{command}` took more than {_PLUG_TIMEOUT:.0f} s") from None
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or [""])[-1][:100]
        raise Unreadable(f"`{command}` ended with status {ended.returncode} {said}".strip())
    return ended.stdout


# ---- all of them together


class EnergyMeter:
    """The sources of a machine, read by threads of its own between `start` and `close`.

    `counted` are the sources whose sum is the total: none of them covers what another does.

    Args:
        found: the sources.
        each_time: called in the thread after its readings, about once a second.
        clock: seconds that go evenly.
    """

    def __init__(
        self, found: list[Source], each_time: Callable[[], None] = lambda: None, clock=time.monotonic
    ):
        self.sources, self._each_time, self._clock = found, each_time, clock
        for source in found:
            source.restart(clock())
        self.counted = [one for one in found if one.coverage == BOX] or found
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Read from now on. A plug has a thread of its own, because its command may take seconds."""
        for group in ([one for one in self.sources if one.coverage == BOX],
                      [one for one in self.sources if one.coverage != BOX]):  # fmt: skip
            if group:
                thread = threading.Thread(target=self._run, args=(group,), name="energy", daemon=True)
                self._threads.append(thread)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop reading, after a last time."""
        self._ended.set()
        running = bool(self._threads)
        for thread in self._threads:
            thread.join(_PLUG_TIMEOUT)
        self._threads = []
        if running:
            self.sample()

    def sample(self) -> None:
        """Read every source now."""
        self._sample(self.sources)

    def _sample(self, group: list[Source]) -> None:
        for source in group:
            with source.lock:
                source.sample(self._clock())

    def total_joules(self) -> float | None:
        """Joules so far; None if nothing is measured. A plug covers the rest: with one, only it counts."""
        return sum(source.joules for source in self.counted) if self.sources else None

    def now(self) -> tuple[float, float]:
        """(when the newest readings were made, in seconds of the clock; the total then)."""
        return max(source.read_at for source in self.counted), sum(source.joules for source in self.counted)

    def lost(self) -> list[Source]:
        """The counted sources that have given no reading for a while."""
        return [source for source in self.counted if source.failures >= _FAILED]

    def gpu_joules(self) -> float:
        """Joules of the GPUs alone."""
        return sum(source.joules for source in self.sources if source.coverage == GPU)

    def _run(self, group: list[Source]) -> None:
        period, last = min(source.period_s for source in group), 0.0
        leads = group[0] is self.sources[0]
        while not self._ended.wait(period):
            self._sample(group)
            if leads and not self._ended.is_set() and self._clock() - last >= TICK_SECONDS:
                last = self._clock()
                self._each_time()


def in_words(found: list[Source]) -> str:
    """What measures, and what it covers: "GPU 0 (NVML total energy)"; "not measured" if nothing does."""
    return ", ".join(f"{one.name} ({one.method})" for one in found) or "not measured"
