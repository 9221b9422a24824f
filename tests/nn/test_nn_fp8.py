"""Products of 8-bit operands, held to float64 sums of operands that ml_dtypes rounds, and which units take them."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.linen import fp8_ops
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_train.compat import jaxprs_in_params
from aurora_train.errors import UserError
from aurora_train.nn import fp8, lora
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig, Lora
from aurora_train.nn.linear import linear
from aurora_train.nn.stack import Segment
from aurora_train.nn.tracing import forms, tracing

RNG = np.random.default_rng(11)
FORMATS = [fp8.FORWARD, fp8.GRADIENT]


def rounded(x, dtype) -> np.ndarray:
    """float64: x as 8 bits hold it, by the definition of the scale and ml_dtypes' own rounding."""
    wide = np.asarray(x, np.float64)
    scale = 2.0 ** np.ceil(np.log2(np.abs(wide).max() / float(ml_dtypes.finfo(dtype).max)))
    return (wide / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


@pytest.mark.parametrize("form", ["plain", "cpu"])
@pytest.mark.parametrize("master", [jnp.float32, jnp.bfloat16])
def test_a_product_and_its_gradients_are_those_of_the_rounded_operands(form, master):
    x = jnp.asarray(RNG.standard_normal((3, 16, 64)) * 3, jnp.bfloat16)
    weight = jnp.asarray(RNG.standard_normal((64, 48)) * 0.1, master)
    bias = jnp.asarray(RNG.standard_normal(48), jnp.float32)
    g = jnp.asarray(RNG.standard_normal((3, 16, 48)) * 1e-4, jnp.bfloat16)

    @jax.jit
    def both(x, weight, bias, g):
        y, backward = jax.vjp(linear, x, weight, bias)
        return y, *backward(g)

    with tracing(forms=form, in_8_bits=True):
        y, dx, dweight, dbias = both(x, weight, bias, g)
    rows, low, sent = (rounded(a, dt) for a, dt in ((x, fp8.FORWARD), (weight, fp8.FORWARD), (g, fp8.GRADIENT)))
    assert (y.dtype, dx.dtype, dweight.dtype) == (jnp.bfloat16, jnp.bfloat16, master)
    # The product and the sum with the bias are each rounded to bfloat16.
    wanted, near = rows @ low, {"rtol": 2**-8, "atol": 2**-8 * np.abs(rows @ low).max()}
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted + np.asarray(bias, np.float64), **near)
    np.testing.assert_allclose(np.asarray(dx, np.float64), sent @ low.T, rtol=2**-8, atol=1e-9)
    wanted = rows.reshape(-1, 64).T @ sent.reshape(-1, 48)
    least = 2**-8 if master == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(dweight, np.float64), wanted, rtol=least, atol=1e-5 * np.abs(wanted).max())
    wanted = np.asarray(g, np.float64).sum((0, 1))
    np.testing.assert_allclose(np.asarray(dbias), wanted, atol=2**-7 * np.abs(wanted).max())
    assert not np.allclose(rows @ low, np.asarray(x, np.float64) @ np.asarray(weight, np.float64), rtol=2**-8)


@pytest.mark.parametrize("dtype", FORMATS)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40), st.integers(-20, 20))
@settings(max_examples=100, deadline=None)
def test_a_scale_is_a_power_of_two_that_uses_the_upper_half_of_the_range(dtype, numbers, shift):
    x = np.asarray(numbers, np.float32)
    coded = fp8.quantize(jnp.asarray(x), dtype)
    values, scale = np.asarray(coded.values).astype(np.float64), float(coded.scale)
    most = float(ml_dtypes.finfo(dtype).max)
    assert np.frexp(scale)[0] == 0.5 and np.isfinite(values).all()
    if np.abs(x).max() < 1e-20:
        assert scale >= 2.0**-100  # nothing to be gained below
        return
    assert most / 2 * 0.93 <= np.abs(values).max() <= most
    assert np.array_equal(values * scale, rounded(x, dtype))
    moved = fp8.quantize(jnp.asarray(x * np.float32(2.0**shift)), dtype)
    assert float(moved.scale) == scale * 2.0**shift and np.array_equal(np.asarray(moved.values), coded.values)


