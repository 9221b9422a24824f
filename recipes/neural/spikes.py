"""Bins of a recording's spikes and behaviour, trials held out by hash, and windows of bins for a decoder.

Neither bins nor windows cross a trial's edge: no bin of a held-out trial is seen in training, not even as an input. Bin
t of a trial covers start + [t, t + 1) * bin; its velocity is the mean within the same bin.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from aurora_train.errors import UserError
from neural.nwb import Recording

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Trials:
    """Concatenated binned trials: rows offsets[k]:offsets[k + 1] are trial ids[k].

    Attributes:
        spikes: uint16[N, U] counts.
        velocity: float64[N, D] in `unit`; nan where the behaviour was not measured.
        uncovered: trials dropped because the behaviour does not cover them.
    """

    spikes: np.ndarray
    velocity: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    identifier: str
    bin_s: float
    unit: str
    uncovered: int = 0

    def split(self, name: str, held_out: float) -> Trials:
        """The trials of one split, by a hash of (recording, trial): more trials never move one to another split.

        `held_out` is the share of test trials; half as many are for validation.
        """
        edges = {"test": (0, held_out), "validation": (held_out, 1.5 * held_out), "train": (1.5 * held_out, 1)}
        low, high = edges[name]
        share = [_share(self.identifier, int(i)) for i in self.ids]
        kept = [k for k, at in enumerate(share) if low <= at < high]
        if not kept:
            raise UserError(
                f"no trial of {self.identifier} falls into the {name} split",
                where="data.held_out",
                why=f"{len(self.ids)} trials are divided by a hash of their ids, {held_out:g} of them for test",
                hint="use more trials or a larger share",
            )
        rows = np.concatenate([np.arange(self.offsets[k], self.offsets[k + 1]) for k in kept])
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[kept])])
        return Trials(
            self.spikes[rows], self.velocity[rows], offsets, self.ids[kept], self.identifier, self.bin_s, self.unit
        )


def _share(identifier: str, trial: int) -> float:
    digest = hashlib.sha256(f"{identifier}\0{trial}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def bin_trials(recording: Recording, bin_s: float, unit_ids: list[int] | None = None) -> Trials:
    """Count spikes and average the behaviour in bins of `bin_s` seconds, within trials.

    `unit_ids` selects units by their id in the file; None takes all. Raises UserError for an unknown unit, and if the
    behaviour covers fewer than half of the trials, which indicates two clocks.
    """
    columns = _columns(recording, unit_ids)
    times = recording.behavior_times
    covered = (recording.trial_start >= times[0] - bin_s) & (recording.trial_stop <= times[-1] + bin_s)
    bins = np.floor((recording.trial_stop - recording.trial_start) / bin_s + 1e-6).astype(int)
    kept = np.flatnonzero(covered & (bins > 0))
    if len(kept) * 2 < len(covered) or len(kept) == 0:
        raise UserError(
            f"the behaviour covers {int(covered.sum())} of {len(covered)} trials of {recording.identifier}",
            where="data.behavior",
            why=f"it was measured from {times[0]:.3f} to {times[-1]:.3f} s; the trials reach from "
            f"{recording.trial_start.min(initial=np.inf):.3f} to {recording.trial_stop.max(initial=-np.inf):.3f} s",
            hint="all times in the file must be seconds on one clock",
        )
    edges = [recording.trial_start[k] + np.arange(bins[k] + 1) * bin_s for k in kept]
    # The edges of all trials are concatenated: the difference across a seam is not a bin, so it is masked out.
    flat = np.concatenate(edges)
    inside = np.concatenate([np.arange(len(e)) < len(e) - 1 for e in edges])
    spikes = np.empty((int(inside.sum()), len(columns)), np.uint16)
    for column, unit in enumerate(columns):
        passed = np.searchsorted(recording.spike_times[unit], flat)
        spikes[:, column] = np.diff(passed, append=0)[inside]
    velocity = _binned_behavior(recording, flat, inside, bin_s)
    offsets = np.concatenate([[0], np.cumsum(bins[kept])])
    return Trials(
        spikes,
        velocity,
        offsets,
        recording.trial_ids[kept],
        recording.identifier,
        bin_s,
        recording.behavior_unit,
        uncovered=len(covered) - len(kept),
    )


def _columns(recording: Recording, unit_ids):
    if unit_ids is None:
        return list(range(len(recording.unit_ids)))
    place = {int(unit): k for k, unit in enumerate(recording.unit_ids)}
    unknown = [unit for unit in unit_ids if unit not in place]
    if unknown or not unit_ids:
        raise UserError(
            f"{recording.identifier} has no unit {unknown[0]}" if unknown else "the list of units is empty",
            where="data.units",
            hint=f"its {len(place)} units have ids from {min(place)} to {max(place)}",
        )
    return [place[unit] for unit in unit_ids]


def _binned_behavior(recording: Recording, flat, inside, bin_s):
    """The mean in each bin; behaviour with fewer than two samples per bin is interpolated at the bin's centre."""
    times, values = recording.behavior_times, recording.behavior
    period = float(np.median(np.diff(times)))
    if period <= bin_s / 2:
        passed = np.searchsorted(times, flat)
        sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(np.nan_to_num(values), axis=0)])
        bad = np.concatenate([[0], np.cumsum(~np.isfinite(values).all(axis=1))])
        count = np.diff(passed, append=0)[inside]
        unmeasured = (count == 0) | (np.diff(bad[passed], append=0)[inside] > 0)
        total = np.diff(sums[passed], axis=0, append=np.zeros((1, values.shape[1])))[inside]
        return np.where(unmeasured[:, None], np.nan, total / np.maximum(count, 1)[:, None])
    centres = flat[inside] + bin_s / 2
    after = np.clip(np.searchsorted(times, centres), 1, len(times) - 1)
    gap = times[after] - times[after - 1] > 3 * period
    columns = [np.interp(centres, times, column) for column in values.T]
    return np.where(gap[:, None], np.nan, np.stack(columns, axis=1))


