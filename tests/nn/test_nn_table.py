"""Layers as rows of a table: what the short fields say in full, encoders, cross-attention, and a kind of one's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError

from aurora_train.errors import UserError
from aurora_train.nn import param
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig, Layer
from aurora_train.nn.linear import linear
from aurora_train.nn.positions import rotate
from aurora_train.nn.transformer import Transformer

# Half the compile time, the same mathematics.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SLOW = pytest.mark.slow
VOCAB, SHAPE = 31, {"width": 32, "layers": 2, "heads": 4}
RNG = np.random.default_rng(5)
TOKENS = jnp.asarray(RNG.integers(0, VOCAB, (2, 12)), jnp.int32)

T5 = [{"mlp": False}, {"kind": "cross", "rotary": 0.5}]  # of a decoder: itself, the encoder, an MLP
SHAPES = {
    "a window and NoPE": {"layer_table": [{"kind": "window", "window": 5}, {"rotary": 0.0}]},
    "shares and bases": {"layer_table": [{"rotary": 0.5, "theta": 1e6}, {"scaling": {"kind": "linear", "factor": 4}}]},
    "norms after": {"norm_place": "after", "qk_norm": "projection", "kv_heads": 2, "parallel": True},
    "norms at both ends": {"norm_place": "both", "bias": "all", "norm": "layernorm"},
    "norms of sums": {"norm_place": "sum", "norm": "layernorm", "bias": "all", "activation": "relu",
                      "layer_table": [{"mlp": False}, {}]},
    "encoder read": {"layer_table": T5, "memory_width": 24, "bias": "qkv", "qk_norm": True, "activation": "gelu"},
}


def built(make):
    graph, _ = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, quick_jit(lambda: nnx.split(make())[1])())


def decoder(kind=Decoder, mask="causal", config=DecoderConfig, **settings):
    return built(lambda: kind(config(**SHAPE | settings), VOCAB, "float32", nnx.Rngs(params=jax.random.key(0)), mask))


def run(model, *inputs, **beside):
    graph, state = nnx.split(model)
    return quick_jit(lambda state, inputs, beside: nnx.merge(graph, state)(*inputs, **beside))(state, inputs, beside)


@pytest.mark.parametrize("short,table", [
    pytest.param({}, [{}], marks=SLOW),
    pytest.param({"window": 5}, [{"kind": "window", "window": 5}], marks=SLOW),
    ({"window": 5, "window_pattern": ["local", "global"], "post_norm": True}, [{"kind": "window", "window": 5}, {}]),
])  # fmt: skip
def test_a_table_is_to_the_bit_what_the_short_fields_say(short, table):
    kept = {"norm_place": "both"} if short.get("post_norm") else {}
    one, other = decoder(**short), decoder(layer_table=table, **kept)
    states = [nnx.to_pure_dict(nnx.split(model)[1]) for model in (one, other)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    np.testing.assert_array_equal(run(one, TOKENS), run(other, TOKENS))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_config_counts_the_parameters_of_a_table(shape):
    config = DecoderConfig(**SHAPE | SHAPES[shape])
    model = nnx.eval_shape(lambda: Decoder(config, VOCAB, "float32", nnx.Rngs(params=0)))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert sum(leaf.size for leaf in leaves) == model.config.num_parameters(VOCAB)


@pytest.mark.parametrize("shape", [pytest.param(s, marks=() if s == "encoder read" else SLOW) for s in SHAPES])
def test_a_cache_gives_what_the_whole_text_gives(shape):
    model = decoder(**SHAPES[shape])
    beside = {"memory": jnp.asarray(RNG.standard_normal((2, 7, 24)), jnp.float32)} if shape == "encoder read" else {}
    graph, state = nnx.split(model)

    @quick_jit
    def extend(state, tokens, positions, caches):
        return nnx.merge(graph, state).extend(tokens, positions, caches, **beside)

    caches, parts = model.empty_caches(2, 12), []
    for t in range(0, 12, 4):
        part, caches = extend(state, TOKENS[:, t : t + 4], jnp.tile(jnp.arange(t, t + 4), (2, 1)), caches)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), run(model, TOKENS, **beside), atol=1e-4)


def test_a_share_of_each_head_is_turned_and_the_rest_stays():
    x = jnp.asarray(RNG.standard_normal((1, 3, 2, 8)), jnp.float32)
    angles = jnp.asarray(RNG.standard_normal((1, 3, 2)), jnp.float32)
    table = jnp.cos(angles), jnp.sin(angles)
    turned = rotate(x, table)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(turned[..., :4], rotate(x[..., :4], table))


def seen_by(model, position, at, **beside):
    """Whether the hidden state at `position` depends on the token `at`."""
    changed = TOKENS.at[:, at].set((TOKENS[:, at] + 1) % VOCAB)
    return bool((run(model, TOKENS, **beside)[:, position] != run(model, changed, **beside)[:, position]).any())


def test_an_encoder_sees_all_of_its_text_and_none_of_its_padding():
    model = decoder(Transformer, "bidirectional")
    segments = jnp.asarray([[1] * 9 + [0] * 3] * 2, jnp.int32)
    assert seen_by(model, 2, 8, segments=segments) and not seen_by(model, 2, 9, segments=segments)
    assert not hasattr(model, "nll")
    with pytest.raises(UserError, match="cannot continue one"):
        decoder(mask="bidirectional").extend(TOKENS, TOKENS, None)


def test_a_prefix_is_seen_from_before_it_and_the_rest_is_not():
    model = decoder(mask="prefix")
    prefix = jnp.arange(12)[None] < jnp.asarray([[5], [5]])
    assert seen_by(model, 1, 4, prefix=prefix) and not seen_by(model, 1, 5, prefix=prefix)
    assert seen_by(model, 7, 6, prefix=prefix) and not seen_by(model, 6, 7, prefix=prefix)
    graph, state = nnx.split(model)
    slots, parts, caches = jnp.pad(prefix, [(0, 0), (0, 4)]), [], model.empty_caches(2, 16)
    extend = quick_jit(lambda state, given: nnx.merge(graph, state).extend(*given, prefix=slots))
    for start, stop in ((0, 5), (5, 12)):  # the prefix is read at once, for its tokens see each other
        given = TOKENS[:, start:stop], jnp.tile(jnp.arange(start, stop), (2, 1)), caches
        part, caches = extend(state, given)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), run(model, TOKENS, prefix=prefix), atol=1e-4)
    with pytest.raises(UserError, match="needs the prefix"):
        model(TOKENS)
    with pytest.raises(UserError, match="has no prefix"):
        decoder()(TOKENS, prefix=prefix)


def test_cross_attention_reads_its_own_segment_of_the_memory_and_is_needed():
    model = decoder(**SHAPES["encoder read"])
    memory = jnp.asarray(RNG.standard_normal((2, 7, 24)), jnp.float32)
    ours, theirs = jnp.asarray([[1] * 6 + [2] * 6] * 2), jnp.asarray([[1] * 3 + [2] * 2 + [9] * 2] * 2)
    known = run(model, TOKENS, segments=ours, memory=memory, memory_segments=theirs)
    for at, sees in ((1, (True, False)), (4, (False, True)), (6, (False, False))):
        other = run(model, TOKENS, segments=ours, memory=memory.at[:, at].add(1.0), memory_segments=theirs)
        assert tuple(bool((known[:, p] != other[:, p]).any()) for p in (0, 11)) == sees
    nobody = run(model, TOKENS, segments=ours, memory=memory, memory_segments=theirs + 10)
    np.testing.assert_array_equal(
        nobody, run(model, TOKENS, segments=ours, memory=2 * memory, memory_segments=theirs + 10)
    )
    with pytest.raises(UserError, match="reads an encoder's output") as caught:
        model(TOKENS)
    assert caught.value.where == "model.layer_table" and caught.value.hint


class Decay(nnx.Module):
    """A moving average of what came before; it reports how much of its input it kept."""

    tags = ("decayed",)

    def __init__(self, config, row, rngs, **_):
        self.gate = param.kernel(rngs, (config.width, config.width), ("embed", "embed"))

    @staticmethod
    def empty_cache(config, row, batch, length, dtype):
        return jnp.zeros((batch, config.width), dtype)

    def __call__(self, x, context, cache=None):
        kept = jax.nn.sigmoid(linear(x, self.gate[...]))

        def step(state, inputs):
            kept, x = inputs
            state = kept * x + (1 - kept) * state
            return state, state

        start = jnp.zeros_like(x[:, 0]) if cache is None else cache
        state, y = jax.lax.scan(step, start, (kept.swapaxes(0, 1), x.swapaxes(0, 1)))
        return y.swapaxes(0, 1), None if cache is None else state, {"kept": jnp.float32(kept.mean(-1).sum(-1))}


class WithDecay(DecoderConfig):
    mixers = {"decay": Decay}


def test_a_kind_of_ones_own_is_a_row_like_any_other():
    model = decoder(config=WithDecay, layer_table=[{"kind": "decay"}, {}])
    blocks = nnx.to_pure_dict(nnx.split(model)[1])["stack"]["segments"][0]["blocks"]
    assert "decayed" in model.stack.tags and "gate" in blocks[0]["decay"] and "query" in blocks[1]["attention"]
    graph, state = nnx.split(model)
    hidden, sums = quick_jit(lambda state: nnx.merge(graph, state).run(TOKENS))(state)
    assert sums["kept"].shape == (2,) and not seen_by(model, 3, 4)
    part, caches = model.extend(TOKENS[:, :5], jnp.tile(jnp.arange(5), (2, 1)), model.empty_caches(2, 12))
    rest, _ = model.extend(TOKENS[:, 5:], jnp.tile(jnp.arange(5, 12), (2, 1)), caches)
    np.testing.assert_allclose(jnp.concatenate([part, rest], 1), hidden, atol=1e-4)


REFUSED = [
    ({"layer_table": [{"kind": "windw"}]}, "row 0 of layer_table is of kind 'windw'; there are full, window, cross"),
    ({"layer_table": [{}, {"rotary": 0.3}], "head_dim": 10}, "row 1 of layer_table turns 3 of a head's 10 entries"),
    ({"layer_table": [{}] * 3}, "layers (2) must be a multiple of the 3 rows"),
    ({"layer_table": []}, "layer_table has no row"),
    ({"layer_table": [{}], "window": 4}, "leave window and window_pattern out"),
    ({"layer_table": [{"theta": 1e6}], "positions": "none"}, "row 0 of layer_table has rotary positions"),
    ({"layer_table": [{"kind": "window"}]}, "needs its window"),
    ({"layer_table": [{"window": 4}]}, "a layer of kind full has no window; kind: window has"),
    ({"norm_place": "after", "post_norm": True}, "leave post_norm out"),
    ({"norm_place": "sum", "post_norm": True}, "leave post_norm out"),
    ({"norm_place": "sum", "parallel": True}, "norm_place: sum needs two"),
]


@pytest.mark.parametrize("settings,message", REFUSED)
def test_a_table_that_cannot_be_is_refused_with_what_would_work(settings, message):
    with pytest.raises(ValidationError) as caught:
        DecoderConfig(**SHAPE | settings)
    assert message in str(caught.value)


def test_rows_have_what_the_model_says_unless_they_say_otherwise():
    config = DecoderConfig(**SHAPE, rope_theta=5e5, layer_table=[{}, {"theta": 1e6}])
    assert [rope.theta for rope in config.ropes] == [5e5, 1e6]
    assert config.rope(Layer(rotary=0.0)) is None and config.rope(Layer(rotary=0.5)).dims == 4
