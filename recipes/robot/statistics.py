"""The scale of each feature, from the frames of training episodes: what a policy is normalised with, kept as facts.

A LeRobot dataset brings statistics of its own, but its quantiles are means of the episodes' quantiles, and they count
the episodes that are held out. Therefore they are computed here.
"""

from __future__ import annotations

import numpy as np

from robot.episodes import Episodes

NAMES = ("mean", "std", "min", "max", "q01", "q99")
_PIXELS_AT_ONCE = 1 << 22


def of(episodes: Episodes, which: np.ndarray, features=None) -> dict[str, dict[str, np.ndarray]]:
    """{feature: {"mean", "std", "min", "max", "q01", "q99"}} of `features` (all) over the frames of episodes `which`.

    Each is float32[D] for a vector, and float32[3], of values divided by 255, for the colours of an image. The
    deviation is the population's, and 0 for an entry that never changes. Quantiles interpolate linearly between the
    sorted values (type 7 of Hyndman & Fan 1996, numpy's default).
    """
    rows = episodes.rows(which)
    found = {}
    for name in features or episodes.arrays:
        array = episodes.feature(name)
        found[name] = _of_images(array, rows) if array.dtype == np.uint8 else _of_vectors(array[rows])
    return found


def _of_vectors(values: np.ndarray) -> dict[str, np.ndarray]:
    values = values.astype(np.float64).reshape(len(values), -1)
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    numbers = (values.mean(0), values.std(0), values.min(0), values.max(0), low, high)
    return {name: number.astype(np.float32) for name, number in zip(NAMES, numbers, strict=True)}


def _of_images(images: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Exact, from how often each of the 256 values occurs: images need not fit into memory."""
    counts = level_counts(images, rows)
    levels, total = np.arange(256) / 255, counts[0].sum()
    mean = counts @ levels / total
    spread = np.sqrt((counts * (levels - mean[:, None]) ** 2).sum(1) / total)
    places = np.cumsum(counts, axis=1)

    def quantile(share: float) -> np.ndarray:
        place = share * (total - 1)
        below, above = (np.array([levels[np.searchsorted(c, at, side="right")] for c in places])
                        for at in (np.floor(place), np.ceil(place)))  # fmt: skip
        return below + (place % 1) * (above - below)

    numbers = (mean, spread, quantile(0), quantile(1), quantile(0.01), quantile(0.99))
    return {name: number.astype(np.float32) for name, number in zip(NAMES, numbers, strict=True)}


def level_counts(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """int64[3, 256]: how often each colour has each of the 256 values, in the images uint8[N, H, W, 3] at `rows`."""
    counts, at_once = np.zeros((3, 256), np.int64), max(_PIXELS_AT_ONCE // int(np.prod(images.shape[1:3])), 1)
    for k in range(0, len(rows), at_once):
        pixels = images[rows[k : k + at_once]].reshape(-1, 3)
        counts += np.stack([np.bincount(pixels[:, colour], minlength=256) for colour in range(3)])
    return counts
