"""The whole decoder: documents in a packed row, dropout, precision, plans, names and initial values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.stack import Segment

# Half the compile time, the same mathematics.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
VOCAB = 31
RNG = np.random.default_rng(3)
SHAPES = {
    "plain": {},
    "learned": {"positions": "learned", "max_length": 48, "norm": "layernorm", "bias": "all", "activation": "gelu"},
    "gemma": {
        "window": 5, "window_pattern": ["local", "global"], "kv_heads": 1, "post_norm": True, "norm_offset": True,
        "attention_softcap": 5.0, "logit_softcap": 5.0, "embed_scale": True, "activation": "geglu",
    },
    "parallel": {"parallel": True, "qk_norm": True, "tied": False, "bias": "qkv", "head_dim": 10},
}  # fmt: skip


def make(dtype, settings):
    config = DecoderConfig(**({"width": 32, "layers": 2, "heads": 4} | settings))
    return Decoder(config, VOCAB, dtype, nnx.Rngs(params=jax.random.key(0)))


def abstract(**settings):
    return nnx.eval_shape(lambda: make("float32", settings))


def decoder(dtype="float32", **settings):
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(dtype, settings)))
    return nnx.merge(graph, quick_jit(lambda: nnx.split(make(dtype, settings))[1])())


def packed_row(*lengths):
    """tokens, segments, positions of documents in one row of a batch of one."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    tokens = RNG.integers(0, VOCAB, segments.size)
    return (jnp.asarray(x[None], jnp.int32) for x in (tokens, segments, positions))


def run(model, *inputs):
    """Hidden states, compiled once for a graph: eager layers are an order slower."""
    return _run(*nnx.split(model), *inputs)


