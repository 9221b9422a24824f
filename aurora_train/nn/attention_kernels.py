"""Causal attention kernels that compute one and the same thing; `reference` is the plain form the others are held to.

All take query[B, T, H, D], key and value[B, S, K, D] with H a multiple of K, and a Rule; all return [B, T, H, D] in the
dtype of query with softmax in float32. `segments` int32[B, T] numbers the documents of a packed row: no attention
crosses from one to another.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aurora_train.nn import ops
from aurora_train.nn.lean import after
from aurora_train.nn.linear import batched_outer

MASKED = -1e30  # finite, so that no row of a mask can make a NaN


class Rule(NamedTuple):
    """What a query may see and how its scores are formed. `window` counts the token itself; None is unlimited."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def visible(query_index, key_index, window, query_segments=None, key_segments=None):
    """bool[..., T, S]: causal, within the window, and of the same document."""
    distance = query_index[..., :, None] - key_index[..., None, :]
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    if query_segments is not None:
        mask = mask & (query_segments[..., :, None] == key_segments[..., None, :])
    return mask


def causal_mask(rule: Rule, length: int, segments) -> jax.Array:
    """bool[B or 1, T, T] of a whole row."""
    index = jnp.arange(length)[None]
    return visible(index, index, rule.window, segments, segments)


def masked_attention(query, key, value, rule: Rule, mask) -> jax.Array:
    """Plain attention under any mask, bool[B or 1, T, S]. Holds all scores: for checking, and for decoding."""
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    shares = jax.nn.softmax(scores, -1).astype(value.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", shares, value, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, dim).astype(query.dtype)


def reference(query, key, value, rule: Rule, segments) -> jax.Array:
    out = masked_attention(query, key, value, rule, causal_mask(rule, query.shape[1], segments))
    return checkpoint_name(out, "attn_out")


def xla(query, key, value, rule: Rule, segments) -> jax.Array:
    """`jax.nn.dot_product_attention` in plain XLA. No soft-cap."""
    mask = causal_mask(rule, query.shape[1], segments)[:, None]
    out = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=rule.scale, implementation="xla")
    return checkpoint_name(out, "attn_out")


def cudnn(query, key, value, rule: Rule, segments) -> jax.Array:
    """cuDNN's flash attention. bfloat16 or float16, no soft-cap; document masks enter as a bias of [B, 1, T, T]."""
    mask = None
    if segments is not None:
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    window = None if rule.window is None else (rule.window - 1, 0)
    out = jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=rule.scale, is_causal=True, local_window_size=window, implementation="cudnn"
    )
    return out  # a plan keeps it, and its log-sum-exp, as "attn_flash"


def blocked(query, key, value, rule: Rule, segments) -> jax.Array:
    """Block-causal attention: a block of queries meets only the keys it can see, about half of the products.

    Residuals are named inside the forward rule, so a plan chooses: `attn_probs` kept recomputes nothing, `attn_stats`
    and `attn_out` kept recompute one product, none kept recompute the attention.
    """
    if segments is None:
        segments = jnp.ones(query.shape[:2], jnp.int32)
    forms = ops.form("linear"), ops.form("activation")  # of its gradients' products, of what they make anew
    return _blocked(forms, rule, query, key, value, segments)


BACKENDS = {"reference": reference, "xla": xla, "cudnn": cudnn, "blocked": blocked}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(forms, rule, query, key, value, segments):
    return _blocked_forward(forms, rule, query, key, value, segments)[0]


def _blocked_forward(forms, rule, query, key, value, segments):
    batch, length, heads, dim = query.shape
    rows, keys, values = _by_kv_head(query, key.shape[2]), _heads_first(key), _heads_first(value)
    outs, shares = [], []
    for block in _blocks(length, rule.window):
        scores = _scores(rule, block, rows, keys, segments)
        # The maximum has no tag: one between it and the exponential changes which exponential XLA:CPU takes, and bits.
        grown = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = checkpoint_name(grown.sum(-1, keepdims=True), "attn_stats")
        share = checkpoint_name((grown / total).astype(query.dtype), "attn_probs")
        outs.append(_batched_dot(share, values[:, block.seen], 2, 1))
        shares.append(share)
    out = _from_blocks(outs, query, key.shape[2])
    out = checkpoint_name(out, "attn_out")
    return out, (query, key, value, out, tuple(shares))


