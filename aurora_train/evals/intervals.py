"""95 % intervals of what a score measures row by row. Needs only numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Z = 1.959964  # the 97.5 % quantile of the normal distribution
DRAWS = 2000  # resamples of a bootstrap: the error of a bound is about a fiftieth of the interval's width


def wilson(successes: float, number: int) -> tuple[float, float]:
    """The interval of a share, from how many of a number of rows succeeded; a tie may count half (Wilson 1927)."""
    if number < 1:
        return 0.0, 1.0
    share, spread = successes / number, Z * Z / number
    middle = (share + spread / 2) / (1 + spread)
    half = Z * np.sqrt(share * (1 - share) / number + spread / (4 * number)) / (1 + spread)
    return float(max(middle - half, 0.0)), float(min(middle + half, 1.0))


def bootstrap(sums, weights=None, *, seed: int = 0) -> tuple[float, float]:
    """The interval of sum(sums) / sum(weights) over rows that are drawn anew (Efron 1979, percentiles).

    Args:
        sums: float[N], what each row adds to the numerator, such as its loss; of two scores of the same rows, their
            difference, which pairs the rows.
        weights: float[N], what it adds to the denominator, such as its tokens; None: 1.
    """
    sums = np.asarray(sums, np.float64)
    weights = np.ones_like(sums) if weights is None else np.asarray(weights, np.float64)
    draws = np.random.default_rng(seed)
    # How often each row is drawn; one resample at a time, so that many rows do not fill the memory.
    counts = (np.bincount(draws.integers(0, len(sums), len(sums)), minlength=len(sums)) for _ in range(DRAWS))
    means = [(count @ sums) / max(count @ weights, 1e-12) for count in counts]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


class Measure(NamedTuple):
    """One number of a score by row: sum(sums) / sum(weights).

    Attributes:
        rows: int64[N], which held-out rows, to pair them with those of another score.
        sums, weights: float64[N].
        is_share: whether each row counts 1 and succeeds or fails (or half): then the interval is Wilson's.
    """

    rows: np.ndarray
    sums: np.ndarray
    weights: np.ndarray
    is_share: bool = False

    @classmethod
    def share(cls, rows, successes) -> Measure:
        """The share of rows that succeed."""
        return cls(np.asarray(rows), np.asarray(successes, np.float64), np.ones(len(rows)), True)

    @property
    def value(self) -> float:
        """The number itself."""
        return float(self.sums.sum() / max(self.weights.sum(), 1e-12))

    def interval(self) -> list[float]:
        """[low, high] at 95 %."""
        made = wilson(self.sums.sum(), len(self.rows)) if self.is_share else bootstrap(self.sums, self.weights)
        return [float(f"{bound:.4g}") for bound in made]

    def at(self, places: np.ndarray) -> Measure:
        """The same for some of the rows, by their places in `rows`."""
        return self._replace(rows=self.rows[places], sums=self.sums[places], weights=self.weights[places])


def interval_table(measures: dict[str, Measure]) -> dict:
    """A table of a score's numbers with their intervals, for the report."""
    rows = [[name, one.value, one.interval(), len(one.rows)] for name, one in measures.items()]
    return {"title": "With 95 % intervals", "columns": ["", "value", "95 %", "rows"], "rows": rows}


def comparison_table(before: dict[str, Measure], after: dict[str, Measure]) -> dict:
    """A table of two scores on the rows that both have read, with the intervals of both and of their difference.

    The difference's interval is a paired bootstrap: rows are drawn anew, each with its two results.
    """
    rows = []
    for name in (name for name in after if name in before):
        _, *places = np.intersect1d(before[name].rows, after[name].rows, return_indices=True)
        was, now = (one.at(at) for one, at in zip((before[name], after[name]), places, strict=True))
        # Both scores have the same weights, so that the difference of the sums is the sum of the differences.
        change = Measure(now.rows, now.sums - was.sums, now.weights)
        cells = [cell for one in (was, now, change) for cell in (one.value, one.interval())]
        rows.append([name, *cells, len(now.rows)])
    columns = ["", "before", "95 %", "after", "95 %", "difference", "95 %", "rows"]
    return {"title": "Before and after training, on the same held-out rows", "columns": columns, "rows": rows}
