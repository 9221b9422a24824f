"""Weights are stored once, in as many bits as asked, and the user's model stays as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_engine import ask, request
from test_sampler import PROMPT, decoder

from aurora_train.errors import UserError
from aurora_train.generate.engine import Engine
from aurora_train.generate.weights import decoded
from aurora_train.nn import int8, nf4

SHAPE = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 128, "tied": False}


@pytest.fixture(scope="module")
def model():
    return decoder(**SHAPE)


def test_a_kernel_in_8_bits_is_off_by_half_a_step_of_its_output_at_most():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 48, 20)) * np.arange(20), jnp.float32)
    codes, scales = int8.encode(kernel)
    off = np.abs(np.asarray(int8.decode(codes, scales, jnp.float32) - kernel))
    assert codes.dtype == jnp.int8 and (off <= np.asarray(scales) / 2 * (1 + 1e-5)).all() and not off[..., 0].any()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 48)), jnp.float32)
    found = int8.linear(x, codes[1], scales[1])
    np.testing.assert_allclose(found, x @ int8.decode(codes[1], scales[1], jnp.float32), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "nf4"])
def test_stored_weights_write_what_the_same_rounded_weights_write_without_being_stored(weights, model):
    """The logits are those of a plain model whose kernels were rounded beforehand."""
    graph, state = nnx.split(model)
    plain, before = nnx.merge(graph, jax.tree.map(jnp.copy, state)), jax.tree.leaves(state)
    form = {"int8": int8, "nf4": nf4}.get(weights)
    for _, module in nnx.iter_graph(plain):
        for name in getattr(module, "encodable", ()) if form else ():
            kernel = getattr(module, name)
            kernel.set_value(form.decode(*form.encode(kernel[...]), jnp.float32))
    plain.dtype = "bfloat16" if weights == "bfloat16" else "float32"
    engine = Engine(model, 1, 32, weights=weights)
    (heard,) = ask(engine, request(most=6, logprobs=5))
    text = jnp.asarray([PROMPT + heard.ids], jnp.int32)
    wanted = jax.nn.log_softmax(plain.logits(plain(text))[0].astype(jnp.float32), -1)[len(PROMPT) - 1 : -1]
    for token, row in zip(heard.tokens, np.asarray(wanted), strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=5e-2 if weights == "bfloat16" else 1e-3)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.split(model)[1]), strict=True))


def test_fewer_bits_are_fewer_bytes(model):
    ways = ("float32", "bfloat16", "int8", "nf4")
    held = {weights: sum(a.nbytes for a in decoded(model, weights).arrays) for weights in ways}
    kernels = sum(a.nbytes for a in jax.tree.leaves(nnx.split(model.stack)[1]) if a.ndim == 3)
    outputs = sum(4 * a.shape[0] * a.shape[2] for a in jax.tree.leaves(nnx.split(model.stack)[1]) if a.ndim == 3)
    tables = model.embedding[...].nbytes + model.head[...].nbytes
    assert held["float32"] - held["bfloat16"] == (kernels + tables) // 2
    assert held["float32"] - held["int8"] == kernels * 3 // 4 - outputs
    assert held["float32"] - held["nf4"] == kernels - kernels // 32 * 17 // 4


def test_inputs_that_no_block_of_4_bits_divides_are_refused_by_name():
    with pytest.raises(UserError, match="a kernel of 48 inputs") as caught:
        decoded(decoder(width=48, heads=4), "nf4")
    assert caught.value.hint == "weights=int8"
