"""Names a straggler: in a run of several processes each step takes as long as the slowest of them.

All processes see the same step time, so each measures what is its own: the seconds that a step waited for its data, and
how fast its device multiplies. Every quarter of a minute they are sent to process 0, which compares each with the
median of the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from aurora_train.machine import processes
from aurora_train.units import decimal

_TIMES = 1.5  # slower than the others' median, twice in a row: a straggler
_SHARE = 0.1  # of a step: less waiting for data is not worth a word
_EVERY_SECONDS = 15.0
_PROBE_WIDTH = 1024
_DATA, _DEVICE = "waits for its data", "multiplies"


class Pace:
    """Measures this process; in process 0 also compares all. Does nothing in a single process."""

    def __init__(self):
        self.active = processes.count() > 1
        self._waited, self._steps, self._since = 0.0, 0, time.perf_counter()
        self._known: dict[int, dict] = {}
        self._suspects: dict[tuple[int, str], int] = {}
        processes.on("pace", lambda process, message: self._known.update({process: message}))

    def waited(self, seconds: float) -> None:
        """Count the seconds for which one step waited for this process's batch."""
        self._waited += seconds
        self._steps += 1

    def due(self) -> bool:
        """Whether it is time to report; the caller then waits until the device is idle."""
        return self.active and self._steps > 0 and time.perf_counter() - self._since > _EVERY_SECONDS

    def report(self, say: Callable, step: int) -> None:
        """Send this process's figures; process 0 says who has become a straggler.

        `say(line, event, step, **fields)` prints and records. The device must be idle.
        """
        seconds = (time.perf_counter() - self._since) / self._steps
        mine = {"waited": self._waited / self._steps, "step": seconds, "product": _probe()}
        self._waited, self._steps, self._since = 0.0, 0, time.perf_counter()
        if not processes.leads():
            processes.tell("pace", **mine)
            return
        self._known[0] = mine
        if len(self._known) == processes.count():
            for process, what, seconds, others in self._newly_slow(stragglers(self._known)):
                name = processes.name(process)
                say(
                    f"straggler: {name} {what} {decimal(seconds)} s, the others {decimal(others)} s; "
                    "every step waits for it",
                    "straggler", step, process=name, what=what, seconds=seconds, others=others,
                )  # fmt: skip

    def _newly_slow(self, found: list[tuple[int, str, float, float]]) -> list:
        """Those that are slow for the second time in a row."""
        self._suspects = {key[:2]: self._suspects.get(key[:2], 0) + 1 for key in found}
        return [one for one in found if self._suspects[one[:2]] == 2]


def stragglers(known: dict[int, dict]) -> list[tuple[int, str, float, float]]:
    """(process, in what, its seconds, the median of the others' seconds) of each that is slower than the others.

    `known`: of each process the seconds per step that it "waited" for data, those of a "step", and of one "product".
    """
    found = []
    for process, mine in known.items():
        others = [one for number, one in known.items() if number != process]
        waited = statistics.median(one["waited"] for one in others)
        product = statistics.median(one["product"] for one in others)
        if mine["waited"] > _TIMES * waited and mine["waited"] - waited > _SHARE * mine["step"]:
            found.append((process, _DATA, mine["waited"], waited))
        if mine["product"] > _TIMES * product:
            found.append((process, _DEVICE, mine["product"], product))
    return found


def _probe() -> float:
    """Seconds of one product of two matrices on a device of this process: the best of three."""
    device = jax.local_devices()[0]
    dtype = jnp.bfloat16 if device.platform == "gpu" else jnp.float32
    x = jax.device_put(np.ones((_PROBE_WIDTH, _PROBE_WIDTH), dtype), device)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        jnp.dot(x, x).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times[1:])
