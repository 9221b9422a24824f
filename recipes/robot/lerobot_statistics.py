"""The statistics that a LeRobot dataset brings: of each episode, and of all, defined as release 0.4 and 0.6 do.

They are written so that the library finds what it would have computed; our own training uses `robot.statistics`. Two
things are otherwise here: sums are float64, and the deviation of images is that of the pixels, where release 0.4 adds
up squares that wrapped around in uint8 (fixed in lerobot's pull request 3697).
"""

from __future__ import annotations

import numpy as np

from robot.statistics import level_counts

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_BINS = 5000


def of_episode(values: np.ndarray) -> dict[str, np.ndarray]:
    """min, max, mean, std, count and quantiles of one feature of one episode.

    [D] arrays for float or int [T, D], where a column [T] counts as D = 1; [3, 1, 1] arrays of values in 0..1 for
    uint8[T, H, W, 3]. `count` is int64[1], the frames.
    """
    count = {"count": np.array([len(values)], np.int64)}
    if values.dtype == np.uint8:
        counts, levels = level_counts(values, np.arange(len(values))), np.arange(256)
        found = _joined([_of(levels[one > 0], one[one > 0]) for one in counts])
        return {name: (value / 255).reshape(3, 1, 1) for name, value in found.items()} | count
    columns = values.reshape(len(values), -1).T
    return _joined([_of(column, np.ones(len(column), np.int64)) for column in columns]) | count


def _joined(entries: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.array([one[name] for one in entries]) for name in entries[0]}


def _of(values: np.ndarray, counts: np.ndarray) -> dict:
    """The numbers of one entry of a vector, from the values that it has and how often."""
    wide = values.astype(np.float64)
    mean = np.average(wide, weights=counts)
    spread = np.sqrt(np.average((wide - mean) ** 2, weights=counts))
    return {"min": values.min(), "max": values.max(), "mean": mean, "std": spread} | _quantiles(values, counts)


def _quantiles(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """From a histogram of 5000 bins, linear within a bin: what the library has instead of the sorted values."""
    edges = np.linspace(values.min() - 1e-10, values.max() + 1e-10, _BINS + 1)
    places = np.cumsum(np.histogram(values, edges, weights=counts)[0])
    found = {}
    for name, share in QUANTILES.items():
        wanted = share * counts.sum()
        k = int(np.searchsorted(places, wanted))
        before = places[k - 1] if k else wanted
        inside = places[k] - before
        found[name] = edges[k] + ((wanted - before) / inside if inside else 0.0) * (edges[k + 1] - edges[k])
    return found


def of_all(episodes: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One feature's statistics of the dataset from those of its episodes; quantiles are means weighted by frames."""
    stacked = {name: np.stack([one[name] for one in episodes]) for name in episodes[0]}
    count = stacked.pop("count")
    weights = (count / count.sum()).reshape(-1, *[1] * (stacked["mean"].ndim - 1))
    mean = (stacked["mean"] * weights).sum(0)
    spread = ((stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2) * weights).sum(0)
    found = {"min": stacked["min"].min(0), "max": stacked["max"].max(0), "mean": mean, "std": np.sqrt(spread),
             "count": count.sum(0)}  # fmt: skip
    return found | {name: (stacked[name] * weights).sum(0) for name in QUANTILES}
