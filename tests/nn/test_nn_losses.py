"""The chunked loss is the full loss: value, gradients, and far fewer bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_train.nn.losses import chunk_tokens, chunked_nll, logits_of, token_nll, token_scores
from aurora_train.nn.tracing import tracing

# Half the compile time, the same mathematics.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNG = np.random.default_rng(2)


def make(batch=3, length=20, width=16, vocab=50, vocab_first=True, dtype=jnp.float32):
    hidden = jnp.asarray(RNG.standard_normal((batch, length, width)), dtype)
    head = jnp.asarray(RNG.standard_normal((vocab, width)), jnp.float32)
    targets = jnp.asarray(RNG.integers(0, vocab, (batch, length)), jnp.int32)
    weights = jnp.asarray(RNG.integers(0, 2, (batch, length)), jnp.float32)
    return hidden, head if vocab_first else head.T, targets, weights


def full_nll(hidden, head, targets, weights, vocab_first, softcap):
    logits = hidden @ (head.T if vocab_first else head)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return (nll * weights).sum()


@pytest.mark.parametrize("vocab_first,softcap", [(True, None), (False, 5.0)])
@pytest.mark.parametrize("chunk", [0, 15, 21])  # all at once, whole chunks, a last chunk partly filled
def test_the_chunked_loss_and_its_gradients_equal_the_full_ones(chunk, vocab_first, softcap):
    hidden, head, targets, weights = make(length=20 if chunk != 21 else 19, vocab_first=vocab_first)

    def chunked(hidden, head):
        return 0.5 * chunked_nll(
            hidden, head, targets, weights, vocab_first=vocab_first, softcap=softcap, chunk=chunk
        )  # the factor: a backward pass must scale what the forward pass prepared

    def full(hidden, head):
        return 0.5 * full_nll(hidden, head, targets, weights, vocab_first, softcap)

    value, gradients = quick_jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    expected, expected_gradients = quick_jit(jax.value_and_grad(full, (0, 1)))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(quick_jit(chunked)(hidden, head), expected, rtol=1e-6)
    for found, exact in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6 * float(jnp.abs(exact).max()))


def test_the_loss_equals_float64():
    hidden, head, targets, weights = make()
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    shifted = logits - logits.max(-1, keepdims=True)
    lse = np.log(np.exp(shifted).sum(-1))
    nll = lse - np.take_along_axis(shifted, np.asarray(targets)[..., None], -1)[..., 0]
    found = token_nll(hidden, head, targets, vocab_first=True, chunk=12)
    np.testing.assert_allclose(found, nll, rtol=1e-5, atol=1e-5)
    total = chunked_nll(hidden, head, targets, weights, vocab_first=True, chunk=12)
    np.testing.assert_allclose(total, (nll * weights).sum(), rtol=1e-6)


@pytest.mark.parametrize("form", ["plain", "cpu"])
@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("vocab_first,softcap", [(True, None), (True, 5.0), (False, None)])
def test_a_form_and_its_gradients_equal_float64(form, dtype, tolerance, vocab_first, softcap):
    """Within a share of the largest entry: bfloat16 rounds the gradient of each logit once, the head beforehand."""
    hidden, head, targets, weights = make(vocab_first=vocab_first, dtype=dtype)

    def total(hidden, head):
        return chunked_nll(hidden, head, targets, weights, vocab_first=vocab_first, softcap=softcap, chunk=15)

    with tracing(forms=form):
        value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, head)
    wide = np.asarray(hidden, np.float64)
    table = np.asarray(head.astype(dtype), np.float64)
    table = table if vocab_first else table.T
    capped = wide @ table.T
    if softcap is not None:
        capped = softcap * np.tanh(capped / softcap)
    shares = np.exp(capped - capped.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    hit = np.eye(table.shape[0])[np.asarray(targets)]
    expected = -(np.log((shares * hit).sum(-1)) * np.asarray(weights)).sum()
    slope = (shares - hit) * np.asarray(weights)[..., None]
    slope *= 1 if softcap is None else 1 - (capped / softcap) ** 2
    d_head = np.einsum("btv,btd->vd", slope, wide)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, exact in zip(gradients, (slope @ table, d_head if vocab_first else d_head.T), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=tolerance * np.abs(exact).max())


def test_token_nll_is_differentiable_token_by_token():
    hidden, head, targets, weights = make(length=19)

    def total(hidden, head):
        return (token_nll(hidden, head, targets, vocab_first=True, chunk=12) * weights).sum()

    gradients = quick_jit(jax.grad(total, (0, 1)))(hidden, head)
    expected = jax.grad(lambda h, w: full_nll(h, w, targets, weights, True, None), (0, 1))(hidden, head)
    for found, exact in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_first", [True, False])
def test_bfloat16_activations_train_with_float32_logits_and_head_gradients(vocab_first):
    hidden, head, targets, weights = make(vocab_first=vocab_first, dtype=jnp.bfloat16)

    def chunked(hidden, head):
        return chunked_nll(hidden, head, targets, weights, vocab_first=vocab_first, chunk=15)

    d_hidden, d_head = jax.jit(jax.grad(chunked, (0, 1)))(hidden, head)
    low = head.astype(jnp.bfloat16).astype(jnp.float32)
    exact = jax.grad(full_nll, (0, 1))(hidden.astype(jnp.float32), low, targets, weights, vocab_first, None)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.asarray(d_hidden, np.float32), exact[0], atol=0.1, rtol=0.02)
    np.testing.assert_allclose(d_head, exact[1], atol=0.05, rtol=0.02)
    assert logits_of(hidden, head, vocab_first).dtype == jnp.float32


@pytest.mark.optimized
def test_the_compiled_chunked_loss_needs_a_fraction_of_the_bytes_of_the_full_logits():
    hidden, head, targets, weights = make(batch=4, length=256, width=16, vocab=2048)
    logits_bytes = 4 * 256 * 2048 * 4

    def temporary_bytes(chunk):
        def total(hidden, head):
            return chunked_nll(hidden, head, targets, weights, vocab_first=True, chunk=chunk)

        return jax.jit(jax.grad(total, (0, 1))).lower(hidden, head).compile().memory_analysis().temp_size_in_bytes

    full, chunked = temporary_bytes(0), temporary_bytes(64)
    assert full >= logits_bytes
    assert chunked < logits_bytes / 4


def test_auto_holds_about_sixteen_million_logits():
    assert chunk_tokens("auto", 4096) == 4096
    assert chunk_tokens("auto", 128_256) == 1024
    assert chunk_tokens(77, 4096) == 77


@pytest.mark.parametrize("vocab_first", [True, False])
def test_token_scores_are_the_loss_and_whether_the_target_is_the_likeliest(vocab_first):
    hidden = jax.random.normal(jax.random.key(0), (2, 24, 8))
    targets = jax.random.randint(jax.random.key(1), (2, 24), 0, 5)
    head = jax.random.normal(jax.random.key(2), (5, 8) if vocab_first else (8, 5))
    nll, right = token_scores(hidden, head, targets, vocab_first=vocab_first, chunk=12)
    np.testing.assert_array_equal(nll, token_nll(hidden, head, targets, vocab_first=vocab_first, chunk=12))
    likeliest = logits_of(hidden, head, vocab_first).argmax(-1)
    np.testing.assert_array_equal(right, likeliest == targets)
    assert right.shape == (2, 24) and 0 < right.sum() < right.size