def _blocked_backward(forms, rule, residuals, g):
    query, key, value, out, shares = residuals
    products, anew = forms
    query, key, value = after(anew, (query, key, value), g)
    kv_heads = key.shape[2]
    rows, keys, values = _by_kv_head(query, kv_heads), _turned(key), _turned(value)
    g_rows = _by_kv_head(g.astype(rows.dtype), kv_heads)
    delta = _by_kv_head((g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True), kv_heads)
    blocks = _blocks(g.shape[1], rule.window)
    d_query, d_keys, d_values = [], [], []
    for block, share in zip(blocks, shares, strict=True):
        g_block = _block_rows(g_rows, block)
        d_share = _batched_dot(g_block, values[:, :, block.seen], 2, 1)
        d_scores = share.astype(jnp.float32) * (d_share - _block_rows(delta, block))
        if rule.softcap is not None:
            scores = _batched_dot(_block_rows(rows, block), keys[:, :, block.seen], 2, 1) * rule.scale
            d_scores = d_scores * (1.0 - jnp.square(jnp.tanh(scores / rule.softcap)))
        d_scores = (d_scores * rule.scale).astype(rows.dtype)
        d_query.append(_batched_dot(d_scores, keys[:, :, block.seen], 2, 2))
        d_keys.append(batched_outer(products, _block_rows(rows, block), d_scores))
        d_values.append(batched_outer(products, g_block, share))
    heads_split = (g.shape[0], kv_heads)
    return (
        _from_blocks(d_query, query, kv_heads),
        _gather_seen(d_keys, blocks, heads_split).astype(keys.dtype),
        _gather_seen(d_values, blocks, heads_split).astype(values.dtype),
        None,
    )


_blocked.defvjp(_blocked_forward, _blocked_backward)


class Block(NamedTuple):
    rows: slice  # queries of this block
    seen: slice  # keys that any of them can see


def _blocks(length: int, window: int | None) -> list[Block]:
    """Up to eight equal blocks of at least 128 queries; one where the length does not divide.

    Blocks of 64 save products, yet take no less time, and a fifth more to compile (docs/log.md, 2026-11-27).
    """
    count = next(n for n in (8, 4, 2, 1) if n == 1 or (length % n == 0 and length // n >= 128))
    size = length // count
    first_seen = [0 if window is None else max(0, (i * size - window + 1) // size * size) for i in range(count)]
    return [Block(slice(i * size, (i + 1) * size), slice(first_seen[i], (i + 1) * size)) for i in range(count)]


def _heads_first(x):
    """[B, S, K, D] -> [B K, S, D]."""
    batch, length, heads, dim = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, length, dim)


def _turned(x):
    """[B, S, K, D] -> [B K, D, S]."""
    batch, length, heads, dim = x.shape
    return x.transpose(0, 2, 3, 1).reshape(batch * heads, dim, length)


def _by_kv_head(x, kv_heads):
    """[B, T, H, D] -> [B K, G, T, D]: the G = H / K query heads that share a key head stand together."""
    batch, length, heads, dim = x.shape
    grouped = x.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    return grouped.reshape(batch * kv_heads, heads // kv_heads, length, dim)


def _block_rows(x, block):
    """[B K, G, T, D] -> [B K, G c, D]: the queries of one block as rows of one product, so no key is repeated."""
    part = x[:, :, block.rows]
    return part.reshape(part.shape[0], -1, part.shape[-1])


def _from_blocks(parts, like, kv_heads):
    """[B K, G c, D] of every block -> [B, T, H, D]."""
    batch, length, heads, dim = like.shape
    groups = heads // kv_heads
    whole = jnp.concatenate([p.reshape(batch, kv_heads, groups, -1, dim) for p in parts], axis=3)
    return whole.transpose(0, 3, 1, 2, 4).reshape(like.shape).astype(like.dtype)


def _scores(rule, block, rows, keys, segments):
    """float32[B K, G c, n], capped and masked."""
    scores = _batched_dot(_block_rows(rows, block), keys[:, block.seen], 2, 2) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    query_index, key_index = (jnp.arange(part.start, part.stop) for part in block)
    mask = visible(query_index, key_index, rule.window, segments[:, block.rows], segments[:, block.seen])
    batch = segments.shape[0]
    shaped = scores.reshape(batch, rows.shape[0] // batch, rows.shape[1], *mask.shape[-2:])
    return jnp.where(mask[:, None, None], shaped, MASKED).reshape(scores.shape)


def _gather_seen(parts, blocks, heads_split):
    """Sum each block's gradient of the keys it saw, [B K, D, n], into [B, S, K, D], without a scatter."""
    pieces = []
    for column in blocks:
        start, stop = column.rows.start, column.rows.stop
        seeing = [(p, b) for p, b in zip(parts, blocks, strict=True) if b.seen.start <= start and b.seen.stop >= stop]
        pieces.append(sum(p[:, :, start - b.seen.start : stop - b.seen.start] for p, b in seeing))
    whole = jnp.concatenate(pieces, axis=2)
    return whole.reshape(*heads_split, *whole.shape[1:]).transpose(0, 3, 1, 2)


def _batched_dot(a, b, a_axis, b_axis):
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)
