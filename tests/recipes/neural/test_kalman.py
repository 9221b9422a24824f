"""The Kalman filter: it is the conditional mean of one large Gaussian, and its matrices are least squares."""

import numpy as np

from neural.kalman import Kalman, filtered, fit_kalman, kalman_decoder
from neural.spikes import Trials
from neural.windows import Standard, Windows


def random_covariance(rng, size):
    root = rng.normal(size=(size, size))
    return root @ root.T / size + 0.1 * np.eye(size)


def conditional_mean(model, counts, lag, bin_):
    """The mean of the state of a bin given all counts that may be seen by then: states and counts as one Gaussian,
    which is conditioned in one piece, without a recursion."""
    size, units, length = len(model.mean), len(model.emission), bin_ + 1
    mean, between = np.zeros((length, size)), np.zeros((length, size, length, size))
    mean[0], between[0, :, 0, :] = model.mean, model.spread
    for t in range(1, length):
        mean[t] = model.transition @ mean[t - 1]
        for s in range(t):
            between[t, :, s, :] = model.transition @ between[t - 1, :, s, :]
            between[s, :, t, :] = between[t, :, s, :].T
        between[t, :, t, :] = model.transition @ between[t - 1, :, t - 1, :] @ model.transition.T + model.drift
    seen = list(range(lag, length))
    if not seen:
        return mean[bin_]
    observes = np.zeros((len(seen), units, length, size))
    for row, t in enumerate(seen):
        observes[row, :, t, :] = model.emission
    observes = observes.reshape(len(seen) * units, length * size)
    states = between.reshape(length * size, length * size)
    noise = np.kron(np.eye(len(seen)), model.noise)
    gain = states @ observes.T @ np.linalg.inv(observes @ states @ observes.T + noise)
    surprise = np.concatenate([counts[t - lag] for t in seen]) - observes @ mean.ravel()
    return (mean.ravel() + gain @ surprise).reshape(length, size)[bin_]


def test_the_filter_is_the_conditional_mean_of_the_joint_gaussian():
    rng = np.random.default_rng(0)
    size, units = 4, 7
    transition = np.linalg.qr(rng.normal(size=(size, size)))[0] * 0.9
    model = Kalman(transition, random_covariance(rng, size), rng.normal(size=(units, size)),
                   random_covariance(rng, units), rng.normal(size=size), random_covariance(rng, size))  # fmt: skip
    offsets = np.array([0, 9, 12, 19])
    counts = rng.normal(size=(19, units))
    for lag in (0, 2):
        states = filtered(model, counts, offsets, lag)
        for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
            for bin_ in range(end - begin):
                expected = conditional_mean(model, counts[begin:end], lag, bin_)
                np.testing.assert_allclose(states[begin + bin_], expected, rtol=1e-9, atol=1e-9)


def simulated(rng, trials=150, length=30, units=12, lag=2):
    """Trials of a known linear Gaussian model whose counts are rounded: velocity [N, 2], and counts that lead it."""
    velocity, counts = np.zeros((trials, length + lag, 2)), np.zeros((trials, length, units))
    emission = rng.normal(size=(units, 2))
    velocity[:, 0] = rng.normal(size=(trials, 2))
    for t in range(1, length + lag):
        velocity[:, t] = 0.6 * velocity[:, t - 1] + 0.8 * rng.normal(size=(trials, 2))
    counts = np.round(20 + 3 * velocity[:, lag:] @ emission.T + 2 * rng.normal(size=(trials, length, units)))
    offsets = np.arange(trials + 1) * length
    spikes = np.clip(counts, 0, None).astype(np.uint16).reshape(-1, units)
    return Trials(spikes, velocity[:, :length].reshape(-1, 2), offsets, np.arange(trials), "gauss", 0.02, "cm/s")


def test_the_matrices_are_least_squares_and_bins_without_velocity_do_not_count():
    rng = np.random.default_rng(1)
    trials = simulated(rng)
    counts, velocity = trials.spikes.astype(np.float64) - 20, trials.velocity.copy()
    velocity[40:50] = np.nan
    model = fit_kalman(counts, velocity, trials.offsets, lag=2)
    age = np.arange(len(velocity)) % 30
    before = np.where((age == 0)[:, None], velocity, np.concatenate([velocity[:1], velocity[:-1]]))
    states = np.concatenate([velocity, before], axis=1)
    rows = [t for t in range(len(states)) if age[t] >= 2 and np.isfinite(states[t]).all()]
    expected, *_ = np.linalg.lstsq(states[rows], counts[[t - 2 for t in rows]])
    np.testing.assert_allclose(model.emission, expected.T, rtol=1e-6, atol=1e-8)
    left = counts[[t - 2 for t in rows]] - states[rows] @ expected
    np.testing.assert_allclose(model.noise, left.T @ left / len(rows), rtol=1e-5, atol=2e-6)
    pairs = [t for t in rows if age[t] > 0 and np.isfinite(states[t - 1]).all()] + [
        t for t in range(len(states)) if age[t] == 1 and np.isfinite(states[[t - 1, t]]).all()
    ]
    moved, *_ = np.linalg.lstsq(states[[t - 1 for t in pairs]], states[pairs])
    np.testing.assert_allclose(model.transition, moved.T, rtol=1e-5, atol=1e-6)


def test_the_decoder_finds_the_lag_and_decodes_almost_as_well_as_the_model_allows():
    trials = simulated(np.random.default_rng(2))

    def data(split):
        standard = Standard.of(trials.split("train", 0.2).velocity)
        return Windows(trials.split(split, 0.2), 8, standard)

    fit = kalman_decoder(data, lags=(0, 2, 4))
    assert fit["lag"] == 2 and 0.8 < fit["r2"] < 1


def test_trials_that_begin_before_the_behaviour_are_decoded_all_the_same():
    """Behaviour that is recorded in pieces has its first sample after the first bin's centre in every trial."""
    trials = simulated(np.random.default_rng(3), trials=60)
    velocity = trials.velocity.copy()
    velocity[trials.offsets[:-1]] = np.nan
    counts = trials.spikes.astype(np.float64) - 20
    model = fit_kalman(counts, velocity, trials.offsets, lag=0)
    starts = np.stack([np.concatenate([velocity[k + 2], velocity[k + 1]]) for k in trials.offsets[:-1]])
    np.testing.assert_allclose(model.mean, starts.mean(axis=0))
    assert np.isfinite(filtered(model, counts, trials.offsets, 0)).all()
