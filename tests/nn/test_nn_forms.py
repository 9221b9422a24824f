"""The two forms of operations: who takes which, what `train.forms` changes, and that tags survive both.

That a form computes the right thing is held to float64 beside the layers that have it: linear, norm and activation in
test_nn_layers.py and test_nn_cpu_forms.py, a kernel of 4 bits in test_nf4.py, attention in test_nn_attention.py,
cross-entropy in test_nn_losses.py, the gradient's norm in tests/test_optimizer.py; units and the embedding here.
"""

import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_train.compat import jaxprs_in_params
from aurora_train.config.schema import Train
from aurora_train.nn import plain, saving
from aurora_train.nn.attention import BACKENDS, choose_attention
from aurora_train.nn.attention_kernels import Rule
from aurora_train.nn.cpu import forms as cpu
from aurora_train.nn.cpu.blocked import blocked
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig, Lora
from aurora_train.nn.linear import linear
from aurora_train.nn.losses import chunked_nll
from aurora_train.nn.mlp import activate
from aurora_train.nn.nf4 import encode
from aurora_train.nn.nf4 import linear as linear_nf4
from aurora_train.nn.norms import normalise
from aurora_train.nn.stack import Segment, Stack
from aurora_train.nn.tracing import FORMS, current, form_name, forms, tracing
from aurora_train.optimizer import global_norm
from aurora_train.plan.verify import pretend_cudnn

RNG = np.random.default_rng(7)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


# ---- who takes which


def test_both_modules_have_the_same_functions_of_the_same_arguments():
    own = {name: one for name, one in vars(plain).items() if getattr(one, "__module__", "") == plain.__name__}
    assert own.keys() - {"dot", "entry"} >= {"times", "outer", "after", "units"}
    for name in own.keys() - {"dot", "entry"}:
        assert list(inspect.signature(getattr(cpu, name)).parameters) == list(inspect.signature(own[name]).parameters)
    assert typing.get_args(Train.model_fields["forms"].annotation) == ("auto", "plain")
    attention = typing.get_args(DecoderConfig.model_fields["attention"].annotation)
    assert set(attention) - {"auto"} == set(BACKENDS)


@pytest.mark.parametrize("target,taken,attention", [("cpu", "cpu", "blocked"), ("gpu", "plain", "cudnn"),
                                                    ("tpu", "plain", "xla")])  # fmt: skip
def test_a_platform_takes_its_own_forms(target, taken, attention):
    with tracing(target=target):
        assert form_name() == taken and forms() is FORMS[taken]
        assert choose_attention(DecoderConfig(), "bfloat16").name == attention


def test_what_is_asked_for_is_taken_on_any_platform():
    assert form_name() == "cpu"
    with tracing(forms="plain"):
        assert form_name() == "plain" and choose_attention(DecoderConfig(), "bfloat16").name == "xla"
        with tracing(target="tpu", forms="cpu"):
            assert form_name() == "cpu"
        assert current().target is None
    assert form_name() == "cpu"


# ---- the traced program


def stack(layers=3):
    model = Stack(Scaled, layers, nnx.Rngs(params=0))
    model.cut((Segment(0, layers, None, unroll=True),))
    return nnx.split(model)


class Scaled(nnx.Module):
    """A unit that multiplies by its weights: in closed form, y = x times the product of all."""

    def __init__(self, rngs):
        self.scale = nnx.Param(1 + 0.3 * jax.random.normal(rngs.params(), (5,)))

    def __call__(self, x, context, index, keys=None, cache=None):
        return x * self.scale[...], cache


def through_units(x, y):
    graph, state = stack()
    return nnx.merge(graph, jax.tree.map(lambda a: a * y, state))(x, None)[0]


def attend(x, y):
    return blocked(x[None, :, None], y[None, :, None], y[None, :, None], Rule(1.0), None)


def tied_nll(x, y):
    return chunked_nll(x[None], y, jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64)), vocab_first=True)


# Functions of two bfloat16 arrays [64, 64], one for each operation that has two forms.
USES = {
    "linear": lambda x, y: linear(x, y.astype(jnp.float32)),
    "bias": lambda x, y: forms().add_bias(x, y[0]),
    "nf4": lambda x, y: linear_nf4(x, *encode(jnp.ones((64, 8)))) * y[0, 0],
    "attention": attend,
    "cross_entropy": tied_nll,
    "norm": lambda x, y: normalise(1e-5, False, x, y[0], None),
    "activation": lambda x, y: activate("swiglu", x, y),
    "units": lambda x, y: through_units(x[:, :5], y[0, 0]),
    "grad_norm": lambda x, y: global_norm({"stack": {"segments": {0: {"w": x * y}}}}),
}


