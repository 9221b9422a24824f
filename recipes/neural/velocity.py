"""What is made of decoded velocity: the decoding of held-out trials, its score, its time, its picture."""

from __future__ import annotations

import time

import numpy as np

from neural.spikes import Trials


def decode(predict, windows, progress, batch: int = 256) -> np.ndarray:
    """Velocity of every bin of the windows' trials in its unit, float64[N, D], each decoded from its last T bins.

    A trial's first window gives its first T bins; every later bin comes from the window that ends with it.
    """
    velocity = np.full(windows.trials.velocity.shape, np.nan)
    last = windows.window - 1
    for start in range(0, len(windows), batch):
        # The last batch is padded with its last window, so that only one shape is compiled.
        wanted = np.minimum(np.arange(start, start + batch), len(windows) - 1)
        decoded = windows.standard.undo(np.asarray(predict({"spikes": windows.take(wanted)["spikes"]}), np.float64))
        for index, values in zip(wanted, decoded, strict=True):
            begin = 0 if windows.leads[index] else last
            rows = np.arange(windows.first[index] + begin, min(windows.first[index] + last + 1, windows.end[index]))
            velocity[rows] = values[begin : begin + len(rows)]
        progress(min(start + batch, len(windows)), len(windows), "decoding held-out trials")
    return velocity


def latency(predict, windows, progress, bins: int = 300) -> dict:
    """Wall time of decoding one new bin given its history, batch 1, from counts on the host to velocity on the host."""
    spikes = windows.take(np.arange(min(bins, len(windows))))["spikes"]
    predict({"spikes": spikes[:1]})  # compiles
    took = []
    for n in range(bins):
        history = spikes[n % len(spikes)][None]
        before = time.perf_counter()
        np.asarray(predict({"spikes": history}))[0, -1]
        took.append(1000 * (time.perf_counter() - before))
    progress(bins, bins, "timing single bins")
    return {"latency_ms_p50": float(np.percentile(took, 50)), "latency_ms_p99": float(np.percentile(took, 99))}


def velocity_plots(trials: Trials, decoded: np.ndarray, most_bins: int = 400) -> list[dict]:
    """The true and the `decoded` velocity, float64[N, D], over the first trials of about `most_bins`, by axis.

    For the "plots" of a recipe's score; unmeasured bins are None.
    """
    whole = int(np.searchsorted(trials.offsets, most_bins, side="right")) - 1
    stop = int(trials.offsets[max(whole, 1)])
    times = [round(float(t), 4) for t in np.arange(stop) * trials.bin_s]
    plots = []
    for axis in range(trials.velocity.shape[1]):
        lines = {"true": trials.velocity[:stop, axis], "decoded": decoded[:stop, axis]}
        plots.append({
            "title": f"Velocity {'xyz'[axis] if axis < 3 else axis}, decoded and true, held-out trials end to end",
            "x_label": "seconds", "y_label": trials.unit,
            "series": {name: (times, [float(f"{v:.4g}") if np.isfinite(v) else None for v in values])
                       for name, values in lines.items()},
        })  # fmt: skip
    return plots


def r2(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, list[float]]:
    """Coefficient of determination of [N, D] values: (over all axes weighted by their variance, for each axis).

    1 - sum of squared errors / sum of squares about the mean, with sums over the bins of all trials; summing over axes
    before dividing gives the variance-weighted mean of the axes' values. Bins with a nan truth do not count.
    """
    measured = np.isfinite(truth).all(axis=1)
    truth, predicted = truth[measured].astype(np.float64), predicted[measured].astype(np.float64)
    errors = np.sum((truth - predicted) ** 2, axis=0)
    spread = np.sum((truth - truth.mean(axis=0)) ** 2, axis=0)
    return float(1 - errors.sum() / spread.sum()), [float(v) for v in 1 - errors / spread]


def scores(truth, decoded) -> dict[str, float]:
    """R2 of decoded velocity float64[N, D], over all axes ("r2") and of each ("r2_x", "r2_y", "r2_z")."""
    overall, by_axis = r2(truth, decoded)
    return {"r2": overall} | {f"r2_{axis}": value for axis, value in zip("xyz", by_axis, strict=False)}
