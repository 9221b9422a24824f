"""Attention kernels against float64 NumPy loops, their gradients, what a checkpoint recomputes, and the choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_train.compat import jaxprs_in_params
from aurora_train.errors import UserError
from aurora_train.nn.attention import Attention, Context, choose_attention
from aurora_train.nn.attention_kernels import BACKENDS, Rule
from aurora_train.nn.block import Block
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.ops import asking
from aurora_train.nn.platform import target_platform

# Half the compile time, the same mathematics.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNG = np.random.default_rng(1)
# length 512 is four blocks of queries, 256 two, 40 one
CASES = {
    "one block": (40, 2, 2, Rule(0.3), False),
    "grouped": (256, 4, 2, Rule(0.3), False),
    "documents": (256, 2, 1, Rule(0.3), True),
    "window": (512, 2, 2, Rule(0.3, window=140), True),
    "narrow window": (256, 2, 2, Rule(0.3, window=1), False),
    "softcap": (256, 2, 1, Rule(0.3, window=200, softcap=2.0), True),
}


@functools.cache
def make(case):
    """query, key, value in float64, the rule, segments or None, and the exact answer."""
    length, heads, kv_heads, rule, packed = CASES[case]
    query, key, value = (RNG.standard_normal((2, length, h, 8)) * 2 for h in (heads, kv_heads, kv_heads))
    segments = np.sort(RNG.integers(1, 5, (2, length)), axis=1).astype(np.int32) if packed else None
    return (query, key, value), rule, segments, exact(query, key, value, rule, segments)


def exact(query, key, value, rule, segments):
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for b, t, h in np.ndindex(query.shape[:3]):
        first = 0 if rule.window is None else max(0, t - rule.window + 1)
        seen = [s for s in range(first, t + 1) if segments is None or segments[b, s] == segments[b, t]]
        scores = key[b, seen, h // group] @ query[b, t, h] * rule.scale
        if rule.softcap is not None:
            scores = rule.softcap * np.tanh(scores / rule.softcap)
        shares = np.exp(scores - scores.max())
        out[b, t, h] = shares / shares.sum() @ value[b, seen, h // group]
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["reference", "xla", "blocked"])
def test_a_kernel_equals_float64_loops(backend, case):
    arrays, rule, segments, expected = make(case)
    if backend == "xla" and rule.softcap is not None:
        pytest.skip("the choice refuses xla with a soft-cap")
    kernel = quick_jit(lambda *qkv: BACKENDS[backend](*qkv, rule, segments))
    np.testing.assert_allclose(kernel(*(jnp.asarray(a, jnp.float32) for a in arrays)), expected, atol=2e-5)


@pytest.mark.parametrize("case", ["grouped", "documents", "softcap"])
@pytest.mark.parametrize("backend,forms", [*((name, "cpu") for name in ("reference", "xla", "blocked")),
                                           ("blocked", "plain")])  # fmt: skip
def test_a_gradient_equals_the_slope_of_float64_loops(backend, forms, case):
    """`forms`: of the products of the gradients, and of what these make anew. Within 1e-4 of a float64 difference."""
    arrays, rule, segments, _ = make(case)
    if backend == "xla" and rule.softcap is not None:
        pytest.skip("the choice refuses xla with a soft-cap")
    projection, step = RNG.standard_normal(arrays[0].shape), 1e-5
    directions = [RNG.standard_normal(a.shape) for a in arrays]
    ahead, behind = (
        exact(*(a + s * d for a, d in zip(arrays, directions, strict=True)), rule, segments) for s in (step, -step)
    )
    expected = ((ahead - behind) * projection).sum() / (2 * step)

    def total(args):
        return (BACKENDS[backend](*args, rule, segments) * jnp.asarray(projection, jnp.float32)).sum()

    with asking({"linear": forms, "activation": forms}):
        gradients = quick_jit(jax.grad(total))([jnp.asarray(a, jnp.float32) for a in arrays])
    found = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("forms", ["plain", "cpu"])
@pytest.mark.parametrize(
    "case,dtype,tolerance", [*((case, "float32", 1e-5) for case in CASES), ("softcap", "bfloat16", 3e-2)]
)
def test_the_blocked_gradient_equals_that_of_the_reference(case, dtype, tolerance, forms):
    arrays, rule, segments, _ = make(case)
    projection = RNG.standard_normal(arrays[0].shape).astype(np.float32)

    def gradients(backend, dtype):
        def total(args):
            return (BACKENDS[backend](*args, rule, segments).astype(jnp.float32) * projection).sum()

        return quick_jit(jax.grad(total))([jnp.asarray(a, dtype) for a in arrays])

    with asking({"linear": forms, "activation": forms}):
        ours = gradients("blocked", dtype)
    for found, expected in zip(ours, gradients("reference", "float32"), strict=True):
        scale = max(1.0, float(jnp.abs(expected).max()))  # a window of 1 has no gradient of its scores
        np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=tolerance * scale)


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
    graph, state = nnx.split(Block(config, None, "blocked", nnx.Rngs(params=0)))
    x = jnp.ones((1, 32, 16))
    angles = jnp.ones((1, 32, 4))
    context = Context(jnp.arange(32)[None], jnp.ones((1, 32), jnp.int32), (jnp.cos(angles), jnp.sin(angles)))

    def run(state, x):
        return nnx.merge(graph, state)(x, context, 0)[0]

    if save is not None:
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(*save))
    return count_dots(jax.make_jaxpr(jax.grad(lambda s, x: run(s, x).sum(), argnums=(0, 1)))(state, x).jaxpr)


def test_a_checkpointed_block_recomputes_only_the_attention_it_did_not_keep():
    tags = Block(DecoderConfig(width=16, heads=2, layers=1), None, "blocked", nnx.Rngs(params=0)).tags
    without = dots_with(None)
    everything = dots_with(tags)
    assert everything - without <= 0
    keep = functools.partial(filter, lambda name: name != "attn_probs")
    assert dots_with(tuple(keep(tags))) == everything + 1  # the scores again
    fewer = tuple(name for name in tags if name not in ("attn_probs", "attn_stats", "attn_out"))
    assert dots_with(fewer) == everything + 2  # the attention again
    assert dots_with(()) >= everything + 7


@pytest.mark.parametrize("kv_heads,bias,qk_norm", [(4, "all", False), (2, "qkv", True)])
def test_the_attention_layer_equals_float64(kv_heads, bias, qk_norm):
    config = DecoderConfig(
        width=24, heads=4, head_dim=8, kv_heads=kv_heads, layers=1, bias=bias, qk_norm=qk_norm, positions="none"
    )
    graph, state = nnx.split(Attention(config, None, "blocked", nnx.Rngs(params=0)))
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

    attended = exact(project("query", 4), project("key", kv_heads), project("value", kv_heads), Rule(8**-0.5), None)
    expected = attended.reshape(2, 12, 32) @ w["out"] + w.get("out_bias", 0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert cache is None


def test_the_choice_says_what_was_taken_and_why():
    config = DecoderConfig()
    assert choose_attention(config, "float32") == ("blocked", "block-causal form for CPU")
    with target_platform("gpu"):
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
