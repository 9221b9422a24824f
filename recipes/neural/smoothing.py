"""The baseline of co-smoothing: held-in spikes smoothed by a Gaussian, and a Poisson regression on the held-out units.

It is the simplest baseline of the benchmark ("Smoothing", Pei et al. 2021); its width and penalty are those with the
best score on the validation trials.
"""

from __future__ import annotations

import numpy as np

from neural.co_smoothing import bits_per_spike

WIDTHS_S = (0.05, 0.08, 0.12)
PENALTIES = (1000.0, 300.0, 3000.0)  # the first one is used while the width is chosen


def smoothing_baseline(trials: dict, held_in, held_out, progress) -> tuple[float, dict]:
    """Bits per spike on the test trials, and a table of what was tried. `trials`: a `Trials` for each split."""
    from functools import partial

    fits, weights, fit = {}, None, partial(_fit, trials, held_in, held_out)
    for done, width in enumerate(WIDTHS_S):
        progress(done, len(WIDTHS_S) + len(PENALTIES) - 1, "fitting smoothing")
        fits[width, PENALTIES[0]] = fit(width, PENALTIES[0], weights)
        weights = fits[width, PENALTIES[0]][2]
    best_width = max(fits, key=lambda pair: fits[pair][0])[0]
    for penalty in PENALTIES[1:]:
        fits[best_width, penalty] = fit(best_width, penalty, fits[best_width, PENALTIES[0]][2])
    best = max(fits, key=lambda pair: fits[pair][0])
    progress(len(fits), len(fits), "smoothing")
    table = {
        "title": "Gaussian smoothing and Poisson regression, in bits per spike; the best on validation counts",
        "columns": ["width_ms", "penalty", "validation", "test"],
        "rows": [[1000 * width, penalty, score, test] for (width, penalty), (score, test, _) in fits.items()],
    }
    return fits[best][1], table


def _fit(trials, held_in, held_out, width_s, penalty, start) -> tuple[float, float, np.ndarray]:
    """(bits per spike on validation, on test, weights)."""
    sets = {name: _design(part, held_in, width_s) for name, part in trials.items()}
    mean, deviation = sets["train"].mean(axis=0), np.maximum(sets["train"].std(axis=0), 1e-9)
    mean[-1], deviation[-1] = 0, 1  # the column of ones
    sets = {name: (design - mean) / deviation for name, design in sets.items()}
    counts = {name: part.spikes[:, held_out].astype(np.float64) for name, part in trials.items()}
    weights = poisson_regression(sets["train"], counts["train"], penalty, start)
    scores = [bits_per_spike(np.exp(sets[name] @ weights), counts[name]) for name in ("validation", "test")]
    return *scores, weights


def _design(trials, held_in, width_s):
    smoothed = smooth(trials.spikes[:, held_in].astype(np.float64), trials.offsets, width_s / trials.bin_s)
    return np.concatenate([smoothed, np.ones((len(smoothed), 1))], axis=1)


def smooth(values: np.ndarray, offsets: np.ndarray, deviation_bins: float) -> np.ndarray:
    """float64[N, U] smoothed by a Gaussian within each trial; its weights are those of the bins that exist."""
    from scipy.ndimage import gaussian_filter1d

    def run(part):
        return gaussian_filter1d(part, deviation_bins, axis=0, mode="constant", truncate=4.0)

    out = np.empty_like(values)
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        out[begin:end] = run(values[begin:end]) / run(np.ones((end - begin, 1)))
    return out


def gaussian_weights(length: int, deviation_bins: float) -> tuple[np.ndarray, float]:
    """Weights float32[T, T] of a Gaussian about each bin; the factor that gives a mean of white noise variance 1."""
    bins = np.arange(length)
    weights = np.exp(-0.5 * ((bins[:, None] - bins) / deviation_bins) ** 2)
    middle = weights[length // 2]
    return weights.astype(np.float32), float(middle.sum() / np.sqrt((middle**2).sum()))


def poisson_regression(design, counts, penalty: float, start=None, iterations: int = 50) -> np.ndarray:
    """Weights [F, O] of a log-linear Poisson model for each column of `counts` [N, O], by Newton's method.

    Minimises sum(exp(x w) - y x w) + penalty / 2 |w|^2 for each column, without a penalty on the last weight, that of a
    column of ones. A step that does not lower it is halved.
    """
    free = np.append(np.full(design.shape[1] - 1, penalty), 0.0)
    if start is None:
        start = np.zeros((design.shape[1], counts.shape[1]))
        start[-1] = np.log(np.maximum(counts.mean(axis=0), 1e-6))

    def objective(column, weights):
        drive = np.minimum(design @ weights, 50.0)
        return np.sum(np.exp(drive) - counts[:, column] * drive) + 0.5 * np.sum(free * weights**2)

    out = start.copy()
    for column in range(counts.shape[1]):
        weights, value = out[:, column], objective(column, out[:, column])
        for _ in range(iterations):
            rates = np.exp(np.minimum(design @ weights, 50.0))
            gradient = design.T @ (rates - counts[:, column]) + free * weights
            hessian = design.T @ (design * rates[:, None]) + np.diag(free + 1e-9)
            step, scale = np.linalg.solve(hessian, gradient), 1.0
            while (new := objective(column, weights - scale * step)) > value and scale > 1e-4:
                scale /= 2
            if new > value:
                break
            weights, gained, value = weights - scale * step, value - new, new
            if gained < 1e-7 * max(abs(value), 1.0):
                break
        out[:, column] = weights
    return out
