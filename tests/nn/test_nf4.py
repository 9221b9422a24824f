"""NF4 against the paper and a reference in float64, and the product that reads it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_train.nn import lora, nf4
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig, Lora
from aurora_train.nn.linear import linear
from aurora_train.nn.param import parameter_count
from aurora_train.nn.stack import Segment
from aurora_train.nn.tracing import tracing

TOKENS = np.arange(48, dtype=np.int32).reshape(2, 24) % 61
SHAPE = {"width": 64, "layers": 3, "heads": 4, "kv_heads": 2, "mlp_width": 128, "tied": False, "bias": "all"}


def reference(kernel):
    """The kernel as it reads back, in float64: the nearest level of each weight over its block's largest magnitude."""
    blocks = np.asarray(kernel, np.float64).reshape(-1, nf4.BLOCK, kernel.shape[-1])
    scales = np.abs(blocks).max(1, keepdims=True).astype(jnp.bfloat16).astype(np.float64)
    share = blocks / np.where(scales > 0, scales, 1)
    nearest = np.abs(share[..., None] - nf4.LEVELS.astype(np.float64)).argmin(-1)
    return (nf4.LEVELS.astype(np.float64)[nearest] * scales).reshape(kernel.shape)


def test_the_levels_are_quantiles_of_a_normal_distribution():
    """Appendix E: eight intervals of equal probability above zero, seven below, their ends averaged over two tails."""
    from scipy.stats import norm

    offset = 0.9677083
    upper, lower = norm.ppf(np.linspace(offset, 0.5, 9)[:-1]), -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([upper, [0.0], lower]))
    np.testing.assert_allclose(nf4.LEVELS, levels / levels.max(), atol=1e-6)


SIZES = st.sampled_from([1e-20, 1e-3, 1.0, 1e20])


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 3]), st.sampled_from([1, 5]), st.integers(0, 2**31), SIZES)
def test_a_kernel_reads_back_as_the_nearest_levels(blocks, outputs, seed, size):
    draw = np.random.default_rng(seed)
    kernel = (draw.standard_normal((blocks * nf4.BLOCK, outputs)) * size).astype(np.float32)
    kernel[:, 0] = 0
    codes, scales = jax.jit(nf4.encode)(kernel)
    assert codes.nbytes + scales.nbytes == kernel.size * 4.25 / 8
    read = np.asarray(nf4.decode(codes, scales, jnp.float32))
    assert not read[:, 0].any()
    # Where a weight lies in the middle between two levels, float32 may take the other one: then it is as near.
    told, known = np.abs(read - kernel), np.abs(reference(kernel) - kernel)
    np.testing.assert_allclose(told, known, atol=1e-6 * size * np.abs(kernel / size).max())
    again = jax.jit(nf4.encode)(read)
    np.testing.assert_array_equal(nf4.decode(*again, jnp.float32), read)


def test_a_normal_kernel_loses_a_tenth_of_itself_and_less_than_evenly_spaced_levels():
    kernel = np.random.default_rng(0).standard_normal((1024, 256)).astype(np.float32)
    lost = np.asarray(nf4.decode(*nf4.encode(jnp.asarray(kernel)), jnp.float32)) - kernel
    blocks = kernel.reshape(-1, nf4.BLOCK, 256)
    step = np.abs(blocks).max(1, keepdims=True) / 7
    even = np.round(blocks / step) * step - blocks
    assert 0.08 < lost.std() < 0.10 and lost.std() < 0.9 * even.std()