@pytest.mark.parametrize("use", USES)
def test_a_context_changes_what_is_traced_and_also_what_was_traced_before(use):
    x, y = (normal(64, 64, dtype=jnp.bfloat16) for _ in range(2))

    @jax.jit
    def gradients(x, y):
        return jax.grad(lambda x, y: USES[use](x, y).astype(jnp.float32).sum(), argnums=(0, 1))(x, y)

    def program(**context):
        with tracing(**context):
            return gradients.lower(x, y).as_text()

    own, simple = program(), program(forms="plain")
    assert own == program(forms="cpu") == program(target="gpu", forms="cpu") != simple
    assert simple == program(target="gpu")


def tagged(target, backend, forms, **shape):
    """(the tags in a decoder's gradient, those that it tells a plan)."""
    shape = {"width": 64, "layers": 2, "heads": 4, "mlp_width": 64, "attention": backend} | shape

    def total(graph, state, tokens):
        model = nnx.merge(graph, state)
        return model.nll(model(tokens), tokens, jnp.ones(tokens.shape))[0]

    with tracing(target=target, forms=forms), pretend_cudnn():
        made = nnx.eval_shape(lambda: Decoder(DecoderConfig(**shape), 61, "bfloat16", nnx.Rngs(params=0)))
        graph, state, rest = nnx.split(made, lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.floating), ...)
        tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)

        def grads(state, rest, tokens):
            return jax.grad(lambda state: total(graph, nnx.merge_state(state, rest), tokens))(state)

        return names(jax.make_jaxpr(grads)(state, rest, tokens).jaxpr), set(made.stack.tags)


def names(jaxpr) -> set:
    found = set()
    for equation in jaxpr.eqns:
        found |= {saving.tag_of(equation.primitive.name, equation.params)} - {None}
        for inner in jaxprs_in_params(equation.params):
            found |= names(inner)
    return found


@pytest.mark.parametrize("shape", [{"bias": "all", "norm": "layernorm"}, {"lora": Lora(rank=2, base="nf4")}])
@pytest.mark.parametrize("target,backend", [*(("cpu", name) for name in BACKENDS if name != "cudnn"), ("gpu", "cudnn")])
def test_a_plan_finds_the_same_tags_under_every_form(target, backend, shape):
    for taken in FORMS:
        tags, told = tagged(target, backend, taken, **shape)
        assert tags == told and "mlp_act" in tags


# ---- forms that no other file holds to float64


@pytest.mark.parametrize("form", ["plain", "cpu"])
def test_units_one_by_one_equal_float64(form):
    graph, state = stack()
    (scales,) = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state))
    x, g = RNG.standard_normal((2, 4, 5))

    def run(state, x):
        return nnx.merge(graph, state)(x, None)[0]

    with tracing(forms=form):
        y, pullback = jax.vjp(jax.jit(run), state, jnp.asarray(x, jnp.float32))
        d_state, d_x = pullback(jnp.asarray(g, jnp.float32))
    whole = scales.prod(0)
    np.testing.assert_allclose(y, x * whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_x, g * whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*jax.tree.leaves(d_state), (g * x).sum(0) * whole / scales, rtol=1e-5, atol=1e-5)


def test_the_embedding_equals_float64_where_a_token_comes_twice():
    made = Decoder(DecoderConfig(width=8, layers=1, heads=1, embed_scale=True), 7, "float32", nnx.Rngs(params=0))
    graph, state = nnx.split(made)
    tokens, g = np.array([[1, 3, 1, 6]]), RNG.standard_normal((1, 4, 8))

    def enter(state):
        return nnx.merge(graph, state).embedded(jnp.asarray(tokens), jnp.arange(4)[None])

    x, pullback = jax.vjp(jax.jit(enter), state)
    (found,) = pullback(jnp.asarray(g, jnp.float32))
    table, expected = np.asarray(made.embedding[...], np.float64), np.zeros((7, 8))
    np.testing.assert_allclose(x, table[tokens] * 8**0.5, rtol=1e-6)
    np.add.at(expected, tokens, g * 8**0.5)
    np.testing.assert_allclose(nnx.to_pure_dict(found)["embedding"], expected, rtol=1e-6, atol=1e-6)
