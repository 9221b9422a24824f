"""Rates that are true: counted between two moments at which the device had really finished.

A step that was dispatched is not a step that was done. So the clock is read only at log points, after the caller
has brought a value of that step to the host, and the first interval starts after the first step, so that it
holds no compilation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Throughput:
    """Tokens per second, MFU, HFU and share of time waiting for data, between log points.

    Args:
        flops_per_token: training FLOPs (forward and backward) for one real target, or None where unknown.
        peak_flops: dense FLOP/s of all devices together for `train.precision`, or None where unknown.
        step_flops: FLOPs of the products of one step as it is run, recomputation included, or None where unknown.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        step_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._flops_per_token, self._peak_flops, self._step_flops = flops_per_token, peak_flops, step_flops
        self._clock = clock
        self._start = self._last = None
        self._tokens = self._steps = 0
        self._waited = 0.0

    def begin(self) -> None:
        """The first step of this process is done (its loss is on the host): time counts from here."""
        self._start = self._last = self._clock()
        self._tokens, self._steps, self._waited = 0, 0, 0.0

    def count(self, tokens: float) -> None:
        """`tokens` real targets of one step done since `begin`."""
        self._tokens += tokens
        self._steps += 1

    def waited(self, seconds: float) -> None:
        """The device stood still for up to `seconds` because no batch was ready."""
        self._waited += seconds

    def excluding(self) -> _Excluded:
        """Context manager around what is not training (a save that blocks, an evaluation): its time is left out."""
        return _Excluded(self)

    def measure(self) -> dict:
        """At a log point, with the last counted step's values on the host: the interval's rates; starts a new one.

        Returns {"tokens_per_s", "mfu", "hfu", "data_wait", "seconds"}; a rate that is not known yet is None.
        """
        if self._start is None:
            return {"tokens_per_s": None, "mfu": None, "hfu": None, "data_wait": None, "seconds": 0.0}
        now = self._clock()
        elapsed = now - self._last
        rate = self._tokens / elapsed if elapsed > 0 and self._tokens else None
        rates = {
            "tokens_per_s": rate,
            "mfu": self._of_peak(rate, self._flops_per_token),
            "hfu": self._of_peak(rate and self._steps / elapsed, self._step_flops),
            "data_wait": min(self._waited / elapsed, 1.0) if rate is not None else None,
            "seconds": now - self._start,
        }
        self._last, self._tokens, self._steps, self._waited = now, 0, 0, 0.0
        return rates

    def _of_peak(self, rate: float | None, flops: float | None) -> float | None:
        return rate * flops / self._peak_flops if rate and flops and self._peak_flops else None


class _Excluded:
    def __init__(self, throughput: Throughput):
        self._throughput = throughput

    def __enter__(self):
        self._since = self._throughput._clock()

    def __exit__(self, *exc):
        if self._throughput._last is not None:
            self._throughput._last += self._throughput._clock() - self._since


class TimeLeft:
    """Seconds left from an exponential average of the seconds each unit of work took.

    The average forgets with a time constant of `memory_s` seconds, whatever the spacing of the updates, so that a
    burst of fast updates does not erase what was learnt before.
    """

    def __init__(self, total: float | None, memory_s: float = 60.0, clock: Callable[[], float] = time.perf_counter):
        self.total, self._memory_s, self._clock = total, memory_s, clock
        self._done = self._time = self._seconds_per_unit = None
        self._weight = 0.0

    def update(self, done: float) -> None:
        now = self._clock()
        if self._done is None or done < self._done:
            self._done, self._time = done, now
            return
        elapsed, units = now - self._time, done - self._done
        if units <= 0 or elapsed <= 0:
            return
        keep = self._weight * math.exp(-elapsed / self._memory_s)
        gain = 1 - math.exp(-elapsed / self._memory_s)
        before = self._seconds_per_unit or 0.0
        self._seconds_per_unit = (keep * before + gain * elapsed / units) / (keep + gain)
        self._weight = keep + gain
        self._done, self._time = done, now

    def skip(self) -> None:
        """What has passed since the last update was not work of this kind (an evaluation): leave it out."""
        if self._time is not None:
            self._time = self._clock()

    def seconds(self) -> float | None:
        """None until two updates have been seen, or where the total is not known."""
        if self._seconds_per_unit is None or self.total is None:
            return None
        return max(self.total - self._done, 0) * self._seconds_per_unit