@dataclass(frozen=True)
class Standard:
    """Mean and standard deviation per axis, float64[D], of the training trials."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Standard:
        finite = values[np.isfinite(values).all(axis=1)]
        return cls(finite.mean(axis=0), np.maximum(finite.std(axis=0), 1e-9))

    def apply(self, values):
        return (values - self.mean) / self.deviation

    def undo(self, values):
        return values * self.deviation + self.mean


class Windows:
    """A `Source` of windows of T consecutive bins, one for each place a window fits in a trial.

    A trial shorter than T gives one window, padded at its end with empty bins of weight 0. `take` returns
    spikes uint16[B, T, U], velocity float32[B, T, D] (standardised, 0 where unmeasured), weights float32[B, T].
    """

    def __init__(self, trials: Trials, window: int, standard: Standard):
        self.trials, self.window, self.standard = trials, window, standard
        lengths = np.diff(trials.offsets)
        places = np.maximum(lengths - window, 0) + 1
        trial = np.repeat(np.arange(len(lengths)), places)
        within = np.arange(places.sum()) - np.repeat(np.cumsum(places) - places, places)
        self.first = trials.offsets[trial] + within  # row of each window's first bin
        self.end = trials.offsets[trial + 1]  # one past its trial's last row
        self.leads = within == 0  # whether the window starts with its trial
        target = standard.apply(trials.velocity)
        self._measured = np.isfinite(target).all(axis=1)
        self._target = np.where(self._measured[:, None], target, 0).astype(np.float32)
        digest = hashlib.sha256(f"windows 1 {window} {trials.identifier}".encode())
        for array in (trials.spikes, self._target, self._measured, trials.offsets):
            digest.update(np.ascontiguousarray(array))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.first)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = self.first[indices][:, None] + np.arange(self.window)
        inside = rows < self.end[indices][:, None]
        rows = np.where(inside, rows, 0)
        return {
            "spikes": self.trials.spikes[rows] * inside[..., None].astype(np.uint16),
            "velocity": self._target[rows] * inside[..., None],
            "weights": (inside & self._measured[rows]).astype(np.float32),
        }

    def describe(self) -> dict:
        t = self.trials
        return {
            "source": t.identifier,
            "trials": len(t.ids),
            "bins": len(t.spikes),
            "units": t.spikes.shape[1],
            "windows": len(self),
            "bin_s": t.bin_s,
            "velocity_unit": t.unit,
        }


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


def lagged(spikes: np.ndarray, offsets: np.ndarray, lags: int) -> np.ndarray:
    """Each bin's last `lags` bins of `spikes` float[N, U], newest first: float[N, lags * U]; 0 before a trial starts.

    For standardised spikes, 0 is the training mean, the neutral guess for an unseen bin.
    """
    bins, units = spikes.shape
    age = np.arange(bins) - np.repeat(offsets[:-1], np.diff(offsets))
    design = np.zeros((bins, lags, units), spikes.dtype)
    for lag in range(lags):
        seen = np.flatnonzero(age >= lag)
        design[seen, lag] = spikes[seen - lag]
    return design.reshape(bins, lags * units)


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
