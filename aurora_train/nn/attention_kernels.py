"""Attention kernels that all compute the same function; `reference` is the plain form against which others are tested.

Another one, written for XLA:CPU, is in `nn/cpu/blocked.py`.

All take query[B, T, H, D], key and value[B, S, K, D] with H a multiple of K, a Rule, and marks of the tokens; all
return [B, T, H, D] in the dtype of query, with softmax in float32. The marks, each of which may be None:

- `segments` int32[B, T] numbers the documents of a packed row: attention never crosses from one to another.
- `key_segments` int32[B, S], if keys are other tokens than the queries (cross-attention); needs `segments` too.
- `prefix` bool[B, S]: keys that every query of their document sees, even earlier queries (Raffel et al. 2020, prefix
  LM); the rule's mask is then "prefix".

A query that sees no key (padding in cross-attention) gets some finite mean of values, on which nothing may depend.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MASKED = -1e30  # finite, so that no row of a mask can make a NaN


class Rule(NamedTuple):
    """Which keys a query may see, and how scores are computed.

    `mask`: "causal", "prefix" (causal, except that all queries see the prefix) or "bidirectional", as in
    cross-attention. `window` includes the token itself, and bounds both directions if both are seen; None is unlimited.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    mask: str = "causal"


def visible(query_index, key_index, rule: Rule, query_segments=None, key_segments=None, prefix=None):
    """bool[..., T, S]: allowed by the rule, within its window, and of the same document."""
    distance = query_index[..., :, None] - key_index[..., None, :]
    mask = jnp.full(distance.shape, True) if rule.mask == "bidirectional" else distance >= 0
    if rule.mask == "prefix" and prefix is not None:
        mask = mask | prefix[..., None, :]
    if rule.window is not None:
        mask = mask & (distance < rule.window)
        mask = mask if rule.mask == "causal" else mask & (distance > -rule.window)
    if query_segments is not None:
        mask = mask & (query_segments[..., :, None] == key_segments[..., None, :])
    return mask


def whole_mask(rule: Rule, query, key, segments, key_segments=None, prefix=None) -> jax.Array | None:
    """The mask of whole rows, bool[B or 1, T, S]; None if every query sees every key."""
    if rule.mask == "bidirectional" and rule.window is None and segments is None:
        return None
    query_index, key_index = (jnp.arange(x.shape[1])[None] for x in (query, key))
    return visible(query_index, key_index, rule, segments, or_same(key_segments, segments), prefix)


def or_same(key_segments, segments):
    """The documents of the keys: those of the queries, unless the keys are other tokens."""
    return segments if key_segments is None else key_segments


def masked_attention(query, key, value, rule: Rule, mask) -> jax.Array:
    """Plain attention under any mask, bool[B or 1, T, S] or None. Holds all scores: for tests and for decoding."""
    batch, length, heads, dim = query.shape
    grouped = query.astype(key.dtype).reshape(batch, length, key.shape[2], -1, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, MASKED)
    shares = jax.nn.softmax(scores, -1).astype(value.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", shares, value, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, dim).astype(query.dtype)


def reference(query, key, value, rule: Rule, segments=None, key_segments=None, prefix=None) -> jax.Array:
    mask = whole_mask(rule, query, key, segments, key_segments, prefix)
    return checkpoint_name(masked_attention(query, key, value, rule, mask), "attn_out")


def xla(query, key, value, rule: Rule, segments=None, key_segments=None, prefix=None) -> jax.Array:
    """`jax.nn.dot_product_attention` in plain XLA. No soft-cap."""
    mask = whole_mask(rule, query, key, segments, key_segments, prefix)
    mask = None if mask is None else mask[:, None]
    out = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=rule.scale, implementation="xla")
    return checkpoint_name(out, "attn_out")


def cudnn(query, key, value, rule: Rule, segments=None, key_segments=None, prefix=None) -> jax.Array:
    """cuDNN's flash attention. bfloat16 or float16, no soft-cap.

    It supports the causal mask and its window; documents and other rules enter as a bias of [B, 1, T, S].
    """
    causal, window, mask = rule.mask == "causal", None, None
    if not causal:
        mask = whole_mask(rule, query, key, segments, key_segments, prefix)
    elif segments is not None:
        mask = segments[:, :, None] == segments[:, None, :]
    if causal and rule.window is not None:
        window = (rule.window - 1, 0)
    length = query.shape[1]
    if mask is not None:
        query, key, value, mask = even_lengths(query, key, value, mask)
    out = jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=rule.scale, is_causal=causal, local_window_size=window,
        implementation="cudnn",
    )  # fmt: skip
    return out if out.shape[1] == length else out[:, :length]  # a plan keeps it, and its log-sum-exp, as "attn_flash"


def even_lengths(query, key, value, mask):
    """Pad odd lengths with one query and one key, since cuDNN's gradient under a bias needs even lengths. Only the new
    query sees the new key, and the caller drops its output. mask: [B, 1, T, S]."""
    odd = [(0, x.shape[1] % 2) for x in (query, key)]
    mask = jnp.broadcast_to(mask, (query.shape[0], *mask.shape[1:]))
    query, key, value = (
        jnp.pad(x, [(0, 0), more, (0, 0), (0, 0)]) if more[1] else x
        for x, more in ((query, odd[0]), (key, odd[1]), (value, odd[1]))
    )
    mask = jnp.pad(mask, [(0, 0), *odd]) if any(more for _, more in odd) else mask
    return query, key, value, mask[:, None]
