"""Intervals: known values, and how often they hold the truth."""

import numpy as np
import pytest

from aurora_train.evals.intervals import Measure, bootstrap, comparison_table, wilson


@pytest.mark.parametrize(
    ("successes", "number", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, to four digits.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_has_the_published_values(successes, number, low, high):
    assert wilson(successes, number) == pytest.approx((low, high), abs=6e-5)
    flipped = wilson(number - successes, number)
    assert flipped == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_a_bootstrap_of_a_mean_has_the_width_of_its_standard_error_and_a_seed():
    rows = np.random.default_rng(1).normal(2.0, 3.0, 500)
    low, high = bootstrap(rows)
    half = 1.96 * rows.std() / np.sqrt(500)
    assert (low, high) == pytest.approx((rows.mean() - half, rows.mean() + half), abs=0.08 * half)
    assert bootstrap(rows) == (low, high) != bootstrap(rows, seed=1)
    assert bootstrap(3 * rows, np.full(500, 3.0)) == pytest.approx((low, high))


@pytest.mark.slow
def test_the_intervals_hold_the_truth_as_often_as_they_say():
    draws, held = np.random.default_rng(2), {"share": 0, "ratio": 0}
    for _ in range(200):
        low, high = wilson(draws.binomial(400, 0.3), 400)
        held["share"] += low <= 0.3 <= high
        weights = draws.integers(1, 30, 300).astype(float)
        low, high = bootstrap(weights * 0.7 + draws.normal(0, np.sqrt(weights)), weights)
        held["ratio"] += low <= 0.7 <= high
    assert all(0.91 <= count / 200 <= 0.99 for count in held.values()), held


def test_a_comparison_pairs_the_rows_that_both_scores_have():
    draws = np.random.default_rng(3)
    easy = draws.random(400)
    before = Measure.share(np.arange(400), easy < 0.30)
    after = Measure.share(np.arange(50, 400), easy[50:] < 0.40)
    table = comparison_table({"exact_match": before, "gone": before}, {"exact_match": after})
    ((name, was, _, now, _, change, (low, high), number),) = table["rows"]
    assert (name, number) == ("exact_match", 350)
    assert was == np.mean(easy[50:] < 0.3) and now == after.value and change == pytest.approx(now - was)
    apart = np.hypot(*(np.subtract(*one.at(np.arange(350)).interval()) for one in (before, after)))
    assert 0 < low < change < high and high - low < 0.6 * apart, "pairs make the interval narrower"
