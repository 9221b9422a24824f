"""True rates: measured between two moments at which the device had finished its work.

A dispatched step is not a finished step. Therefore the clock is read only at log points, after the caller has copied a
value of that step to the host, and the first interval starts after the first step, so that it includes no compilation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import contextmanager


class Throughput:
    """Tokens per second, MFU, HFU and share of time waiting for data, between log points.

    Args:
        flops_per_token: training FLOPs (forward and backward) for one real target, or None if unknown.
        peak_flops: dense FLOP/s of all devices together for `train.precision`, or None if unknown.
        step_flops: FLOPs of the products that one step executes, recomputation included, or None if unknown.
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
        """Start the clock. Call it when the first step of this process is done (its loss is on the host)."""
        self._start = self._last = self._clock()
        self._tokens, self._steps, self._waited = 0, 0, 0.0

    def count(self, tokens: float) -> None:
        """Count one finished step with `tokens` real targets."""
        self._tokens += tokens
        self._steps += 1

    def waited(self, seconds: float) -> None:
        """Count up to `seconds` in which the device was idle because no batch was ready."""
        self._waited += seconds

    @contextmanager
    def excluding(self):
        """Exclude the time spent in this context on what is not training (a save that blocks, an evaluation)."""
        since = self._clock()
        try:
            yield
        finally:
            if self._last is not None:
                self._last += self._clock() - since

    def measure(self) -> dict:
        """The rates of the interval since the last call; starts a new one. The last counted step's values must be on
        the host.

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


class TimeLeft:
    """Estimates the seconds left from an exponential average of the seconds per unit of work.

    The average has a time constant of `memory_s` seconds, independent of the spacing of updates, so that a burst of
    fast updates does not erase earlier measurements.
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
        """Exclude the time since the last update, which was spent on something else (an evaluation)."""
        if self._time is not None:
            self._time = self._clock()

    def seconds(self) -> float | None:
        """The seconds left; None before two updates, or if the total is unknown."""
        if self._seconds_per_unit is None or self.total is None:
            return None
        return max(self.total - self._done, 0) * self._seconds_per_unit
