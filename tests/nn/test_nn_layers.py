"""Every layer against float64 NumPy written here from its paper, values and directional derivatives."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_train.nn.cpu import forms
from aurora_train.nn.decoder_config import DecoderConfig, Rope, RopeScaling
from aurora_train.nn.dropout import dropout
from aurora_train.nn.linear import linear
from aurora_train.nn.mlp import Mlp, activate
from aurora_train.nn.norms import normalise
from aurora_train.nn.positions import rope_frequencies, rope_table, rotate
from aurora_train.nn.tracing import tracing

# Half the compile time, the same mathematics.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNG = np.random.default_rng(0)
erf = np.vectorize(math.erf)


def normal(*shape):
    return RNG.standard_normal(shape)


def assert_gradient(layer, exact, inputs, tolerance=1e-4):
    """The gradient of a random projection of `layer`, along a random direction, equals the slope of `exact`."""
    out = exact(*inputs)
    projection, directions = normal(*out.shape), [normal(*x.shape) for x in inputs]
    narrow = [jnp.asarray(x, jnp.float32) for x in inputs]

    @quick_jit
    def run(args):
        y, pullback = jax.vjp(lambda args: layer(*args), args)
        return y, pullback(jnp.asarray(projection, jnp.float32))[0]

    y, gradients = run(narrow)
    np.testing.assert_allclose(y, out, rtol=1e-5, atol=1e-5)
    found = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    step = 1e-5
    ahead, behind = (exact(*[x + s * d for x, d in zip(inputs, directions, strict=True)]) for s in (step, -step))
    expected = ((ahead - behind) * projection).sum() / (2 * step)
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("form", ["plain", "cpu"])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms_equal_float64(kind, form):
    def exact(x, scale, *bias):
        centred = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + (bias[0] if bias else 0)

    def layer(x, scale, *bias):
        return normalise(1e-5, kind == "layernorm", x, scale, bias[0] if bias else None)

    with tracing(forms=form):
        assert_gradient(layer, exact, [normal(2, 5, 24), normal(24), normal(24)][: 3 if kind == "layernorm" else 2])


EXACT_ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "swiglu": lambda gate, up: gate / (1 + np.exp(-gate)) * up,
    "geglu": lambda gate, up: EXACT_ACTIVATIONS["gelu_tanh"](gate) * up,
}


@pytest.mark.parametrize("form", ["plain", "cpu"])
@pytest.mark.parametrize("name", EXACT_ACTIVATIONS)
def test_activations_equal_float64(name, form):
    inputs = [normal(3, 17) for _ in range(2 if name in ("swiglu", "geglu") else 1)]
    with tracing(forms=form):
        assert_gradient(lambda *x: activate(name, *x), EXACT_ACTIVATIONS[name], inputs)


def test_an_activation_keeps_only_its_inputs_for_the_backward_pass():
    gate, up = jnp.ones((4, 8)), jnp.ones((4, 8))
    kept = jax.tree.leaves(jax.vjp(lambda g, u: activate("swiglu", g, u), gate, up)[1])
    assert len(kept) == 2


@pytest.mark.parametrize("form", ["plain", "cpu"])
def test_linear_equals_float64(form):
    with tracing(forms=form):
        assert_gradient(linear, lambda x, w, b: x @ w + b, [normal(2, 3, 8), normal(8, 6), normal(6)])


@pytest.mark.parametrize("form", ["plain", "cpu"])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_bfloat16_linear_sums_in_float32_and_gives_float32_weight_gradients(shape, form):
    x, w, g = (jnp.asarray(normal(*s), jnp.bfloat16) for s in ((2, 64, shape[0]), shape, (2, 64, shape[1])))
    wide = [np.asarray(a, np.float64) for a in (x, w, g)]
    with tracing(forms=form):
        y, pullback = jax.vjp(jax.jit(linear), x, w.astype(jnp.float32))
        dx, dw = pullback(g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.asarray(y, np.float64), wide[0] @ wide[1], rtol=2**-7, atol=1e-5)
    np.testing.assert_allclose(np.asarray(dx, np.float64), wide[2] @ wide[1].T, rtol=2**-7, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("bti,bto->io", wide[0], wide[2]), rtol=1e-5, atol=1e-4)


@pytest.mark.optimized
def test_a_compiled_bfloat16_weight_gradient_runs_on_cpu_whichever_side_is_narrower():
    """XLA:CPU crashes at run time where a transpose is folded into a bf16 dot."""
    for narrow, wide in ((8, 32), (32, 8)):
        a, b = jnp.ones((64, narrow), jnp.bfloat16), jnp.ones((64, wide), jnp.bfloat16)
        found = jax.jit(forms.outer)(a, b)
        np.testing.assert_array_equal(found, np.full((narrow, wide), 64.0))


def exact_mlp(config, weights, x):
    up = x @ weights["up"] + weights.get("up_bias", 0)
    if "gate" in weights:
        gate = x @ weights["gate"] + weights.get("gate_bias", 0)
        hidden = EXACT_ACTIVATIONS[config.activation](gate, up)
    else:
        hidden = EXACT_ACTIVATIONS[config.activation](up)
    return hidden @ weights["down"] + weights.get("down_bias", 0)


@pytest.mark.parametrize("activation,bias", [("gelu", "all"), ("swiglu", "none"), ("geglu", "all"), ("relu2", "qkv")])
def test_the_mlp_equals_float64(activation, bias):
    config = DecoderConfig(width=16, heads=2, layers=1, activation=activation, bias=bias)
    graph, state = nnx.split(Mlp(config, nnx.Rngs(params=0)))
    weights = {name: normal(*w.shape) * 0.3 for name, w in nnx.to_pure_dict(state).items()}
    x = normal(2, 3, 16)
    nnx.replace_by_pure_dict(state, {name: jnp.asarray(w, jnp.float32) for name, w in weights.items()})
    found = quick_jit(lambda state, x: nnx.merge(graph, state)(x))(state, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, exact_mlp(config, weights, x), rtol=1e-4, atol=1e-5)


def test_rope_turns_each_pair_by_its_position():
    frequencies = rope_frequencies(Rope(10_000.0, 8, RopeScaling()))
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    x, positions = normal(1, 5, 2, 8), np.array([[0, 1, 2, 0, 1]])

    def exact(x):
        pairs = x[..., :4] + 1j * x[..., 4:]  # one complex number a pair: a turn is a product
        turned = pairs * np.exp(1j * positions[..., None, None] * np.asarray(frequencies, np.float64))
        return np.concatenate([turned.real, turned.imag], -1)

    table = rope_table(jnp.asarray(positions), Rope(10_000.0, 8, RopeScaling()))
    assert_gradient(lambda x: rotate(x, table), exact, [x])


def test_linear_rope_scaling_is_a_slower_clock():
    scaled = rope_frequencies(Rope(500.0, 16, RopeScaling(kind="linear", factor=4.0)))
    np.testing.assert_allclose(scaled * 4, rope_frequencies(Rope(500.0, 16, RopeScaling())), rtol=1e-6)


def test_longrope_in_a_packed_row_goes_by_each_text_alone():
    factors = {"short_factors": (1.0, 1.0), "long_factors": (2.0, 3.0)}
    rope = Rope(10_000.0, 4, RopeScaling(kind="longrope", factor=4.0, original_length=8, **factors))
    long, short = np.arange(12), np.arange(5)
    packed = rope_table(jnp.asarray([[*short, *long, *short, 0, 0]]), rope)[0][0]
    alone = [rope_table(jnp.asarray([text]), rope)[0][0] for text in (short, long, short)]
    np.testing.assert_array_equal(packed[:-2], np.concatenate(alone))
    assert not np.array_equal(alone[0], alone[1][:5])
    real = jnp.arange(12)[None] < 5  # the padding behind a prompt counts for nothing
    np.testing.assert_array_equal(rope_table(jnp.asarray([long]), rope, real)[0][0][:5], alone[0])


def test_llama3_rope_scaling_keeps_short_waves_and_stretches_long_ones():
    scaling = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    plain = rope_frequencies(Rope(500_000.0, 128, RopeScaling())).astype(np.float64)
    expected = []
    for f in plain:  # as the reference code of Llama 3.1 writes it, by wavelength
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            expected.append(f)
        elif wavelength > 8192 / 1:
            expected.append(f / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * f / 8 + smooth * f)
    assert expected[0] == plain[0] and expected[-1] == plain[-1] / 8
    np.testing.assert_allclose(rope_frequencies(Rope(500_000.0, 128, scaling)), expected, rtol=1e-6)


def test_a_dropout_mask_belongs_to_the_example_and_the_site_whatever_the_batch():
    keys = jax.random.split(jax.random.key(0), 6)
    x = jnp.ones((6, 50, 40))

    @quick_jit
    def masks(keys):
        halves = [dropout(x[:2], 0.25, keys[:2], 3), dropout(x[2:], 0.25, keys[2:], 3)]
        return dropout(x, 0.25, keys, 3), jnp.concatenate(halves), dropout(x, 0.25, keys, 4)

    whole, halves, elsewhere = (np.asarray(m) for m in masks(keys))
    np.testing.assert_array_equal(whole, halves)
    assert not np.array_equal(whole, elsewhere)
    assert not np.array_equal(whole[0], whole[1])
    np.testing.assert_allclose(np.unique(whole), [0, 1 / 0.75], rtol=1e-6)
    assert abs(float((whole == 0).mean()) - 0.25) < 0.02
    assert dropout(x, 0.25, None, 3) is x
