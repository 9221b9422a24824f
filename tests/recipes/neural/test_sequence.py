"""Causal models over continuous inputs: causality, one bin at a time, and the recurrent layer against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neural.sequence import CausalGRU, CausalTransformer, GRULayer

# Half the compile time, the same mathematics.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNG = np.random.default_rng(4)
INPUTS = jnp.asarray(RNG.standard_normal((2, 16, 5)), jnp.float32)


def make(kind, **settings):
    def build():
        rngs = nnx.Rngs(params=jax.random.key(0))
        if kind == "gru":
            return CausalGRU(5, 3, width=16, layers=2, rngs=rngs, **settings)
        return CausalTransformer(5, 3, width=16, layers=2, heads=2, window=6, rngs=rngs, **settings)

    graph, _ = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graph, quick_jit(lambda: nnx.split(build())[1])())


@functools.partial(quick_jit, static_argnums=0)
def _run(graph, state, inputs, keys):
    return nnx.merge(graph, state)(inputs, keys=keys)


def run(model, inputs, keys=None):
    return _run(*nnx.split(model), inputs, keys)


@pytest.mark.parametrize("kind", ["transformer", "gru"])
def test_one_bin_at_a_time_gives_what_the_whole_sequence_gives(kind):
    model = make(kind)
    graph, state = nnx.split(model)
    step = quick_jit(lambda *args: nnx.merge(graph, state).extend(*args))
    caches, outputs = model.empty_caches(2, 16), []
    for t in range(16):
        out, caches = step(INPUTS[:, t : t + 1], jnp.full((2, 1), t, jnp.int32), caches)
        outputs.append(out)
    whole = run(model, INPUTS)
    assert whole.shape == (2, 16, 3) and whole.dtype == jnp.float32
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=1e-5)


@pytest.mark.parametrize("kind", ["transformer", "gru"])
def test_no_output_depends_on_a_later_bin(kind):
    model = make(kind)
    slopes = quick_jit(jax.grad(lambda x: model(x)[:, 7].sum()))(INPUTS)
    assert float(jnp.abs(slopes[:, 8:]).max()) == 0.0
    assert float(jnp.abs(slopes[:, 7]).min()) > 0.0


def test_dropout_needs_keys_and_changes_with_them():
    model = make("gru", dropout=0.5)
    keys = jax.random.split(jax.random.key(1), 2)
    np.testing.assert_array_equal(run(model, INPUTS), run(model, INPUTS))
    assert not np.allclose(run(model, INPUTS, keys), run(model, INPUTS))


def test_the_recurrent_layer_equals_float64_and_restarts_where_a_position_is_zero():
    graph, state = nnx.split(GRULayer(6, 0.0, nnx.Rngs(params=0)))
    w = jax.tree.map(lambda p: RNG.standard_normal(p.shape) * 0.5, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), w))
    x = RNG.standard_normal((2, 9, 6))
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    layer = quick_jit(lambda state, x: nnx.merge(graph, state)(x, jnp.asarray(positions), 0)[0])
    found = layer(state, jnp.asarray(x, jnp.float32))

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w["norm"]["scale"]
    expected = np.zeros_like(x)
    for b in range(2):
        for t in range(9):
            h = np.zeros(6) if positions[b, t] == 0 else expected[b, t - 1]
            i, r = normed[b, t] @ w["input"] + w["input_bias"], h @ w["recurrent"] + w["recurrent_bias"]
            reset, update = sigmoid(i[:6] + r[:6]), sigmoid(i[6:12] + r[6:12])
            expected[b, t] = (1 - update) * np.tanh(i[12:] + reset * r[12:]) + update * h
    np.testing.assert_allclose(found, x + expected, atol=1e-5)
