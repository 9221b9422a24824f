"""Linear decoders as baselines of a neural one: ridge regression on lagged counts, and a Wiener filter."""

from __future__ import annotations

import numpy as np

from neural.velocity import scores
from neural.windows import Standard


def linear_decoder(data, lags: int, penalties) -> dict:
    """Least squares on lagged, standardised counts with a ridge penalty, in float64; scores on the test trials.

    Hoerl & Kennard 1970; without a penalty it is the Wiener filter of the decoding literature (Glaser et al. 2020).
    The penalty is the one with the best R2 on validation trials.
    """
    train, validation, test = (data(split).trials for split in ("train", "validation", "test"))
    inputs, outputs = Standard.of(train.spikes.astype(np.float64)), data("train").standard
    gram, moment = 0.0, 0.0
    for rows, design in _designs(train, lags, inputs):
        target = outputs.apply(train.velocity[rows])
        measured = np.isfinite(target).all(axis=1)
        design = design if measured.all() else design[measured]
        gram = gram + design.T @ design  # one array with its own transpose: BLAS does half the work
        moment = moment + design.T @ target[measured]
    free = np.append(np.ones(len(gram) - 1), 0)  # the intercept is not penalised
    fits = [(penalty, ridge(gram, moment, penalty * free)) for penalty in penalties]

    def decoded(trials, weights):
        return outputs.undo(np.concatenate([design @ weights for _, design in _designs(trials, lags, inputs)]))

    validated = [scores(validation.velocity, decoded(validation, weights))["r2"] for _, weights in fits]
    penalty, weights = fits[int(np.argmax(validated))]
    return scores(test.velocity, decoded(test, weights)) | {"penalty": float(penalty), "lags": lags}


def ridge(gram: np.ndarray, moment: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Weights [F, D] that minimise |X w - y|^2 + sum of penalty[F] w^2, from X'X and X'y."""
    from scipy.linalg import cho_factor, cho_solve

    return cho_solve(cho_factor(gram + np.diag(penalty)), moment)


def _designs(trials, lags, inputs, at_once: int = 64):
    """(rows, lagged design and a column of ones) of a few trials at a time: that of a long recording would not fit."""
    for k in range(0, len(trials.ids), at_once):
        offsets = trials.offsets[k : k + at_once + 1]
        rows = slice(offsets[0], offsets[-1])
        design = lagged(inputs.apply(trials.spikes[rows].astype(np.float64)), offsets - offsets[0], lags)
        yield rows, np.concatenate([design, np.ones((len(design), 1))], axis=1)


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