@pytest.mark.parametrize("form", ["plain", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_is_that_of_the_kernel_as_read_and_so_is_its_gradient(dtype, form):
    draw = np.random.default_rng(1)
    kernel = draw.standard_normal((128, 48)).astype(np.float32)
    x = jnp.asarray(draw.standard_normal((2, 5, 128)), dtype)
    codes, scales = nf4.encode(jnp.asarray(kernel))
    low = nf4.decode(codes, scales, dtype)

    def loss(product, x):
        return (product(x).astype(jnp.float32) ** 2).sum()

    with tracing(forms=form):
        for function in (loss, jax.grad(loss, 1)):
            told = jax.jit(functools.partial(function, lambda x: nf4.linear(x, codes, scales)))(x)
            known = jax.jit(functools.partial(function, lambda x: linear(x, low)))(x)
            np.testing.assert_array_equal(told, known)
    wide, kernel = np.asarray(x, np.float64), np.asarray(low, np.float64)
    exact = 2 * wide @ kernel @ kernel.T  # the slope of the squares
    close = (1e-5 if dtype == "float32" else 2e-2) * np.abs(exact).max()
    np.testing.assert_allclose(np.asarray(told, np.float64), exact, atol=close)


def made(base, save=None):
    def build():
        lora_of = Lora(rank=4, base=base)
        model = Decoder(DecoderConfig(**SHAPE, lora=lora_of), 64, "float32", nnx.Rngs(params=jax.random.key(5)))
        model.stack.cut((Segment(0, 3, save),))
        return model

    graph, variables, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    _, state, others = jax.jit(lambda: nnx.split(build(), nnx.Param, ...))()
    return graph, state, others


def test_the_kernels_of_the_blocks_are_coded_as_they_were_drawn_and_nothing_else_is():
    coded, plain = (nnx.to_pure_dict(made(base)[1]) for base in ("nf4", "compute"))
    assert parameter_count(coded) == parameter_count(plain) == sum(map(np.size, jax.tree.leaves(plain)))
    units, known = (tree["stack"]["segments"][0] for tree in (coded, plain))
    for part in ("attention", "mlp"):
        for name in known[part]:
            if name in ("query", "key", "value", "out", "gate", "up", "down"):
                codes, scales = units[part].pop(name + nf4.CODES), units[part].pop(name + nf4.SCALES)
                for told, wanted in zip((codes, scales), nf4.encode(known[part][name]), strict=True):
                    np.testing.assert_array_equal(told, wanted, err_msg=name)
            else:
                np.testing.assert_array_equal(units[part].pop(name), known[part][name], err_msg=name)
        assert not units[part]
    np.testing.assert_array_equal(coded["embedding"], plain["embedding"])


@pytest.mark.parametrize("save", [None, *(pytest.param(save, marks=pytest.mark.release)
                                         for save in ((), ("mlp_up", "query")))])  # fmt: skip
def test_a_model_and_its_adapters_gradients_are_those_of_the_base_as_read(save):
    graph, coded, rest = made("nf4", save)
    plain_graph, plain, _ = made("compute", save)
    read = nnx.to_pure_dict(plain)
    for part in ("attention", "mlp"):
        unit = nnx.to_pure_dict(coded)["stack"]["segments"][0][part]
        for name in [n for n in unit if n.endswith(nf4.CODES)]:
            short = name.removesuffix(nf4.CODES)
            read["stack"]["segments"][0][part][short] = nf4.decode(unit[name], unit[short + nf4.SCALES], jnp.float32)
    nnx.replace_by_pure_dict(plain, read)

    def losses(graph, state):
        trained, frozen = lora.split(state)

        def loss(trained):
            model = nnx.merge(graph, trained, frozen, rest)
            return model.nll(model(TOKENS), TOKENS, jnp.ones(TOKENS.shape))[0]

        return jax.jit(jax.value_and_grad(loss))(trained)

    (told, grads), (known, wanted) = losses(graph, coded), losses(plain_graph, plain)
    np.testing.assert_allclose(told, known, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("field", ["width", "mlp_width"])
def test_sizes_that_blocks_do_not_divide_are_refused_with_the_size(field):
    with pytest.raises(ValueError, match=rf"{field} \(96\) to be a multiple of 64"):
        DecoderConfig(**{**SHAPE, field: 96}, lora=Lora(base="nf4"))
