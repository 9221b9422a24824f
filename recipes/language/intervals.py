"""95 % intervals of what a score measures row by row. Needs only numpy."""

from __future__ import annotations

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
