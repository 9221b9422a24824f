"""The step: what a plan may never change, and what a loss that is not a number may never touch."""

import jax
import numpy as np
import pytest
import toy
from pieces import assembled, trained

from aurora_train.config import load
from aurora_train.data.batches import read_batch
from aurora_train.nn.stack import Segment
from aurora_train.random import example_keys, stream
from aurora_train.train.loop import state_hash

LAYERS = 4
CUTS = {
    "recomputed": [Segment(0, 4, ())],
    "two segments, unlike save sets": [Segment(0, 2, ("normed",)), Segment(2, 4, None)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def config(folder):
    return load(folder, [f"model.layers={LAYERS}", "model.dropout=0.3"])


@pytest.fixture(scope="module")
def still(folder):
    """Without dropout: XLA:CPU fuses its division by 1 - rate differently with the cut, which costs the last bit."""
    return load(folder, [f"model.layers={LAYERS}", "model.dropout=0"])


@pytest.fixture(scope="module")
def pieces(config):
    """Compiled once for the tests that look at single steps."""
    return assembled(config)


@pytest.fixture(scope="module")
def uncut(still):
    """Losses and state of the stack in one scan."""
    losses, state = trained(still, 4)
    return {"losses": losses, "state": state_hash(state)}


@pytest.mark.optimized
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.release if name == "recomputed" else ()) for name in CUTS
])  # fmt: skip
def test_no_cut_of_the_stack_and_no_save_set_changes_a_bit_of_losses_or_state(name, still, uncut):
    losses, state = trained(still, 4, cut=CUTS[name])
    assert {"losses": losses, "state": state_hash(state)} == uncut


@pytest.mark.optimized
def test_unrolling_the_stack_changes_losses_by_rounding_alone(still, uncut):
    losses, _ = trained(still, 4, cut=[Segment(0, 4, None, True)])
    np.testing.assert_allclose(losses, uncut["losses"], rtol=2e-6)


@pytest.mark.slow
@pytest.mark.optimized
def test_with_dropout_a_cut_changes_losses_by_rounding_alone(config):
    uncut, _ = trained(config, 8)
    cut, _ = trained(config, 8, cut=CUTS["two segments, unlike save sets"])
    np.testing.assert_allclose(cut, uncut, rtol=2e-6)


def test_accumulation_changes_losses_by_rounding_alone_with_dropout_on_and_unlike_weights(config):
    one, _ = trained(config, 8, accumulation=1)
    for parts in (2, 4):
        np.testing.assert_allclose(trained(config, 8, accumulation=parts)[0], one, rtol=1e-6)


def test_a_dropout_key_follows_its_example_and_not_its_place():
    root = stream(0, "dropout")
    whole = jax.random.key_data(example_keys(root, 5, np.arange(100, 108)))
    rows = np.array([6, 1, 3])
    np.testing.assert_array_equal(jax.random.key_data(example_keys(root, 5, 100 + rows)), whole[rows])
    assert len(np.unique(whole, axis=0)) == 8
    assert not np.array_equal(jax.random.key_data(example_keys(root, 6, np.arange(100, 108))), whole)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step_numbers(pieces, bad):
    recipe, initialise, step = pieces
    batch = read_batch(recipe.data("train"), 0, 8, 0)
    state, _ = step(initialise(), batch)
    before = jax.device_get(state)
    poison = np.nan if bad == "loss" else 1e25  # its square is finite no longer, in the gradient before the loss
    state, metrics = step(state, {**batch, "y": batch["y"] + np.float32(poison)})
    after = jax.device_get(state)
    assert metrics["skipped"] == 1
    assert (after.step, after.data_step) == (before.step + 1, before.data_step + 1)
    for part in ("params", "opt_state", "extra"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    state, metrics = step(state, batch)
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])


def test_the_moving_average_follows_the_parameters(pieces):
    recipe, initialise, step = pieces
    source, state = recipe.data("train"), initialise()
    average = jax.device_get(state.params)
    for number in range(3):
        state, _ = step(state, read_batch(source, 0, 8, number))
        params = jax.device_get(state.params)
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.extra["ema"], average)


def test_a_step_takes_over_the_buffers_of_the_state_it_was_given(pieces):
    recipe, initialise, step = pieces
    state = initialise()
    old = jax.tree.leaves(state)
    step(state, read_batch(recipe.data("train"), 0, 8, 0))
    assert all(leaf.is_deleted() for leaf in old)
