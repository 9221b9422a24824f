"""Counts of answers, and how long they took: percentiles while a server runs, and at its end."""

from __future__ import annotations

import threading
from collections import Counter, deque

import numpy as np

from aurora_train.units import counted

_KEPT = 1_000_000  # the newest answers, of which the percentiles are


class Latencies:
    """What a server has answered. Its methods may be called from any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._seconds: deque[float] = deque(maxlen=_KEPT)
        self.answers, self.refused, self.warnings = 0, 0, Counter()

    def answered(self, seconds: float) -> None:
        """An answer, and the time from the whole request to its answer, ready to be sent."""
        with self._lock:
            self.answers += 1
            self._seconds.append(seconds)

    def refused_one(self) -> None:
        """A request that was answered with an error."""
        with self._lock:
            self.refused += 1

    def warned(self, kind: str) -> bool:
        """A warning beside an answer; whether it is the first of its kind."""
        with self._lock:
            self.warnings[kind] += 1
            return self.warnings[kind] == 1

    def summary(self) -> dict:
        """{"answers", "refused", "warnings"}, and of the answers, if any, "latency_ms_p50" and "latency_ms_p99"."""
        with self._lock:
            seconds = np.array(self._seconds)
            counts = {"answers": self.answers, "refused": self.refused, "warnings": dict(self.warnings)}
        if not len(seconds):
            return counts
        p50, p99 = np.percentile(1000 * seconds, (50, 99))
        return counts | {"latency_ms_p50": float(p50), "latency_ms_p99": float(p99)}

    def line(self) -> str:
        """The summary as one line."""
        found = self.summary()
        times = "" if "latency_ms_p50" not in found else (
            f"; latency p50 {found['latency_ms_p50']:.2f} ms, p99 {found['latency_ms_p99']:.2f} ms")  # fmt: skip
        warned = f", {counted(sum(found['warnings'].values()), 'warning')}" if found["warnings"] else ""
        answers, refused = counted(found["answers"], "answer"), counted(found["refused"], "request")
        return f"{answers}, {refused} refused{warned}{times}"
