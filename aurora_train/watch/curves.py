"""The curves of one run in bounded memory: every number of its log goes into one of 512 cells of steps."""

from __future__ import annotations

from itertools import chain

import numpy as np

from aurora_train.record.metrics import scalars
from aurora_train.watch.log import Log, left

CELLS = 512
_MOST = 100  # series of one log
_NOT_DRAWN = ("step", "seconds", "data_step")  # `time` and `tokens` place the others


class Series:
    """One quantity over steps. A cell covers equally many steps, twice as many whenever the last cell is passed.

    `last`, `lowest` and `highest` are exact (step, value) of finite values, or None; `not_finite` counts the others.
    """

    def __init__(self):
        self.last = self.lowest = self.highest = None
        self.not_finite, self._width = 0, 1
        self._number, self._steps, self._sum = (np.zeros(CELLS) for _ in range(3))
        self._low, self._high = np.full(CELLS, np.inf), np.full(CELLS, -np.inf)

    def add(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Add values at steps, both float64[N]; steps are at least 0."""
        finite = np.isfinite(values)
        self.not_finite += int((~finite).sum())
        steps, values = steps[finite], values[finite]
        if not len(steps):
            return
        while steps.max() // self._width >= CELLS:
            self._fold()
        cells = (steps // self._width).astype(int)
        for held, weights in ((self._number, None), (self._steps, steps), (self._sum, values)):
            held += np.bincount(cells, weights, CELLS)
        np.minimum.at(self._low, cells, values)
        np.maximum.at(self._high, cells, values)
        self.last = (int(steps[-1]), float(values[-1]))
        for name, place, better in (("lowest", values.argmin(), min), ("highest", values.argmax(), max)):
            found, known = (int(steps[place]), float(values[place])), getattr(self, name)
            setattr(self, name, found if known is None else better(known, found, key=lambda one: one[1]))

    def _fold(self) -> None:
        for name, fold, rest in (("_number", np.add, 0.0), ("_steps", np.add, 0.0), ("_sum", np.add, 0.0),
                                 ("_low", np.minimum, np.inf), ("_high", np.maximum, -np.inf)):  # fmt: skip
            held = getattr(self, name)
            setattr(self, name, np.append(fold(held[::2], held[1::2]), np.full(CELLS // 2, rest)))
        self._width *= 2

    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(steps, means, lowest, highest) of the cells that hold values, float64[M] each."""
        full = self._number > 0
        number = self._number[full]
        return self._steps[full] / number, self._sum[full] / number, self._low[full], self._high[full]

    def summed(self) -> tuple[np.ndarray, np.ndarray]:
        """(steps, the sum of all values up to each), float64[M] each."""
        full = self._number > 0
        return self._steps[full] / self._number[full], np.cumsum(self._sum[full])


class Curves:
    """All numbers of a `metrics.jsonl` by name; those of evaluations as `evaluation/NAME`."""

    def __init__(self, log: Log):
        self.log, self.series = log, {}

    def read(self, deadline: float) -> bool:
        """Read on until a moment of `time.monotonic`. True if the log is read to its end."""
        if self.log.is_another():
            self.series = {}
        while left(deadline) and (records := self.log.next()) is not None:
            self._take(records)
        return not self.log.behind

    @property
    def share(self) -> float:
        """How much of the log is read, from 0 to 1."""
        return self.log.done / self.log.size if self.log.size else 1.0

    def _take(self, records: list[dict]) -> None:
        records = [record for record in records if _is_step(record.get("step"))]
        nested = [{"step": record["step"], **scalars(record)} for record in records if "evaluation" in record]
        plain = [record for record in records if "evaluation" not in record]
        for part in (plain, nested):
            for name in dict.fromkeys(chain.from_iterable(part)):
                if name not in _NOT_DRAWN:
                    self._add(name, [(r["step"], r[name]) for r in part if _is_number(r.get(name))])

    def _add(self, name: str, pairs: list[tuple[float, float]]) -> None:
        if pairs and (name in self.series or len(self.series) < _MOST):
            steps, values = np.array(pairs, float).T
            self.series.setdefault(name, Series()).add(steps, values)

    def known(self, name: str) -> Series | None:
        """The series of this name that has finite values."""
        found = self.series.get(name)
        return found if found is not None and found.last is not None else None

    def placed(self, steps: np.ndarray, by: str) -> np.ndarray:
        """Places of steps on another axis, float64[N]: "step"; "hours" since the first record that has a time, pauses
        included; or "targets" trained on. NaN where that is not known."""
        if by == "hours" and (time := self.known("time")):
            at, value, _, _ = time.points()
            return np.interp(steps, at, (value - value[0]) / 3600)
        if by == "targets" and (tokens := self.known("tokens")):
            at, value = tokens.summed()
            return np.interp(steps, at, value)
        return steps if by == "step" else np.full(len(steps), np.nan)


def _is_step(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_number(value) -> bool:
    return isinstance(value, float) or isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 1000
