"""Attention kernels against float64 NumPy loops, their gradients, what a checkpoint recomputes, and the choice."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_train.compat import jaxprs_in_params
from aurora_train.errors import UserError
from aurora_train.nn.attention import BACKENDS, Attention, Context, choose_attention
from aurora_train.nn.attention_kernels import Rule, even_lengths, masked_attention
from aurora_train.nn.block import Block, tags
from aurora_train.nn.decoder_config import DecoderConfig, Layer
from aurora_train.nn.tracing import tracing
from aurora_train.plan.verify import pretend_cudnn

# Half the compile time, the same mathematics.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNG = np.random.default_rng(1)


class Case(NamedTuple):
    """`keys`: their number where they are other tokens (cross-attention). `documents`: the rows are packed."""

    length: int
    heads: int
    kv_heads: int
    rule: Rule
    documents: bool = False
    keys: int | None = None


# length 512 is four blocks of queries, 256 two, 40 one
CASES = {
    "one block": Case(40, 2, 2, Rule(0.3)),
    "grouped": Case(256, 4, 2, Rule(0.3)),
    "documents": Case(256, 2, 1, Rule(0.3), True),
    "window": Case(512, 2, 2, Rule(0.3, window=140), True),
    "narrow window": Case(256, 2, 2, Rule(0.3, window=1)),
    "softcap": Case(256, 2, 1, Rule(0.3, window=200, softcap=2.0), True),
    "both ways": Case(256, 4, 2, Rule(0.3, mask="bidirectional")),
    "both ways, documents": Case(40, 2, 1, Rule(0.3, mask="bidirectional"), True),
    "both ways, window": Case(512, 2, 2, Rule(0.3, window=100, mask="bidirectional"), True),
    "prefix": Case(256, 2, 1, Rule(0.3, mask="prefix"), True),
    "prefix, window, softcap": Case(256, 2, 2, Rule(0.3, window=90, softcap=2.0, mask="prefix"), True),
    "cross": Case(256, 4, 2, Rule(0.3, mask="bidirectional"), keys=24),
    "cross, documents": Case(24, 2, 1, Rule(0.3, softcap=2.0, mask="bidirectional"), True, keys=37),
}


class Made(NamedTuple):
    """query, key and value in float64; the marks as a kernel takes them; what the output is multiplied by."""

    arrays: tuple
    rule: Rule
    marks: dict
    projection: np.ndarray
    sees: np.ndarray  # bool[B, T, S], by the words of the kernels' docstring


@functools.cache
def make(name):
    case = CASES[name]
    keys = case.keys or case.length
    sizes = (case.length, case.heads), (keys, case.kv_heads), (keys, case.kv_heads)
    arrays = tuple(RNG.standard_normal((2, length, h, 8)) * 2 for length, h in sizes)
    marks, rule = {"segments": None}, case.rule
    if case.documents:
        marks["segments"] = documents(case.length)
    if case.documents and case.keys:
        marks["key_segments"] = documents(keys)
    if rule.mask == "prefix":
        marks["prefix"] = RNG.random((2, keys)) < 0.3
    sees = np.zeros((2, case.length, keys), bool)
    for b, t, s in np.ndindex(sees.shape):
        both = rule.mask == "bidirectional" or rule.mask == "prefix" and marks["prefix"][b, s]
        near = rule.window is None or abs(t - s) < rule.window
        keyed = marks.get("key_segments", marks["segments"])
        same = keyed is None or keyed[b, s] == marks["segments"][b, t]
        sees[b, t, s] = (both or s <= t) and near and same
    return Made(arrays, rule, marks, RNG.standard_normal(arrays[0].shape), sees)


def documents(length):
    """All four of them in every row, so that no query of another sequence is without a key."""
    cuts = np.sort(RNG.choice(np.arange(1, length), (3,), replace=False))
    return np.tile(np.searchsorted(cuts, np.arange(length), side="right").astype(np.int32) + 1, (2, 1))


@functools.cache
def exact(name):
    made = make(name)
    return loops(made.arrays, made.rule, made.sees, made.projection)


def loops(arrays, rule, sees, projection):
    """(output, gradients of its sum times the projection) in float64: one query and one head at a time."""
    query, key, value = arrays
    out, grads = np.zeros(query.shape), [np.zeros(a.shape) for a in (query, key, value)]
    group = query.shape[2] // key.shape[2]
    for b, t, h in np.ndindex(query.shape[:3]):
        seen, k = np.flatnonzero(sees[b, t]), h // group
        raw = key[b, seen, k] @ query[b, t, h] * rule.scale
        scores = raw if rule.softcap is None else rule.softcap * np.tanh(raw / rule.softcap)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        out[b, t, h] = shares @ value[b, seen, k]
        g = projection[b, t, h]
        by_share = value[b, seen, k] @ g
        by_score = shares * (by_share - shares @ by_share)
        by_raw = by_score * rule.scale
        if rule.softcap is not None:
            by_raw = by_raw * (1 - np.tanh(raw / rule.softcap) ** 2)
        grads[0][b, t, h] = by_raw @ key[b, seen, k]
        grads[1][b, seen, k] += np.outer(by_raw, query[b, t, h])
        grads[2][b, seen, k] += np.outer(shares, g)
    return out, grads


KERNELS = [(kernel, "plain", case) for kernel in ("reference", "xla", "blocked", "cudnn") for case in CASES]
KERNELS += [("blocked", "cpu", case) for case in ("documents", "window", "prefix, window, softcap", "cross")]


def can_serve(kernel, case):
    if kernel in ("xla", "cudnn") and CASES[case].rule.softcap is not None:
        pytest.skip("the choice refuses it with a soft-cap")
    if kernel == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("there is no GPU")


@pytest.mark.parametrize("kernel,forms,case", KERNELS)
def test_a_kernel_and_its_gradients_equal_float64_loops(kernel, forms, case):
    """Values within 2e-5, gradients within 2e-5 of the largest; bfloat16 (cuDNN) within 3e-2.

    `forms`: of the products of the gradients, and of what these make anew.
    """
    can_serve(kernel, case)
    made, (expected, expected_gradients) = make(case), exact(case)
    dtype, tolerance = ("bfloat16", 3e-2) if kernel == "cudnn" else ("float32", 2e-5)
    assert_near(*computed(kernel, forms, made, dtype), expected, expected_gradients, tolerance)


@pytest.mark.parametrize("forms", ["plain", "cpu"])
@pytest.mark.parametrize("case", ["softcap", "both ways, window"])
def test_the_blocked_kernel_in_bfloat16_stays_near_them(case, forms):
    assert_near(*computed("blocked", forms, make(case), "bfloat16"), *exact(case), 3e-2)


def computed(kernel, forms, made, dtype):
    def total(arrays):
        out = BACKENDS[kernel](*arrays, made.rule, **made.marks)
        return (out.astype(jnp.float32) * made.projection).sum(), out

    with tracing(forms=forms):
        gradients, out = quick_jit(jax.grad(total, has_aux=True))([jnp.asarray(a, dtype) for a in made.arrays])
    return out, gradients


def assert_near(out, gradients, expected, expected_gradients, tolerance):
    scale = max(1.0, np.abs(expected).max()) if tolerance > 1e-3 else 1.0
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=tolerance * scale)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        scale = max(1.0, np.abs(wanted).max())  # a window of 1 has no gradient of its scores
        np.testing.assert_allclose(np.asarray(found, np.float32), wanted, atol=tolerance * scale)


@pytest.mark.parametrize("length,keys", [(7, 7), (8, 5), (5, 8)])
def test_one_query_and_one_key_more_change_nothing(length, keys):
    """What cuDNN needs where lengths are odd, held to the reference by another kernel."""
    query, key, value = (jnp.asarray(RNG.standard_normal((2, n, 2, 8)), jnp.float32) for n in (length, keys, keys))
    mask = jnp.asarray(RNG.random((2, length, keys)) < 0.5).at[..., 0].set(True)
    wide = even_lengths(query, key, value, mask)
    assert all(x.shape[1] % 2 == 0 for x in wide[:3]) and wide[3].shape[2:] == (wide[0].shape[1], wide[1].shape[1])
    found = jax.nn.dot_product_attention(*wide[:3], mask=wide[3], scale=0.3, implementation="xla")[:, :length]
    np.testing.assert_allclose(found, masked_attention(query, key, value, Rule(0.3), mask), atol=1e-6)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.rule.softcap is None])
def test_cudnn_is_asked_for_what_it_serves(case):
    """Traced as for a GPU, gradient included; that it computes the same is for a machine that has one."""
    made = make(case)

    def total(arrays):
        return BACKENDS["cudnn"](*arrays, made.rule, **made.marks).astype(jnp.float32).sum()

    with pretend_cudnn():
        jaxpr = jax.make_jaxpr(jax.grad(total))([jnp.ones(a.shape, jnp.bfloat16) for a in made.arrays])
    assert "dot_product_attention_fwd_wrapper" in str(jaxpr)


def count_dots(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == "dot_general"
        for inner in jaxprs_in_params(equation.params):
            total += count_dots(inner)
    return total


def dots_with(save):
    """Products in the gradient of one block whose checkpoint keeps the names `save` (None: no checkpoint)."""
    config = DecoderConfig(width=16, heads=2, layers=1)
    graph, state = nnx.split(Block(config, Layer(), nnx.Rngs(params=0), backend="blocked"))
    x = jnp.ones((1, 32, 16))
    angles = jnp.ones((1, 32, 4))
    context = Context(jnp.arange(32)[None], jnp.ones((1, 32), jnp.int32), ((jnp.cos(angles), jnp.sin(angles)),))

    def run(state, x):
        return nnx.merge(graph, state)(x, context, 0)[0]

    if save is not None:
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(*save))
    return count_dots(jax.make_jaxpr(jax.grad(lambda s, x: run(s, x).sum(), argnums=(0, 1)))(state, x).jaxpr)


def test_a_checkpointed_block_recomputes_only_the_attention_it_did_not_keep():
    names = tags(DecoderConfig(width=16, heads=2, layers=1), Layer(), "blocked")
    without = dots_with(None)
    everything = dots_with(names)
    assert everything - without <= 0
    keep = functools.partial(filter, lambda name: name != "attn_probs")
    assert dots_with(tuple(keep(names))) == everything + 1  # the scores again
    fewer = tuple(name for name in names if name not in ("attn_probs", "attn_stats", "attn_out"))
    assert dots_with(fewer) == everything + 2  # the attention again
    assert dots_with(()) >= everything + 7


@pytest.mark.parametrize("kv_heads,bias,qk_norm", [(4, "all", False), (2, "qkv", True)])
def test_the_attention_layer_equals_float64(kv_heads, bias, qk_norm):
    config = DecoderConfig(
        width=24, heads=4, head_dim=8, kv_heads=kv_heads, layers=1, bias=bias, qk_norm=qk_norm, positions="none"
    )
    graph, state = nnx.split(Attention(config, Layer(), nnx.Rngs(params=0), backend="blocked"))
    w = jax.tree.map(lambda p: RNG.standard_normal(p.shape) * 0.4, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), w))
    x = RNG.standard_normal((2, 12, 24))
    context = Context(jnp.zeros((2, 12), jnp.int32))
    found, cache = quick_jit(lambda x: nnx.merge(graph, state)(x, context))(jnp.asarray(x, jnp.float32))

    def project(name, heads):
        y = (x @ w[name] + w.get(f"{name}_bias", 0)).reshape(2, 12, heads, 8)
        if qk_norm and name != "value":
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + config.norm_eps) * w[f"{name}_norm"]["scale"]
        return y

    query, key, value = project("query", 4), project("key", kv_heads), project("value", kv_heads)
    sees = np.tile(np.tri(12, dtype=bool), (2, 1, 1))
    attended, _ = loops((query, key, value), Rule(8**-0.5), sees, np.zeros(query.shape))
    expected = attended.reshape(2, 12, 32) @ w["out"] + w.get("out_bias", 0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert cache is None


def test_the_choice_says_what_was_taken_and_why():
    config = DecoderConfig()
    assert choose_attention(config, "float32") == ("blocked", "by blocks of queries, a form for CPU")
    with tracing(target="gpu"):
        assert choose_attention(config, "bfloat16").name == "cudnn"
        name, reason = choose_attention(config, "float32")
        assert name == "xla" and "bfloat16" in reason
        capped = config.model_copy(update={"attention_softcap": 50.0})
        assert choose_attention(capped, "bfloat16").name == "reference"


@pytest.mark.parametrize("wish,settings", [("cudnn", {}), ("xla", {"attention_softcap": 30.0})])
def test_a_kernel_that_cannot_serve_is_refused_not_replaced(wish, settings):
    with pytest.raises(UserError) as caught:
        choose_attention(DecoderConfig(attention=wish, **settings), "bfloat16")
    assert caught.value.where == "model.attention" and caught.value.why and caught.value.hint