@pytest.mark.parametrize("dtype", FORMATS)
def test_values_are_those_of_flax_at_the_same_scale(dtype):
    x = jnp.asarray(RNG.standard_normal(4096) * np.exp(RNG.standard_normal(4096) * 3), jnp.float32)
    coded = fp8.quantize(x, dtype)
    theirs = fp8_ops.quantize(x, dtype, coded.scale, jnp.float32)
    assert np.array_equal(np.asarray(coded.values), np.asarray(theirs))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_seen_in_every_product(bad):
    """flax's own scaling clips an infinity to the largest number, after which a step looks sound."""
    x = jnp.ones((16, 16), jnp.bfloat16)
    with tracing(in_8_bits=True):
        y, backward = jax.vjp(linear, x, jnp.ones((16, 16)))
        assert np.isfinite(y).all() and not np.isfinite(linear(x.at[2, 3].set(bad), jnp.ones((16, 16)))).any()
        assert not any(np.isfinite(part).any() for part in backward(y.at[0, 0].set(bad)))


def test_zeros_stay_zeros():
    with tracing(in_8_bits=True):
        y, backward = jax.vjp(linear, jnp.zeros((16, 16), jnp.bfloat16), jnp.zeros((16, 16)))
        assert not np.any(y) and not any(np.any(part) for part in backward(y))


# ---- in a model


SHAPE = {"width": 32, "layers": 4, "heads": 2, "max_length": 64, "bias": "all"}
TOKENS = jnp.asarray(RNG.integers(0, 64, (2, 16)), jnp.int32)


def gradients(ends=None, cut=None, **settings):
    """(gradients of a small model by dotted name, the jaxpr). `ends` None: in bfloat16."""
    if settings:
        return _gradients(ends, cut, **settings)
    return _kept(ends, cut and tuple(cut), forms())


@functools.cache  # the same few gradients serve several tests
def _kept(ends, cut, form):
    return _gradients(ends, cut)


def _gradients(ends, cut, **settings):
    with tracing(fp8_ends=ends):
        model = Decoder(DecoderConfig(**SHAPE | settings), 64, "bfloat16", nnx.Rngs(params=0))
        model.stack.cut(tuple(cut or [Segment(0, 4)]), ends or 0)
        graph, state, rest = nnx.split(model, nnx.Param, ...)
        trained, still = lora.split(state)

        def loss(trained):
            merged = nnx.merge(graph, trained, still, rest)
            return merged.nll(merged(TOKENS), TOKENS, jnp.ones(TOKENS.shape))[0]

        return jax.jit(jax.grad(loss))(trained), jax.make_jaxpr(jax.grad(loss))(trained)


def stacked(grads) -> dict[str, np.ndarray]:
    """Of the units in order, however they were cut."""
    segments = nnx.to_pure_dict(grads)["stack"]["segments"].values()
    parts = [jax.tree.leaves_with_path(segment) for segment in segments]
    return {jax.tree_util.keystr(part[0][0]): np.concatenate([p[1] for p in part]) for part in zip(*parts, strict=True)}


def test_blocks_multiply_in_8_bits_where_they_are_asked_to_and_nothing_else_does():
    exact, plain = gradients()
    coded, program = gradients(0)
    plain, program = str(plain), str(program)
    assert "f8" not in plain and "f8_e4m3fn" in program and "f8_e5m2" in program
    for name, one in stacked(exact).items():
        other = stacked(coded)[name]
        assert not np.array_equal(one, other), name
        assert np.linalg.norm(one - other) < 0.3 * np.linalg.norm(one), name  # measured: at most 0.2, of keys


@pytest.mark.parametrize("cut", [
    [Segment(0, 4)], [Segment(0, 4, (), True)], [Segment(0, 2, ("mlp_up",)), Segment(2, 4)]
])  # fmt: skip
def test_ends_that_stay_in_bfloat16_are_segments_of_their_own(cut):
    with tracing(fp8_ends=1):
        model = Decoder(DecoderConfig(**SHAPE), 64, "bfloat16", nnx.Rngs(params=0))
        model.stack.cut(tuple(cut), 1)
        edges = [(s.start, s.stop) for s in model.stack.plan]
        assert edges[0] == (0, 1) and edges[-1] == (3, 4) and all(b - a <= 2 for a, b in edges)
        narrow = [bool(model.stack._is_quantized(s)) for s in model.stack.plan]
    assert not narrow[0] and not narrow[-1] and all(narrow[1:-1])


