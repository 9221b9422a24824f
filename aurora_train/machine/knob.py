"""The knob by which a machine's GPUs trade speed for power: a power cap, or a lock of their clock where there is none.

A knob belongs to the machine and outlives the process that turned it. So before each turn a small journal in the cache
folder says what was set before, and its lock is held for as long as the process lives. Whoever finds a journal whose
lock is free (`restore_left`) sets the GPU back. Nothing here imports jax.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path

from aurora_train.files import cache_folder, make_folder, write_json
from aurora_train.machine import nvml

POWER_CAP, CLOCK_LOCK = "power cap", "clock lock"
UNITS = {POWER_CAP: "W", CLOCK_LOCK: "MHz"}
_LOWEST_CLOCK = 0.4  # of the highest: below it a GPU gains nothing in energy a token, and idles in watts
_SAME_WATTS = 0.5  # a driver may round the cap that it is given


class _Held:
    """The knob of one GPU, held by this process. `low` and `high` bound what `turn` takes, in the kind's unit."""

    def __init__(self, gpu: nvml.Gpu, kind: str, low: float, high: float, lock: int):
        self.gpu, self.kind, self.low, self.high, self._lock = gpu, kind, low, high, lock
        self._left: dict = {}  # the journal, which is kept here too: a cache may be emptied while a run lives
        self._file = _journal(gpu.uuid)

    def turn(self, value: float) -> None:
        """Set it. The journal is on the disk before the GPU is changed."""
        newest = self._left.get("set", [])[-1:]
        left = {"boot": _boot(), "gpu": self.gpu.uuid, "kind": self.kind, "before": self.high, "set": [*newest, value]}
        write_json(self._file, left)
        self._left = left
        _turn(self.gpu, self.kind, value)

    def release(self) -> None:
        """Set the GPU back, and let go of it."""
        try:
            if self._left:
                _restore(self.gpu, self._left)
                self._file.unlink(missing_ok=True)
        finally:
            os.close(self._lock)


class Knob:
    """The knobs of all GPUs of a run, turned together: 1 is as found, 0 the lowest. Raises `nvml.Refused`,
    and UserError for a journal that cannot be written."""

    def __init__(self, held: list[_Held]):
        self._held, self.kind = held, held[0].kind
        self.share = 1.0

    def set(self, share: float) -> None:
        """Turn every GPU to a share of its range."""
        self.share = share
        for one in self._held:
            one.turn(one.low + share * (one.high - one.low))

    def share_of(self, value: float) -> float:
        """The share at which the first GPU has a value; below 0 or above 1 outside of its range."""
        one = self._held[0]
        return (value - one.low) / (one.high - one.low)

    def share_of_draw(self):
        """For a power cap, the function from what all GPUs draw together to the share that caps them there."""
        return None if self.kind == CLOCK_LOCK else lambda watts: self.share_of(watts / len(self._held))

    def value(self, share: float) -> str:
        """A share in words, for the first GPU: "150 W"."""
        one = self._held[0]
        return f"{one.low + share * (one.high - one.low):.0f} {UNITS[self.kind]}"

    @property
    def range(self) -> str:
        return f"{self.value(0)} to {self.value(1)}"

    def release(self) -> None:
        """Set everything back. A GPU that is gone cannot be; its journal stays, for the next start."""
        for one in self._held:
            with contextlib.suppress(nvml.Refused, OSError):
                one.release()


def hold(gpus: list[nvml.Gpu]) -> tuple[Knob | None, str]:
    """(the knob of these GPUs, held by this process; what it is) or (None, why there is none)."""
    if not gpus:
        return None, "there is no GPU with a knob"
    held: list[_Held] = []
    why = ""
    for gpu in gpus:
        one, why = _hold_one(gpu)
        if one is None or (held and one.kind != held[0].kind):
            break
        held.append(one)
    if len(held) == len(gpus):
        knob = Knob(held)
        return knob, f"{knob.kind}, {knob.range}"
    for one in held:
        one.release()
    return None, why or "the GPUs have knobs of different kinds"


def range_of(gpu: nvml.Gpu) -> tuple[str, float, float]:
    """(kind, lowest, as found) of a GPU's knob. `Refused` if it has none."""
    try:
        (least, _), now = gpu.cap_range_watts(), gpu.cap_watts()
        if least < now - _SAME_WATTS:
            return POWER_CAP, least, now
    except nvml.Refused as fault:
        if fault.lost:
            raise
    most = gpu.most_mhz()
    return CLOCK_LOCK, _LOWEST_CLOCK * most, most


