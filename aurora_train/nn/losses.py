"""Cross-entropy over a vocabulary without ever holding all logits.

The time axis is cut into chunks and scanned. `chunked_nll`, used for training, computes the gradients of hidden states
and head while it has each chunk's logits, so the backward pass only scales them: three products per chunk instead of
four. The batch axis is never cut, so that it stays sharded over devices.

`hidden` and `head` may be tuples of arrays, whose products add up to the logits: those of a head with an adapter
(`nn.lora.head_products`). A head that is frozen costs no gradient, because each has its own.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp

from aurora_train.nn import plain
from aurora_train.nn.plain import dot
from aurora_train.nn.tracing import current, forms


def logits_of(hidden, head, vocab_first: bool, softcap: float | None = None):
    """hidden[..., D] times head -> float32[..., V]. `head` is [V, D] if `vocab_first` (tied), else [D, V]."""
    hidden, head = _parts(hidden), _parts(head)
    flat = [part.reshape(-1, part.shape[-1]) for part in hidden]
    times = forms().times_few if current().decoding else plain.times_few
    products = (times(x, one, 1 if vocab_first else 0) for x, one in zip(flat, head, strict=True))
    logits = functools.reduce(operator.add, products)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits.reshape(*hidden[0].shape[:-1], logits.shape[-1])


def chunk_tokens(setting: str | int, vocab_size: int) -> int:
    """Tokens per chunk; auto holds about 2**24 logits (64 MiB in float32), at least 1,024 tokens."""
    return max(1024, 2**24 // vocab_size) if setting == "auto" else setting


def token_nll(hidden, head, targets, *, vocab_first: bool, softcap: float | None = None, chunk: int = 0):
    """-log p of each target, float32[B, T], for hidden[B, T, D] and targets int32[B, T]. Differentiable."""
    return by_token(_nll_of, hidden, head, (targets,), vocab_first=vocab_first, softcap=softcap, chunk=chunk)


def token_scores(hidden, head, targets, *, vocab_first: bool, softcap: float | None = None, chunk: int = 0):
    """(`token_nll`, whether each target is the likeliest token: bool[B, T])."""

    def measure(logits, targets):
        return _nll_of(logits, targets), logits.argmax(-1) == targets

    return by_token(measure, hidden, head, (targets,), vocab_first=vocab_first, softcap=softcap, chunk=chunk)


def _nll_of(logits, targets):
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]


def by_token(measure, hidden, head, beside, *, vocab_first: bool, softcap: float | None = None, chunk: int = 0):
    """`measure(logits, *beside)` of every token, [B, T] each, with the logits of a chunk at a time. `beside`: arrays
    [B, T, ...]."""

    @jax.checkpoint
    def one(inputs):
        hidden, beside = inputs
        return measure(logits_of(hidden, head, vocab_first, softcap), *beside)

    length = _parts(hidden)[0].shape[1]
    measured = jax.lax.map(one, _chunks(chunk, hidden, beside))
    return jax.tree.map(lambda each: each.swapaxes(0, 1).reshape(each.shape[1], -1)[:, :length], measured)


def chunked_nll(
    hidden, head, targets, weights, *, vocab_first: bool, softcap: float | None = None, chunk: int = 0,
    of=operator.pos, parts=(),
):  # fmt: skip
    """Sum of weights x of(-log p(target), *parts), a float32 scalar.

    Args:
        hidden: [B, T, D] in the compute dtype.
        head: float32[V, D] if `vocab_first` (tied embedding), else float32[D, V].
        targets: int32[B, T]; weights: float32[B, T], not differentiated.
        softcap: logits become softcap x tanh(logits / softcap).
        chunk: about how many tokens' logits to hold at a time; 0 holds all.
        of: a function of each token by itself, named in a module: it is static.
        parts: float32[B, T] arrays, differentiated.
    """
    return _nll(forms(), vocab_first, softcap, chunk, of, _parts(hidden), _parts(head), targets, weights, parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _nll(form, vocab_first, softcap, chunk, of, hidden, head, targets, weights, parts):
    def add(total, inputs):
        hidden, targets, weights, parts = inputs
        nll = _nll_of(logits_of(hidden, head, vocab_first, softcap), targets)
        return total + (of(nll, *parts) * weights).sum(), None

    return jax.lax.scan(add, jnp.float32(0), _chunks(chunk, hidden, targets, weights, parts))[0]


def _nll_forward(form, vocab_first, softcap, chunk, of, hidden, head, targets, weights, parts):
    low = tuple(one.astype(x.dtype) for one, x in zip(head, hidden, strict=True))
    wide = low[0].shape[0] if vocab_first else low[0].shape[1]
    # The head's gradient is summed in the layout of its product, and transposed once at the end.
    turned = vocab_first and form.TURNS_TIED_GRADIENT and hidden[0].dtype != jnp.float32

    def add(carry, inputs):
        total, d_head = carry
        hidden, targets, weights, parts = inputs
        flat = tuple(x.reshape(-1, x.shape[-1]) for x in hidden)
        logits = logits_of(flat, head, vocab_first, softcap)
        lse = jax.nn.logsumexp(logits, -1, keepdims=True)
        targets, weights, *parts = (x.reshape(-1, 1) for x in (targets, weights, *parts))
        hit = jnp.take_along_axis(logits, targets, -1)
        values, pull = jax.vjp(of, lse - hit, *parts)
        d_nll, *d_parts = pull(weights)
        d_logits = (jnp.exp(logits - lse) - (jnp.arange(wide) == targets)) * d_nll
        if softcap is not None:
            d_logits = d_logits * (1.0 - jnp.square(logits / softcap))
        d_logits = d_logits.astype(hidden[0].dtype)
        d_hidden = tuple(
            dot(d_logits, one, 1, 0 if vocab_first else 1).astype(x.dtype).reshape(x.shape)
            for one, x in zip(low, hidden, strict=True)
        )  # fmt: skip
        outers = (form.outer(d_logits, x) if vocab_first and not turned else form.outer(x, d_logits) for x in flat)
        d_parts = tuple(one.reshape(hidden[0].shape[:-1]) for one in d_parts)
        return (total + (values * weights).sum(), tuple(map(operator.add, d_head, outers))), (d_hidden, d_parts)

    start = tuple(jnp.zeros(one.shape[::-1] if turned else one.shape, jnp.float32) for one in head)
    chunks = _chunks(chunk, hidden, targets, weights, tuple(parts))
    (total, d_head), (d_hidden, d_parts) = jax.lax.scan(add, (jnp.float32(0), start), chunks)
    if turned:
        # folded into the product, XLA:CPU would crash
        d_head = tuple(jax.lax.optimization_barrier(one).T for one in d_head)
    d_hidden = tuple(_joined(one, x.shape) for one, x in zip(d_hidden, hidden, strict=True))
    d_parts = tuple(_joined(one, x.shape) for one, x in zip(d_parts, parts, strict=True))
    return total, (d_hidden, tuple(one.astype(was.dtype) for one, was in zip(d_head, head, strict=True)), d_parts)


def _nll_backward(form, vocab_first, softcap, chunk, of, residuals, g):
    d_hidden, d_head, d_parts = jax.tree.map(lambda one: (one * g).astype(one.dtype), residuals)
    return d_hidden, d_head, None, None, d_parts


_nll.defvjp(_nll_forward, _nll_backward)


def _parts(arrays) -> tuple:
    return arrays if isinstance(arrays, tuple) else (arrays,)


def _chunks(chunk, *arrays):
    return jax.tree.map(lambda x: _cut(x, chunk), arrays)


def _joined(chunks, shape):
    """The inverse of `_cut`, of an array [B, T, ...] of this shape."""
    return chunks.swapaxes(0, 1).reshape(shape[0], -1, *shape[2:])[:, : shape[1]]


def _cut(x, chunk):
    """[B, T, ...] -> [chunks, B, t, ...]; the last chunk is padded with zeros, whose weight is zero."""
    batch, length = x.shape[:2]
    size = length if chunk == 0 else min(length, max(1, chunk // batch))
    count = -(-length // size)
    count = next((n for n in range(count, 2 * count + 1) if length % n == 0), count)  # prefer a divisor to padding
    size = -(-length // count)
    x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1)