@functools.partial(quick_jit, static_argnums=0)
def _run(graph, state, *inputs):
    return nnx.merge(graph, state)(*inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_row_gives_each_document_what_it_gets_alone(shape):
    model = decoder(**SHAPES[shape])
    tokens, segments, positions = packed_row(9, 20, 14)
    packed = model.logits(run(model, tokens, segments, positions))
    for start, stop in ((0, 9), (9, 29), (29, 43)):
        alone = jnp.zeros_like(tokens).at[:, : stop - start].set(tokens[:, start:stop])
        order = jnp.arange(tokens.shape[1])[None]
        found = model.logits(run(model, alone, jnp.ones_like(alone), order))[:, : stop - start]
        np.testing.assert_allclose(packed[:, start:stop], found, atol=1e-5)


def test_no_token_sees_a_later_one():
    model = decoder()
    tokens, *_ = packed_row(40)
    changed = tokens.at[0, 25].set((tokens[0, 25] + 1) % VOCAB)
    one, other = run(model, tokens), run(model, changed)
    np.testing.assert_array_equal(one[:, :25], other[:, :25])
    assert (one[:, 25:] != other[:, 25:]).any(-1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_config_counts_the_parameters_the_model_has(shape):
    model = abstract(**SHAPES[shape])
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert sum(leaf.size for leaf in leaves) == model.config.num_parameters(VOCAB)


def test_dropout_depends_on_the_example_and_not_on_the_microbatch():
    model = decoder(dropout=0.3)
    tokens = jnp.asarray(RNG.integers(0, VOCAB, (4, 16)), jnp.int32)
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(16), (4, 16))
    keys = jax.random.split(jax.random.key(5), 4)
    whole = run(model, tokens, ones, positions, keys)
    halves = [run(model, tokens[i : i + 2], ones[:2], positions[:2], keys[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(whole, jnp.concatenate(halves), atol=1e-5)
    same_tokens = run(model, jnp.repeat(tokens[:1], 4, 0), ones, positions, keys)
    assert not np.allclose(same_tokens[0], same_tokens[1], atol=1e-2)


def loss_and_gradients(model, seed=0):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (2, 33)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (2, 32)), jnp.float32)
    graph, state = nnx.split(model)

    def mean(state):
        model = nnx.merge(graph, state)
        total, weight = model.nll(model(tokens[:, :-1], jnp.ones((2, 32), jnp.int32)), tokens[:, 1:], weights)
        return total / weight

    loss, gradients = quick_jit(jax.value_and_grad(mean))(state)
    return float(loss), nnx.to_pure_dict(gradients)


@functools.cache
def exact_loss_and_gradients():
    return loss_and_gradients(decoder(**SHAPES["parallel"]))


def test_bfloat16_compute_stays_near_float32_and_keeps_float32_gradients():
    loss, gradients = exact_loss_and_gradients()
    assert loss == pytest.approx(np.log(VOCAB), rel=0.2)
    low_loss, low_gradients = loss_and_gradients(decoder("bfloat16", **SHAPES["parallel"]))
    assert low_loss == pytest.approx(loss, rel=5e-3)
    for low, exact in zip(jax.tree.leaves(low_gradients), jax.tree.leaves(gradients), strict=True):
        assert low.dtype == jnp.float32
        assert float(jnp.abs(low - exact).max()) < 0.1 * float(jnp.abs(exact).max()) + 1e-4


def test_a_plan_that_recomputes_gives_the_same_gradients():
    loss, gradients = exact_loss_and_gradients()
    planned = decoder(**SHAPES["parallel"])
    planned.stack.cut((Segment(0, 2, ("attn_out", "attn_stats", "mlp_up")),))
    planned_loss, planned_gradients = loss_and_gradients(planned)
    assert planned_loss == pytest.approx(loss, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), planned_gradients, gradients)


def test_every_tag_a_plan_may_name_is_really_in_the_block():
    for shape in SHAPES.values():
        graph, state = nnx.split(abstract(**shape))

        def total(state, graph=graph):
            return nnx.merge(graph, state)(jnp.zeros((1, 8), jnp.int32)).sum()

        traced = str(jax.make_jaxpr(jax.grad(total))(state))
        names = {part.split("]")[0].strip() for part in traced.split("name[name=")[1:]}
        assert names == set(nnx.merge(graph, state).stack.tags)


def test_token_nll_and_nll_agree():
    model = decoder(loss_chunk=16)
    tokens = jnp.asarray(RNG.integers(0, VOCAB, (2, 24)), jnp.int32)
    hidden = run(model, tokens)
    weights = jnp.asarray(RNG.random((2, 24)), jnp.float32)
    total, weight = model.nll(hidden, tokens, weights)
    np.testing.assert_allclose(total, (model.token_nll(hidden, tokens) * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)


def test_parameters_carry_logical_names_and_stand_stacked_over_layers():
    state = nnx.state(abstract(tied=False), nnx.Param)
    names = {
        "/".join(map(str, path)): variable.get_metadata()["out_sharding"]
        for path, variable in nnx.to_flat_state(state)
    }
    at = "stack/segments/0/"
    assert names["embedding"] == ("vocab", "embed") and names["head"] == ("embed", "vocab")
    assert names[at + "attention/query"] == ("layers", "embed", "heads")
    assert names[at + "attention/key"] == names[at + "attention/value"] == ("layers", "embed", "kv_heads")
    assert names[at + "attention/out"] == ("layers", "heads", "embed")
    assert names[at + "mlp/gate"] == names[at + "mlp/up"] == ("layers", "embed", "mlp")
    assert names[at + "mlp/down"] == ("layers", "mlp", "embed")
    assert names[at + "attn_norm/scale"] == ("layers", "norm") and names["final_norm/scale"] == ("norm",)


def test_initial_kernels_scale_with_fan_in_and_residual_ones_with_depth():
    weights = nnx.to_pure_dict(nnx.state(decoder(width=128, layers=8), nnx.Param))
    unit = weights["stack"]["segments"][0]
    hidden = unit["mlp"]["up"].shape[-1]
    assert float(unit["attention"]["query"].std()) == pytest.approx(128**-0.5, rel=0.03)
    assert float(unit["attention"]["out"].std()) == pytest.approx(128**-0.5 / 4, rel=0.03)
    assert float(unit["mlp"]["down"].std()) == pytest.approx(hidden**-0.5 / 4, rel=0.03)