def _hold_one(gpu: nvml.Gpu) -> tuple[_Held | None, str]:
    try:
        lock = _lock(gpu.uuid)
    except OSError as error:
        return None, f"its journal cannot be kept: {error}"
    if lock is None:
        return None, f"another run holds the knob of {gpu.name}"
    held, why = _held_under(lock, gpu)
    if held is None:
        os.close(lock)
    return held, why


def _held_under(lock: int, gpu: nvml.Gpu) -> tuple[_Held | None, str]:
    file = _journal(gpu.uuid)
    if file.exists():  # its run has died since the last look, or it could not be set back then
        said = _restore_file(file, {gpu.uuid: gpu}, None)
        if file.exists():
            return None, said or "an earlier run's journal cannot be removed"
    try:
        kind, low, high = range_of(gpu)
    except nvml.Refused as fault:
        return None, f"{gpu.name} has neither a power cap nor a clock lock ({fault})"
    try:  # an order that changes nothing shows whether orders are taken
        gpu.set_cap(high) if kind == POWER_CAP else gpu.unlock_clock()
    except nvml.Refused as fault:
        needs = "setting it needs root, as for nvidia-smi -pl" if fault.permission else str(fault)
        return None, f"{gpu.name} has a {kind}, but {needs}"
    return _Held(gpu, kind, low, high, lock), ""


def restore_left() -> list[str]:
    """Set back what processes that are gone have left; one line for each GPU that was changed or could not be."""
    said, found = [], sorted(_folder().glob("*.json")) if _folder().is_dir() else []
    if not found:
        return []
    gpus, why = nvml.gpus(all_of_them=True)
    for file in found:
        try:
            lock = _lock(file.stem)
        except OSError as error:
            said.append(f"a knob of {file.stem} was left behind and cannot be set back: {error}")
            continue
        if lock is None:  # its run is alive
            continue
        try:
            if line := _restore_file(file, {gpu.uuid: gpu for gpu in gpus}, why):
                said.append(line)
        finally:
            os.close(lock)
    return said


def _restore_file(file: Path, gpus: dict[str, nvml.Gpu], why: str | None) -> str | None:
    try:
        left = json.loads(file.read_text())
    except (OSError, ValueError):  # another process has just set it back
        return None
    gpu, line = gpus.get(left["gpu"]), None
    try:
        if left["boot"] == _boot():  # a driver that starts anew starts with its own settings
            if gpu is None:
                raise nvml.Refused(why or "it is gone")
            line = _restore(gpu, left)
        file.unlink()
    except (nvml.Refused, OSError) as fault:  # mostly: another user's, who was root
        name = left["gpu"] if gpu is None else gpu.name
        return line or f"the {left['kind']} of {name} was left behind and cannot be set back: {fault}"
    return line


def _restore(gpu: nvml.Gpu, left: dict) -> str | None:
    """Set one GPU back, unless somebody else has set it since. What was done, in words; None for nothing."""
    if left["kind"] == CLOCK_LOCK:
        gpu.unlock_clock()
        return f"the clock of {gpu.name} is the driver's again"
    now = gpu.cap_watts()
    if abs(now - left["before"]) <= _SAME_WATTS:
        return None
    if all(abs(now - ours) > _SAME_WATTS for ours in left["set"]):
        return f"the power cap of {gpu.name} is {now:.0f} W, which no run of ours has set: it stays"
    gpu.set_cap(left["before"])
    return f"the power cap of {gpu.name} is {left['before']:.0f} W again; a run that is gone had left {now:.0f} W"


def _turn(gpu: nvml.Gpu, kind: str, value: float) -> None:
    gpu.set_cap(value) if kind == POWER_CAP else gpu.lock_clock(value)


def _folder() -> Path:
    return cache_folder() / "knobs"


def _journal(uuid: str) -> Path:
    return _folder() / f"{uuid}.json"


def _lock(uuid: str) -> int | None:
    """An open, locked file for a GPU; None if another process holds it. The kernel lets go of it when this one dies."""
    make_folder(_folder())
    handle = os.open(_folder() / f"{uuid}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
