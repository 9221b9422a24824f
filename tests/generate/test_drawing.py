"""Draws from vocabularies that are never sorted as a whole, held to a float64 reference of what may be drawn."""

import jax
import numpy as np
import pytest

from aurora_train.generate.drawing import CANDIDATES, Knobs, draw, measured, penalised

VOCABULARY = 3 * CANDIDATES
SETTINGS = {
    "the likeliest": {"temperature": 0.0},
    "all": {},
    "warm": {"temperature": 1.7},
    "k": {"top_k": 40},
    "k beyond the candidates": {"top_k": CANDIDATES + 7},
    "k and nucleus beyond the candidates": {"top_k": CANDIDATES + 7, "top_p": 0.97, "temperature": 3.0},
    "nucleus": {"top_p": 0.6},
    "nucleus of much": {"top_p": 0.999, "temperature": 3.0},
    "nothing but the first": {"top_p": 1e-6},
    "least share": {"min_p": 0.05},
    "least share of nearly all": {"min_p": 1e-4, "temperature": 4.0},
    "all of them": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
}


def logits_of(rows, spread=2.0):
    return np.random.default_rng(rows).normal(0, spread, (rows, VOCABULARY)).astype(np.float32)


def chances(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """(token ids by falling probability, float64 probabilities with which each is drawn) of one row."""
    order = np.argsort(-logits, kind="stable")
    if temperature == 0:
        return order, (np.arange(len(order)) == 0).astype(np.float64)
    ranked = logits[order].astype(np.float64) / temperature
    shares = np.exp(ranked - ranked.max()) * (np.arange(len(order)) < (top_k or len(order)))
    shares /= shares.sum()
    kept = (np.cumsum(shares) - shares < top_p) & (shares >= min_p * shares[0])
    shares = np.where(kept, shares, 0)
    return order, shares / shares.sum()


def knobs(settings):
    """The settings of each row as arrays."""
    whole = [{"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0} | one for one in settings]
    columns = {name: [one[name] for one in whole] for name in whole[0]}
    columns["top_k"] = [k or VOCABULARY for k in columns["top_k"]]
    return Knobs(*(np.array(c, np.int32 if n == "top_k" else np.float32) for n, c in columns.items()))


def test_every_draw_is_the_one_that_the_float64_distribution_gives_with_the_same_noise():
    names = [name for name in SETTINGS for _ in range(8)]
    logits, keys = logits_of(len(names)), jax.random.split(jax.random.key(3), len(names))
    drawn = np.asarray(draw(logits, keys, 5, knobs([SETTINGS[name] for name in names])))
    for row, name in enumerate(names):
        order, shares = chances(logits[row], **SETTINGS[name])
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(keys[row], 5), VOCABULARY), np.float64)
        if name in ("all", "warm"):  # nothing is ranked, so the noise is that of the token itself
            noise = noise[order]
        with np.errstate(divide="ignore"):
            assert drawn[row] == order[np.argmax(np.log(shares) + noise)], (row, name)


@pytest.mark.parametrize("name", ["all", "all of them"])
def test_tokens_are_drawn_as_often_as_the_float64_distribution_says(name):
    logits, number = logits_of(1, spread=3.0)[0], 1024
    keys = jax.random.split(jax.random.key(1), number)
    drawn = draw(np.broadcast_to(logits, (number, VOCABULARY)), keys, 0, knobs([SETTINGS[name]] * number))
    order, shares = chances(logits, **SETTINGS[name])
    found = np.bincount(np.asarray(drawn), minlength=VOCABULARY)[order] / number
    assert not found[shares == 0].any()
    np.testing.assert_array_less(np.abs(found - shares), 4.5 * np.sqrt(shares * (1 - shares) / number) + 1e-3)


def test_a_rows_draw_does_not_depend_on_what_the_other_rows_need():
    logits, keys = logits_of(len(SETTINGS)), jax.random.split(jax.random.key(3), len(SETTINGS))
    together = draw(logits, keys, 2, knobs(SETTINGS.values()))
    for row, settings in enumerate(SETTINGS.values()):
        alone = draw(logits[row : row + 1], keys[row : row + 1], 2, knobs([settings]))
        assert int(together[row]) == int(alone[0])


def test_a_penalty_divides_what_is_above_zero_and_multiplies_what_is_below():
    logits, seen = np.array([[2.0, -2.0, 2.0, -2.0]] * 2, np.float32), np.array([[True, True, False, False]] * 2)
    weighed = penalised(logits, seen, np.array([4.0, 1.0], np.float32))
    np.testing.assert_array_equal(weighed, [[0.5, -8.0, 2.0, -2.0], logits[1]])


def test_log_probabilities_are_those_of_float64():
    logits = logits_of(2)
    wide = logits.astype(np.float64)
    wanted = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    own, ids, top = measured(logits, np.array([7, 11]))
    np.testing.assert_allclose(own, wanted[[0, 1], [7, 11]], atol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-wanted)[:, :20])
    np.testing.assert_allclose(top, np.take_along_axis(wanted, np.asarray(ids), 1), atol=1e-5)
