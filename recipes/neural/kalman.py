"""A Kalman filter, a baseline of velocity decoding (Wu et al. 2006), with velocity as its state (Kim et al. 2008).

The state is the standardised velocity of a bin and of the one before, so that it has an acceleration. It follows a
linear Gaussian model, and the standardised counts `lag` bins earlier depend on it linearly with Gaussian noise. All
matrices are the closed-form maximum-likelihood estimates on the training trials; the lag is chosen on validation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from neural.velocity import scores
from neural.windows import Standard

LAGS = (0, 2, 4, 6, 8)
RIDGE = 1e-6  # added to the diagonal of covariances, so that a silent unit does not make one singular


class Kalman(NamedTuple):
    """x' = transition x + N(0, drift); y = emission x + N(0, noise); the first state of a trial ~ N(mean, spread).

    With S states and U units: transition, drift, spread float64[S, S]; emission float64[U, S]; noise float64[U, U];
    mean float64[S].
    """

    transition: np.ndarray
    drift: np.ndarray
    emission: np.ndarray
    noise: np.ndarray
    mean: np.ndarray
    spread: np.ndarray


def kalman_decoder(data, lags=LAGS) -> dict:
    """Scores on the test trials of the filter whose lag has the best R2 on the validation trials, and that lag."""
    train, validation, test = (data(split).trials for split in ("train", "validation", "test"))
    inputs, outputs = Standard.of(train.spikes.astype(np.float64)), data("train").standard

    def decoded(model, trials, lag):
        counts = inputs.apply(trials.spikes.astype(np.float64))
        states = filtered(model, counts, trials.offsets, lag)
        return outputs.undo(states[:, : trials.velocity.shape[1]])

    models = {lag: fit_kalman(inputs.apply(train.spikes.astype(np.float64)), outputs.apply(train.velocity),
                              train.offsets, lag) for lag in lags}  # fmt: skip
    validated = {lag: scores(validation.velocity, decoded(models[lag], validation, lag))["r2"] for lag in lags}
    lag = max(validated, key=validated.__getitem__)
    return scores(test.velocity, decoded(models[lag], test, lag)) | {"lag": lag}


def fit_kalman(counts: np.ndarray, velocity: np.ndarray, offsets: np.ndarray, lag: int) -> Kalman:
    """Closed-form estimates from counts [N, U] and velocity [N, D] of trials; bins without a velocity are left out.

    A trial whose first bins were not measured counts with its first whole state among the first states.
    """
    first = np.zeros(len(velocity), bool)
    first[offsets[:-1]] = True
    age = np.arange(len(velocity)) - np.repeat(offsets[:-1], np.diff(offsets))
    before = np.where(first[:, None], velocity, np.roll(velocity, 1, axis=0))  # a trial begins without acceleration
    states = np.concatenate([velocity, before], axis=1)
    whole = np.isfinite(states).all(axis=1)
    follows = whole & ~first & np.roll(whole, 1)
    old, new = np.roll(states, 1, axis=0)[follows], states[follows]
    transition, drift = _regression(old, new)
    seen = np.flatnonzero(whole & (age >= lag))
    emission, noise = _regression(states[seen], counts[seen - lag])
    rows = np.flatnonzero(whole)
    starts = states[rows[np.unique((np.cumsum(first) - 1)[rows], return_index=True)[1]]]
    return Kalman(transition, drift, emission, noise, starts.mean(axis=0), _covariance(starts - starts.mean(axis=0)))


def _regression(inputs, outputs) -> tuple[np.ndarray, np.ndarray]:
    """Least squares without an intercept: weights [O, I], and the covariance of what is left over."""
    gram = inputs.T @ inputs + RIDGE * np.eye(inputs.shape[1])
    weights = np.linalg.solve(gram, inputs.T @ outputs).T
    return weights, _covariance(outputs - inputs @ weights.T)


def _covariance(values) -> np.ndarray:
    return values.T @ values / max(len(values), 1) + RIDGE * np.eye(values.shape[1])


def filtered(model: Kalman, counts: np.ndarray, offsets: np.ndarray, lag: int) -> np.ndarray:
    """The mean of each bin's state given the counts up to that bin, float64[N, S], in the information form.

    The counts that belong to bin t are those of bin t - lag; a trial's first `lag` bins are predicted without any. The
    gains do not depend on the counts, so all trials run together.
    """
    lengths, states = np.diff(offsets), np.zeros((len(counts), len(model.mean)))
    weighted = np.linalg.solve(model.noise, model.emission).T  # emission' noise^-1, [S, U]
    information = weighted @ model.emission
    mean, spread = np.tile(model.mean, (len(lengths), 1)), model.spread
    for bin_ in range(lengths.max(initial=0)):
        if bin_ > 0:
            mean = mean @ model.transition.T
            spread = model.transition @ spread @ model.transition.T + model.drift
        alive = np.flatnonzero(lengths > bin_)
        if bin_ >= lag:
            seen = counts[offsets[alive] + bin_ - lag]
            spread = np.linalg.inv(np.linalg.inv(spread) + information)
            error = seen @ weighted.T - mean[alive] @ information.T
            mean[alive] += error @ spread.T
        states[offsets[alive] + bin_] = mean[alive]
    return states