@pytest.mark.slow
def test_the_last_block_kept_in_bfloat16_has_the_bias_gradient_of_a_bfloat16_one():
    """What reaches the last block on the way back is the head's, alike but for what came in on the way there."""
    exact, kept, coded = (stacked(gradients(ends)[0]) for ends in (None, 1, 0))
    name = next(name for name in exact if "down_bias" in name)
    assert np.abs(kept[name][3] - exact[name][3]).max() <= np.abs(coded[name][3] - exact[name][3]).max()
    weight = next(name for name in exact if "'down'" in name)
    off = [np.linalg.norm(found[weight][3] - exact[weight][3]) for found in (kept, coded)]
    assert off[0] < 0.7 * off[1]  # measured: half


@pytest.mark.slow
def test_every_plan_computes_the_same_but_for_rounding():
    """What bfloat16 rounds another way falls on another 8-bit number: plans differ by as much as 8 bits lose."""
    cuts = [Segment(0, 4)], [Segment(0, 1, ()), Segment(1, 4, ("mlp_up",))]
    one, other = (stacked(gradients(0, cut)[0]) for cut in cuts)
    for name, grad in one.items():
        assert np.linalg.norm(grad - other[name]) < 0.2 * np.linalg.norm(grad), name


def eighths(jaxpr) -> int:
    """Products of two arrays of 8 bits in a program of the form "plain"; a loop's body counts once."""
    inner = sum(eighths(body) for equation in jaxpr.eqns for body in jaxprs_in_params(equation.params))
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    return inner + sum(all(v.aval.dtype in FORMATS for v in e.invars) for e in products)


@pytest.mark.slow
def test_adapters_stay_in_bfloat16_beside_a_frozen_base_in_8_bits():
    """A kernel takes three products: forward, and for the two gradients."""
    unit = {"width": 32, "layers": 1, "heads": 2, "max_length": 64, "lora": Lora(rank=16)}
    found = {}
    for precision, ends in (("fp8", 0), ("bfloat16", None)):
        with tracing(fp8_ends=ends, forms="plain"):
            model = Decoder(DecoderConfig(**unit), 64, "bfloat16", nnx.Rngs(params=0))
            graph, state, rest = nnx.split(model, nnx.Param, ...)
            trained, still = lora.split(state)

            def loss(trained, graph=graph, still=still, rest=rest):
                merged = nnx.merge(graph, trained, still, rest)
                return merged.nll(merged(TOKENS), TOKENS, jnp.ones(TOKENS.shape))[0]

            found[precision] = eighths(jax.make_jaxpr(jax.grad(loss))(trained))
    assert found == {"fp8": 3 * 7, "bfloat16": 0}  # query, key, value, out, gate, up, down


@pytest.mark.slow
def test_a_segment_left_out_of_8_bits_would_be_seen():
    with tracing(forms="plain"):
        counts = [eighths(gradients(ends, [Segment(0, 4, None, True)])[1]) for ends in (0, 1)]
    assert counts == [4 * 3 * 7, 2 * 3 * 7]  # four units, or the two in the middle


def test_what_8_bits_cannot_serve_is_refused():
    with pytest.raises(UserError, match="4-bit codes"):
        gradients(0, width=64, lora=Lora(rank=4, base="nf4"))
    with pytest.raises(UserError, match="nothing is left") as refused:
        gradients(2)
    assert "train.bf16_ends=1 at most" in str(refused.value.hint)
    plain = jax.make_jaxpr(lambda x: x @ x)(jnp.ones((4, 4)))
    fp8.refuse_unused(plain)
    with tracing(fp8_ends=0), pytest.raises(UserError, match="nothing in this model is multiplied in fp8"):
        fp8.refuse_unused(plain)


@pytest.mark.parametrize("form", ["plain", "cpu"])
def test_sizes_that_a_tensor_core_would_not_choose_are_served(form):
    x, weight = jnp.asarray(RNG.standard_normal((5, 24)), jnp.bfloat16), jnp.asarray(RNG.standard_normal((24, 7)))
    with tracing(forms=form, in_8_bits=True):
        y = jax.jit(linear)(x, weight)
    wanted = rounded(x, fp8.FORWARD) @ rounded(weight, fp8.FORWARD)
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=2**-8, atol=2**-8 * np.abs(wanted).max())
