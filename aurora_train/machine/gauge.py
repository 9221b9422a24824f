"""The memory that is live now and the most that a process has taken, on its devices or in its own memory."""

from __future__ import annotations

import jax

from aurora_train.machine.memory import device_memory, process_memory, process_memory_bytes


def live_bytes() -> dict[str, int]:
    """{"in_use", "peak", "limit"} of the fullest device in bytes; {"anonymous"} of the process if none reports them."""
    accounts = [account for device in jax.local_devices() if (account := device_memory(device))]
    if accounts:
        return max(accounts, key=lambda account: account["in_use"])
    return {"anonymous": process_memory()["anonymous"]}


class Gauge:
    """The memory that training takes in this process, from just before its state is made. Call it for a reading.

    A device records its own peak. On a CPU it is the peak of the process's anonymous memory minus what it held at the
    start. The kernel's high-water mark is exact once training has used more than compiling did; until then it is the
    highest reading.
    """

    def __init__(self):
        self._on_device = "anonymous" not in live_bytes()
        self._before = process_memory_bytes()
        self._mark = process_memory()["peak_resident"]
        self._highest = 0

    def __call__(self) -> int:
        """The `memory_bytes` of a record."""
        now = process_memory_bytes()
        self._highest = max(self._highest, now)
        return now

    def peak(self) -> int | None:
        """Bytes; None if the device's peak is older than this gauge (from an earlier plan in the same process)."""
        self()
        if self._on_device:
            return self._highest if self._highest > self._before else None
        memory = process_memory()
        if memory["peak_resident"] > self._mark:
            files = memory["resident"] - memory["anonymous"]
            self._highest = max(self._highest, memory["peak_resident"] - files)
        return max(self._highest - self._before, 0) or None
