"""The GPUs of this process in NVIDIA's management library (NVML): their energy, power, temperature and limits.

It is called through its own bindings (the package nvidia-ml-py, module `pynvml`). What a device does not support, what
needs root and a device that is gone all end in a `Refused`, which says which of these it was.
"""

from __future__ import annotations

import importlib.util
import os

INSTALL = "pip install 'aurora_train[energy]'"


class Refused(Exception):
    """NVML did not answer a query or took no order. `permission` and `lost` say why, where that matters."""

    def __init__(self, text: str, *, permission: bool = False, lost: bool = False):
        super().__init__(text)
        self.permission, self.lost = permission, lost


def _call(name: str, *arguments):
    """One function of the bindings; `Refused` for its errors."""
    import pynvml

    try:
        return getattr(pynvml, name)(*arguments)
    except pynvml.NVMLError as error:
        raise Refused(
            str(error), permission=error.value == pynvml.NVML_ERROR_NO_PERMISSION,
            lost=error.value in (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_GPU_NOT_FOUND),
        ) from None  # fmt: skip


class Gpu:
    """One GPU. Every method raises `Refused`."""

    def __init__(self, index: int):
        self.index, self._handle = index, _call("nvmlDeviceGetHandleByIndex", index)
        self.uuid: str = _call("nvmlDeviceGetUUID", self._handle)
        self.kind: str = _call("nvmlDeviceGetName", self._handle)
        self.name = f"GPU {index}"

    def joules(self) -> float:
        """Energy since the driver was loaded."""
        return _call("nvmlDeviceGetTotalEnergyConsumption", self._handle) / 1e3

    def watts(self) -> float:
        """Power now; since Ampere (but for GA100) the mean of the last second (NVML's reference)."""
        return _call("nvmlDeviceGetPowerUsage", self._handle) / 1e3

    def headroom_celsius(self) -> float:
        """Degrees below the temperature at which the GPU slows itself down."""
        import pynvml

        limit = _call("nvmlDeviceGetTemperatureThreshold", self._handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
        return limit - _call("nvmlDeviceGetTemperature", self._handle, pynvml.NVML_TEMPERATURE_GPU)

    def cap_watts(self) -> float:
        """The power cap that is set."""
        return _call("nvmlDeviceGetPowerManagementLimit", self._handle) / 1e3

    def cap_range_watts(self) -> tuple[float, float]:
        """The lowest and the highest cap that the GPU takes."""
        least, most = _call("nvmlDeviceGetPowerManagementLimitConstraints", self._handle)
        return least / 1e3, most / 1e3

    def set_cap(self, watts: float) -> None:
        """Cap the power. Needs root."""
        _call("nvmlDeviceSetPowerManagementLimit", self._handle, round(1e3 * watts))

    def most_mhz(self) -> float:
        """The highest clock of the multiprocessors."""
        import pynvml

        return _call("nvmlDeviceGetMaxClockInfo", self._handle, pynvml.NVML_CLOCK_GRAPHICS)

    def lock_clock(self, mhz: float) -> None:
        """Keep the clock of the multiprocessors at this value. Needs root."""
        _call("nvmlDeviceSetGpuLockedClocks", self._handle, round(mhz), round(mhz))

    def unlock_clock(self) -> None:
        """Leave the clock to the driver. Needs root."""
        _call("nvmlDeviceResetGpuLockedClocks", self._handle)


def gpus(*, all_of_them: bool = False) -> tuple[list[Gpu], str | None]:
    """(the GPUs that this process may use, by CUDA_VISIBLE_DEVICES; why there are none or fewer, if so)."""
    if importlib.util.find_spec("pynvml") is None:
        return [], f"an NVIDIA GPU is measured by the package nvidia-ml-py, which is not installed: {INSTALL}"
    try:
        _call("nvmlInit")
        found = [Gpu(index) for index in range(_call("nvmlDeviceGetCount"))]
    except Refused as fault:
        return [], f"NVML finds no GPU ({fault})"
    return (found, None) if all_of_them else _visible(found)


def _visible(found: list[Gpu]) -> tuple[list[Gpu], str | None]:
    """As CUDA reads the variable: indices or the beginnings of UUIDs, up to the first that names nothing."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return found, None
    words = [word.strip() for word in text.split(",") if word.strip()]
    by_number = any(word.isdecimal() for word in words)
    if by_number and len({gpu.kind for gpu in found}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return [], "GPUs of several kinds have other numbers in CUDA than in NVML: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
    chosen: list[Gpu] = []
    for word in words:
        named = [gpu for gpu in found if word == str(gpu.index) or word[:4] == "GPU-" and gpu.uuid.startswith(word)]
        if len(named) != 1:
            reason = "a MIG slice has no meter of its own" if word.startswith("MIG-") else f"no GPU is `{word}`"
            return chosen, f"{reason} (CUDA_VISIBLE_DEVICES)"
        chosen += named
    return chosen, None if chosen else "CUDA_VISIBLE_DEVICES names no GPU"
