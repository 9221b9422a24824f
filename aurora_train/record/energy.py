"""Measured energy in joules, from the counters of NVIDIA GPUs and of the processor package. Nothing is estimated.

A machine without a readable counter is "not measured". A counter includes everything on the device, not only this run.
"""

from __future__ import annotations

from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since the meter was created, by source.

    Sources: "gpu" (NVML's total energy, summed over devices; needs the package `pynvml`) and "processor" (RAPL
    package domains, which Linux lets only root read on most machines). Call `read` at least every few minutes:
    RAPL counters wrap around.
    """

    def __init__(self, powercap: Path = _POWERCAP):
        self._counters = [*_gpu_counters(), *_rapl_counters(powercap)]
        self._last = [counter.read() for counter in self._counters]
        self._joules: dict[str, float] = {counter.source: 0.0 for counter in self._counters}

    def read(self) -> dict[str, float] | None:
        """{"gpu": joules, "processor": joules}, or None if nothing can be measured."""
        for index, counter in enumerate(self._counters):
            now = counter.read()
            spent = now - self._last[index]
            self._joules[counter.source] += spent if spent >= 0 else spent + counter.wraps_at
            self._last[index] = now
        return dict(self._joules) or None

    def total_joules(self) -> float | None:
        """Joules of all sources together; None if nothing can be measured."""
        spent = self.read()
        return None if spent is None else sum(spent.values())

    def describe(self) -> str:
        """What is measured, in words."""
        return ", ".join(counter.name for counter in self._counters) or "not measured: no readable energy counter"


class _Rapl:
    source = "processor"

    def __init__(self, folder: Path):
        self.name = f"RAPL {(folder / 'name').read_text().strip()}"
        self._file = folder / "energy_uj"
        self.wraps_at = int((folder / "max_energy_range_uj").read_text()) / 1e6

    def read(self) -> float:
        return int(self._file.read_text()) / 1e6


class _Nvml:
    source = "gpu"
    wraps_at = 0.0  # 64 bits of millijoules

    def __init__(self, pynvml, index: int):
        self._pynvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
        self.name = f"NVML GPU {index}"
        self.read()

    def read(self) -> float:
        return self._pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


def _rapl_counters(powercap: Path) -> list[_Rapl]:
    """Package domains ("intel-rapl:0", also on AMD) without their subdomains, which would be counted twice."""
    counters = []
    for folder in sorted(powercap.glob("intel-rapl:[0-9]*")):
        if folder.name.count(":") != 1:
            continue
        try:
            counter = _Rapl(folder)
            counter.read()
        except OSError:  # no permission: this domain is not measured, and `describe` does not claim it
            continue
        counters.append(counter)
    return counters


def _gpu_counters() -> list[_Nvml]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        devices = range(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return []
    counters = []
    for index in devices:
        try:
            counters.append(_Nvml(pynvml, index))
        except pynvml.NVMLError:  # "not supported" on some unified-memory machines with older drivers
            continue
    return counters
