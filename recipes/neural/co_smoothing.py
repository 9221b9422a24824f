"""Co-smoothing: the rates of units that are not seen, inferred from those that are, and scored in bits per spike."""

from __future__ import annotations

import hashlib

import numpy as np

from aurora_train.errors import UserError
from neural.spikes import Trials

FEWEST_COUNTS = 1e-4  # in a bin, the mean that is assumed of a unit that is almost or entirely silent
LEAST_RATE = 1e-9  # in place of a rate of 0, whose logarithm is not finite; the benchmark's value


def hold_out_units(identifier: str, unit_ids: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Columns of (held-in, held-out) units: of all, the given share with the smallest hash of (recording, id).

    Raises UserError unless there is at least one of each.
    """
    count = round(share * len(unit_ids))
    if not 0 < count < len(unit_ids):
        raise UserError(
            f"{count} of {len(unit_ids)} units of {identifier} would be held out", where="data.held_out_units",
            why="co-smoothing infers the rates of some units from those of others",
            hint="use more units, or another share",
        )  # fmt: skip
    hashes = [hashlib.sha256(f"{identifier}\0unit {int(unit)}".encode()).digest() for unit in unit_ids]
    order = sorted(range(len(unit_ids)), key=hashes.__getitem__)
    return np.sort(order[count:]), np.sort(order[:count])


def bits_per_spike(rates: np.ndarray, spikes: np.ndarray) -> float:
    """How much likelier than under each unit's mean the `spikes` [..., U] are under `rates`, in bits per spike.

    Rates are expected counts in a bin. (log2 L(rates) - log2 L(mean of each unit over these spikes)) / number of
    spikes, with L the Poisson likelihood (Pei et al. 2021); bins where spikes are nan do not count. Raises UserError if
    there is no spike.
    """
    measured = np.isfinite(spikes)
    counts, total = np.where(measured, spikes, 0.0), float(np.nansum(spikes))
    if total == 0:
        raise UserError("the held-out units have no spike in the held-out trials", where="data.held_out_units",
                        why="bits per spike are undefined", hint="hold out more units or more trials")  # fmt: skip
    axes = tuple(range(counts.ndim - 1))
    null = np.broadcast_to(counts.sum(axis=axes) / np.maximum(measured.sum(axis=axes), 1), counts.shape)
    gain = _log_likelihood(np.asarray(rates, np.float64), counts) - _log_likelihood(null, counts)
    return float(np.sum(gain, where=measured) / total / np.log(2))


def _log_likelihood(rates, counts):
    """Of each count, in nats, without log n!, which the difference of two models does not contain."""
    rates = np.where(rates == 0, LEAST_RATE, rates)
    return counts * np.log(rates) - rates


def rates_of_trials(predict, windows, progress, batch: int = 64) -> np.ndarray:
    """Rates of every bin of the windows' trials, float64[N, U], each from the window in which it is furthest inside."""
    span, rates = windows.window, None
    starts = _tiles(windows, span)
    depth = np.full(len(windows.trials.spikes), -1)
    inside = np.minimum(np.arange(span), np.arange(span)[::-1])
    for begin in range(0, len(starts), batch):
        # The last batch is padded with its last window, so that only one shape is compiled.
        wanted = starts[np.minimum(np.arange(begin, begin + batch), len(starts) - 1)]
        taken = windows.take(wanted)
        predicted = np.asarray(predict({"spikes": taken["spikes"], "weights": taken["weights"]}), np.float64)
        rates = np.zeros((len(depth), predicted.shape[-1])) if rates is None else rates
        for index, values in zip(wanted, predicted, strict=True):
            rows = np.arange(windows.first[index], min(windows.first[index] + span, windows.end[index]))
            deeper = inside[: len(rows)] > depth[rows]
            rates[rows[deeper]], depth[rows[deeper]] = values[: len(rows)][deeper], inside[: len(rows)][deeper]
        progress(min(begin + batch, len(starts)), len(starts), "inferring rates of held-out trials")
    return rates


def _tiles(windows, span: int) -> np.ndarray:
    """Indices of windows that cover each trial, half overlapping; the last one ends with its trial."""
    within = windows.first - windows.first[np.maximum.accumulate(np.where(windows.leads, np.arange(len(windows)), 0))]
    last = np.append(windows.leads[1:], True)
    return np.flatnonzero((within % max(span // 2, 1) == 0) | last)


def rate_plots(trials: Trials, rates, spikes, names, most_bins: int = 300, units: int = 2) -> list[dict]:
    """The inferred rate and the spikes of the `units` most active held-out units, in Hz, over the first trials."""
    whole = int(np.searchsorted(trials.offsets, most_bins, side="right")) - 1
    stop = int(trials.offsets[max(whole, 1)])
    times = [round(float(t), 4) for t in np.arange(stop) * trials.bin_s]
    plots = []
    for column in np.argsort(-spikes.sum(axis=0), kind="stable")[:units]:
        lines = {"spikes": spikes[:stop, column] / trials.bin_s, "inferred": rates[:stop, column] / trials.bin_s}
        plots.append({
            "title": f"Held-out unit {names[column]}: inferred rate and spikes, held-out trials end to end",
            "x_label": "seconds", "y_label": "Hz",
            "series": {name: (times, [float(f"{v:.4g}") for v in values]) for name, values in lines.items()},
        })  # fmt: skip
    return plots
