"""The statistics that a LeRobot dataset brings: of each episode, and of all, defined as release 0.4 and 0.6 do.

They are written so that the library finds what it would have computed; our own training uses `robot.statistics`. Two
things are otherwise here: sums are float64, and the deviation of images is theirs, not that of squares that wrapped
around in uint8 (release 0.4; mended in lerobot's pull request 3697).
"""

from __future__ import annotations

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_BINS = 5000


def of_episode(values: np.ndarray) -> dict[str, np.ndarray]:
    """min, max, mean, std, count and quantiles of one feature of one episode.

    [D] arrays for float or int [T, D], where a column [T] counts as D = 1; [3, 1, 1] arrays of values in 0..1 for
    uint8[T, H, W, 3]. `count` is int64[1], the frames.
    """
    if values.dtype == np.uint8:
        found = _of(values.reshape(-1, values.shape[-1]))
        return {name: (value / 255).reshape(3, 1, 1) for name, value in found.items()} | _count(values)
    return _of(values.reshape(len(values), -1)) | _count(values)


def _count(values: np.ndarray) -> dict[str, np.ndarray]:
    return {"count": np.array([len(values)], np.int64)}


def _of(values: np.ndarray) -> dict[str, np.ndarray]:
    low, high = values.min(0), values.max(0)
    wide = values.astype(np.float64)
    quantiles = np.stack([_quantiles(column) for column in values.T], axis=1)
    return {"min": low, "max": high, "mean": wide.mean(0), "std": wide.std(0)} | dict(
        zip(QUANTILES, quantiles, strict=True)
    )


def _quantiles(values: np.ndarray) -> np.ndarray:
    """From a histogram of 5000 bins, linear within a bin: what the library has instead of the sorted values."""
    edges = np.linspace(values.min() - 1e-10, values.max() + 1e-10, _BINS + 1)
    counts = np.cumsum(np.histogram(values, edges)[0])
    found = []
    for share in QUANTILES.values():
        wanted = share * len(values)
        k = int(np.searchsorted(counts, wanted))
        if k == 0:
            found.append(edges[0])
            continue
        inside = counts[k] - counts[k - 1]
        part = (wanted - counts[k - 1]) / inside if inside else 0.0
        found.append(edges[k] + part * (edges[k + 1] - edges[k]))
    return np.array(found)


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
