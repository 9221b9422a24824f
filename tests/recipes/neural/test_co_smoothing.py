"""Co-smoothing: bits per spike as the benchmark defines them, the rates of every bin, the baseline's regression."""

import numpy as np
import pytest
from scipy.stats import poisson

from aurora_train.errors import UserError
from neural.co_smoothing import bits_per_spike, hold_out_units, rate_plots, rates_of_trials
from neural.reach_simulation import prepare_simulation, true_counts
from neural.smoothing import poisson_regression, smooth, smoothing_baseline
from neural.spikes import Trials, bin_trials
from neural.windows import Windows


def cases():
    """(rates, spikes) [trials, time, units] as they come: plain, with silent units, rates of 0, unmeasured bins."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(2.0, 0.1, (5, 40, 7))
    spikes = rng.poisson(rates).astype(np.float64)
    yield rates, spikes
    silent, zero, gaps = spikes.copy(), rates.copy(), spikes.copy()
    silent[..., 3] = 0
    yield rates, silent
    zero[2, 5:9] = 0
    yield zero, spikes
    gaps[1, 10:20] = np.nan
    yield rates, gaps
    yield rates * 3, spikes  # worse than the mean: less than nothing


def test_bits_per_spike_are_the_gain_in_poisson_likelihood_over_each_units_mean():
    for rates, spikes in cases():
        gain = total = 0.0
        for unit in range(spikes.shape[2]):
            measured = np.isfinite(spikes[..., unit])
            counts, own = spikes[..., unit][measured], np.maximum(rates[..., unit][measured], 1e-9)
            mean = max(counts.mean(), 1e-9)
            gain += (poisson.logpmf(counts, own) - poisson.logpmf(counts, mean)).sum()
            total += counts.sum()
        assert bits_per_spike(rates, spikes) == pytest.approx(gain / total / np.log(2), abs=1e-9)


@pytest.mark.slow
def test_bits_per_spike_are_those_of_the_benchmarks_own_package():
    """nlb-tools, installed without its dependencies, which are of 2021: pip install --no-deps nlb-tools==0.0.4"""
    oracle = pytest.importorskip("nlb_tools.evaluation").bits_per_spike
    for rates, spikes in cases():
        ours = bits_per_spike(rates, spikes)
        assert ours == pytest.approx(oracle(rates.copy(), spikes.copy()), abs=1e-6)
        flat = [values.reshape(-1, values.shape[-1]) for values in (rates, spikes)]  # trials of unlike lengths, as ours
        assert bits_per_spike(*flat) == pytest.approx(ours, abs=1e-9)


def test_spikes_that_are_not_there_have_no_score():
    with pytest.raises(UserError, match="bits per spike are undefined"):
        bits_per_spike(np.ones((4, 2)), np.zeros((4, 2)))


def test_units_are_held_out_by_the_hash_of_their_ids():
    ids = np.arange(40) + 100
    held_in, held_out = hold_out_units("session", ids, 0.25)
    assert len(held_out) == 10 and sorted([*held_in, *held_out]) == list(range(40))
    shuffled = np.random.default_rng(0).permutation(40)
    again = hold_out_units("session", ids[shuffled], 0.25)[1]
    assert set(ids[shuffled][again]) == set(ids[held_out]) != set(ids[hold_out_units("other", ids, 0.25)[1]])
    for share, units in ((0.01, 10), (0.9, 2)):
        with pytest.raises(UserError, match="would be held out"):
            hold_out_units("session", np.arange(units), share)


def some_trials(lengths=(5, 16, 37, 90), units=6):
    rng = np.random.default_rng(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    spikes = rng.poisson(2.0, (offsets[-1], units)).astype(np.uint16)
    return Trials(spikes, np.zeros((len(spikes), 0)), offsets, np.arange(len(lengths)), "some", 0.02, "")


def test_each_bins_rate_comes_from_the_window_in_which_it_is_furthest_inside():
    trials = some_trials()
    windows = Windows(trials, 16)

    def predict(batch):
        """The counts themselves, and in the last column how far inside its window a bin is."""
        depth = np.minimum(np.arange(16), np.arange(16)[::-1])
        return np.concatenate([batch["spikes"], np.broadcast_to(depth, batch["weights"].shape)[..., None]], axis=-1)

    rates = rates_of_trials(predict, windows, lambda *said: None, batch=4)
    np.testing.assert_array_equal(rates[:, :-1], trials.spikes)
    long = rates[trials.offsets[3] + 8 : trials.offsets[4] - 8, -1]
    assert long.min() >= 3, "a bin in the middle of a long trial is never at the edge of its window"


def test_the_regression_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(400, 5))
    counts = rng.poisson(np.exp(inputs @ rng.normal(size=(5, 3)) * 0.4 - 1.0)).astype(np.float64)
    weights = poisson_regression(np.concatenate([inputs, np.ones((400, 1))], axis=1), counts, penalty=20.0)
    for column in range(3):
        theirs = linear_model.PoissonRegressor(alpha=20.0 / 400, tol=1e-10, max_iter=10_000).fit(
            inputs, counts[:, column]
        )
        np.testing.assert_allclose(weights[:-1, column], theirs.coef_, atol=2e-4)
        assert weights[-1, column] == pytest.approx(theirs.intercept_, abs=2e-4)


def test_smoothing_stays_within_a_trial_and_keeps_a_constant():
    trials = some_trials()
    values = trials.spikes.astype(np.float64)
    out = smooth(values, trials.offsets, 2.0)
    for begin, end in zip(trials.offsets[:-1], trials.offsets[1:], strict=True):
        bins = np.arange(end - begin)
        kernel = np.exp(-0.5 * ((bins[:, None] - bins) / 2.0) ** 2) * (abs(bins[:, None] - bins) <= 8)
        expected = kernel @ values[begin:end] / kernel.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(out[begin:end], expected, rtol=1e-10)
    np.testing.assert_allclose(smooth(np.full_like(values, 3.0), trials.offsets, 2.0), 3.0)


def test_the_true_rates_of_the_simulation_are_above_its_smoothing_which_is_above_nothing(tmp_path):
    pytest.importorskip("h5py")
    from neural.nwb import read_recording

    path = prepare_simulation(tmp_path, trials=40, units=24, seed=0)
    whole = bin_trials(read_recording(path, behavior=None), 0.02)
    trials = {split: whole.split(split, 0.3) for split in ("train", "validation", "test")}
    held_in, held_out = hold_out_units("simulated", whole.unit_ids, 0.25)
    smoothed, table = smoothing_baseline(trials, held_in, held_out, lambda *said: None)
    test = trials["test"]
    expected = true_counts(path, test)
    assert expected.sum() == pytest.approx(test.spikes.sum(), rel=0.05)
    known = bits_per_spike(expected[:, held_out], test.spikes[:, held_out])
    assert 0.0 < smoothed < known and len(table["rows"]) == 5
    assert smoothed == max(table["rows"], key=lambda row: row[2])[3]
    plots = rate_plots(test, expected[:, held_out], test.spikes[:, held_out], whole.unit_ids[held_out])
    assert len(plots) == 2 and set(plots[0]["series"]) == {"spikes", "inferred"}
