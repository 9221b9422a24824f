"""Gated DeltaNet: the chunked form is the recurrence, packed documents do not see each other, and a cache continues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_train.errors import UserError
from aurora_train.generate.sampler import Generator
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.delta import chunked, recurrent
from aurora_train.nn.param import parameter_count

HEADS, KEY, VALUE, LENGTH = 3, 8, 5, 150  # more than two chunks of 64, and not a multiple of one
SHAPE = dict(
    width=32, layers=4, heads=2, activation="swiglu", tied=False, qk_norm="head", attention_gate=True,
    linear=dict(key_heads=2, value_heads=4, key_dim=8, value_dim=6),
    layer_table=[dict(kind="linear"), dict(kind="linear"), dict(kind="linear"), dict(rotary=0.25)],
)  # fmt: skip


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    query, key = (rng.normal(size=(2, LENGTH, HEADS, KEY)) for _ in range(2))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value = rng.normal(size=(2, LENGTH, HEADS, VALUE))
    log_decay, beta = -rng.exponential(0.3, (2, LENGTH, HEADS)), rng.uniform(0, 1, (2, LENGTH, HEADS))
    begins = np.zeros((2, LENGTH), bool)
    begins[0, [40, 64, 65, 130]] = begins[1, 128] = True
    return (query, key, value, log_decay, beta), begins, rng.normal(size=(2, HEADS, KEY, VALUE))


def exact(query, key, value, log_decay, beta, begins, state):
    """The definition in float64, token by token."""
    out, state = np.zeros_like(value), state.copy()
    for t in range(query.shape[1]):
        state = np.where(begins[:, t, None, None, None], 0, state * np.exp(log_decay[:, t])[..., None, None])
        error = value[:, t] - np.einsum("bhk,bhkv->bhv", key[:, t], state)
        state = state + np.einsum("bhk,bhv->bhkv", key[:, t], beta[:, t, :, None] * error)
        out[:, t] = np.einsum("bhk,bhkv->bhv", query[:, t], state)
    return out, state


@pytest.mark.parametrize("form", [chunked, recurrent])
def test_a_form_equals_the_definition_in_float64(form):
    arrays, begins, state = inputs()
    narrow = [jnp.asarray(a, jnp.float32) for a in (*arrays, state)]
    out, last = jax.jit(form)(*narrow[:5], jnp.asarray(begins), narrow[5])
    wanted, wanted_last = exact(*arrays, begins, state)
    np.testing.assert_allclose(out, wanted, atol=3e-5)
    np.testing.assert_allclose(last, wanted_last, atol=3e-5)


def test_the_gradients_of_the_two_forms_are_equal():
    arrays, begins, state = inputs(1)
    narrow = [jnp.asarray(a, jnp.float32) for a in (*arrays, state)]
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, LENGTH, HEADS, VALUE)), jnp.float32)

    def total(form, *arrays):
        return (form(*arrays[:5], jnp.asarray(begins), arrays[5])[0] * weights).sum()

    forms = (chunked, recurrent)
    found, wanted = (jax.jit(jax.grad(lambda *a, f=form: total(f, *a), range(6)))(*narrow) for form in forms)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4 * float(jnp.abs(other).max()))


@pytest.fixture(scope="module")
def model():
    return Decoder(DecoderConfig(**SHAPE), 50, "float32", nnx.Rngs(params=0))


def test_packed_documents_do_not_see_each_other(model):
    tokens = np.random.default_rng(3).integers(0, 50, (1, 100))
    cuts = [0, 7, 70, 100]
    lengths = np.diff(cuts)
    segments = np.repeat(np.arange(1, 4), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = model(*map(jnp.asarray, (tokens, segments, positions)))
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        alone = model(jnp.asarray(tokens[:, start:stop]))
        # Sums of decays over a chunk are rounded, so the bound is wider than that of attention.
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=5e-4)


def test_a_document_has_no_gradient_in_the_one_before():
    arrays, begins, state = inputs(5)
    narrow = [jnp.asarray(a, jnp.float32) for a in arrays]

    def after(*arrays):
        return chunked(*arrays, jnp.asarray(begins), jnp.asarray(state, jnp.float32))[0][1, 128:].sum()

    for gradient in jax.jit(jax.grad(after, range(5)))(*narrow):
        assert not gradient[1, :128].any() and np.isfinite(gradient).all()


@pytest.mark.slow
def test_a_prompt_with_padding_and_then_single_tokens_give_what_the_whole_gives(model):
    rng = np.random.default_rng(4)
    tokens, lengths = rng.integers(0, 50, (2, 24)), np.array([9, 16])
    whole = model(jnp.asarray(tokens))
    positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
    real = positions < lengths[:, None]
    hidden, caches = model.extend(jnp.asarray(tokens[:, :16]), positions, model.empty_caches(2, 32), real=real)
    for row in range(2):
        np.testing.assert_allclose(hidden[row, : lengths[row]], whole[row, : lengths[row]], atol=2e-5)
    for step in range(6):
        at = lengths + step
        hidden, caches = model.extend(jnp.asarray(tokens[[0, 1], at])[:, None], jnp.asarray(at)[:, None], caches)
        np.testing.assert_allclose(hidden[:, 0], whole[jnp.arange(2), at], atol=2e-5)


@pytest.mark.slow
def test_prompts_of_unlike_length_continue_together_as_alone(model):
    generator = Generator(model, [0])
    prompts = [[1, 2, 3], [4] * 20]
    together = generator.generate_batch(prompts, 8, 0.0, None, None, 0)
    assert together == [generator.generate_batch([prompt], 8, 0.0, None, None, 0)[0] for prompt in prompts]


def test_the_count_of_parameters_is_exact(model):
    count = parameter_count(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert DecoderConfig(**SHAPE).num_parameters(50) == count


def test_what_a_linear_layer_cannot_do_is_refused():
    with pytest.raises(ValueError, match="`linear` names no heads"):
        DecoderConfig(**SHAPE | {"linear": None})
    with pytest.raises(ValueError, match=r"key_heads \(2\) must divide value_heads \(3\)"):
        DecoderConfig(**SHAPE | {"linear": dict(key_heads=2, value_heads=3, key_dim=8, value_dim=6)})
    blocks = {"width": 64, "heads": 1, "kv_heads": 1, "head_dim": 64, "mlp_width": 64, "lora": {"base": "nf4"}}
    with pytest.raises(ValueError, match="linear.value_heads x value_dim"):
        DecoderConfig(**SHAPE | blocks)
    with pytest.raises(UserError, match="is causal"):
        nnx.eval_shape(lambda: Decoder(DecoderConfig(**SHAPE), 50, "float32", nnx.Rngs(params=0), mask="bidirectional"))
