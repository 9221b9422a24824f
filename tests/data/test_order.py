"""The promises of data order: each epoch is a permutation, and it is the same one for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_train.data.order import indices, permute

SIZES = st.integers(1, 3000)
SEEDS = st.integers(0, 2**63)

GOLDEN_START = [744, 717, 762, 904, 680, 516, 436, 512, 901, 945, 55, 977]
GOLDEN_ACROSS_EPOCHS = [3, 8, 8, 9, 3, 0]
GOLDEN_LARGE = [63801816629, 19951119949, 70733002304, 64318483105]


def test_the_order_is_the_one_that_every_earlier_version_gave():
    assert indices(0, 0, 12, 1000).tolist() == GOLDEN_START
    assert indices(7, 3, 6, 10).tolist() == GOLDEN_ACROSS_EPOCHS
    assert indices(1, 10**6, 4, 10**11).tolist() == GOLDEN_LARGE


@settings(max_examples=25, deadline=None)
@given(n=SIZES, seed=SEEDS, epoch=st.integers(0, 5))
def test_an_epoch_visits_every_example_once(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), seed, epoch, n)), np.arange(n))


@settings(max_examples=25, deadline=None)
@given(n=SIZES, seed=SEEDS, batch=st.integers(1, 200), step=st.integers(0, 50), cut=st.integers(1, 8))
def test_a_batch_is_the_same_whether_read_at_once_or_in_parts(n, seed, batch, step, cut):
    whole = indices(seed, step, batch * cut, n)
    parts = [indices(seed, step * cut + i, batch, n) for i in range(cut)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert whole.min() >= 0 and whole.max() < n


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 300), seed=SEEDS, batch=st.integers(1, 97))
def test_batches_that_span_epochs_drop_and_repeat_nothing(n, seed, batch):
    stream = np.concatenate([indices(seed, step, batch, n) for step in range(-(-3 * n // batch))])
    for epoch in range(3):
        assert len(np.unique(stream[epoch * n : (epoch + 1) * n])) == n


@pytest.mark.parametrize("n", [2, 5, 1000])
def test_every_example_is_as_likely_at_every_place(n):
    trials = 400
    places = np.array([0, n // 2, n - 1])
    drawn = np.stack([permute(places, seed, 0, n) for seed in range(trials)])
    for column in drawn.T:
        bins = min(n, 10)
        counts = np.bincount(column * bins // n, minlength=bins)
        expected = np.bincount(np.arange(n) * bins // n, minlength=bins) * trials / n
        # 0.9999 quantile of chi-square is below mean + 5 standard deviations + 10 for these degrees of freedom.
        assert ((counts - expected) ** 2 / expected).sum() < (bins - 1) + 5 * np.sqrt(2 * (bins - 1)) + 10


def test_neighbours_are_scattered():
    order = permute(np.arange(10_000), 3, 0, 10_000)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.005


def test_epochs_and_seeds_have_their_own_orders():
    n = 1000
    orders = [permute(np.arange(n), seed, epoch, n) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i in range(4):
        for j in range(i):
            assert np.mean(orders[i] == orders[j]) < 0.01
