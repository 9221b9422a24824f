"""Windows of bins for a model, which stay within their trial, and the scale of what it predicts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from neural.spikes import Trials


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
    spikes uint16[B, T, U], velocity float32[B, T, D] (standardised, 0 where unmeasured), weights float32[B, T]; without
    a `standard` there is no velocity, and each bin of a trial has weight 1.
    """

    def __init__(self, trials: Trials, window: int, standard: Standard | None = None):
        self.trials, self.window, self.standard = trials, window, standard
        lengths = np.diff(trials.offsets)
        places = np.maximum(lengths - window, 0) + 1
        trial = np.repeat(np.arange(len(lengths)), places)
        within = np.arange(places.sum()) - np.repeat(np.cumsum(places) - places, places)
        self.first = trials.offsets[trial] + within  # row of each window's first bin
        self.end = trials.offsets[trial + 1]  # one past its trial's last row
        self.leads = within == 0  # whether the window starts with its trial
        target = trials.velocity if standard is None else standard.apply(trials.velocity)
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
        velocity = {} if self.standard is None else {"velocity": self._target[rows] * inside[..., None]}
        return {
            "spikes": self.trials.spikes[rows] * inside[..., None].astype(np.uint16),
            **velocity,
            "weights": (inside & self._measured[rows]).astype(np.float32),
        }

    def reading(self, arrays: dict, indices: np.ndarray, rows: int) -> dict:
        """What `aurora inspect` says of a batch: the recording, and which trials the first windows are from."""
        t, facts = self.trials, self.describe()
        rates = t.spikes.mean(axis=0) / t.bin_s
        measured = "" if self.standard is None else f"; velocity in {t.unit}, {self._measured.mean():.1%} measured"
        of = np.searchsorted(t.offsets, self.first[indices[:rows]], side="right") - 1
        places = [f"trial {t.ids[k]} from {(row - t.offsets[k]) * t.bin_s:.2f} s"
                  for k, row in zip(of, self.first[indices[:rows]], strict=True)]  # fmt: skip
        return {"summary": [
            f"{t.identifier}: {facts['trials']} trials of this split, {facts['bins']} bins of {1000 * t.bin_s:g} ms",
            f"{facts['units']} units, {rates.min():.1f} to {rates.max():.1f} Hz, {(rates == 0).sum()} silent{measured}",
            *([f"windows: {'; '.join(places)}"] if places else []),
        ]}  # fmt: skip

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


