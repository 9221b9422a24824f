"""Attention by blocks of queries: written for XLA:CPU, runs anywhere. Arguments as in `nn/attention_kernels.py`."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aurora_train.nn.attention_kernels import MASKED, Rule, or_same, visible
from aurora_train.nn.tracing import forms


def blocked(query, key, value, rule: Rule, segments=None, key_segments=None, prefix=None) -> jax.Array:
    """Attention by blocks of queries, each computed only with the keys it can see: about half of the products for a
    causal rule.

    Residuals are named inside the forward rule, so a plan chooses: with `attn_probs` kept nothing is recomputed, with
    `attn_stats` and `attn_out` one product is, and with none the whole attention is.
    """
    if segments is None:
        segments = jnp.ones(query.shape[:2], jnp.int32)
        key_segments = None if query.shape[1] == key.shape[1] else jnp.ones(key.shape[:2], jnp.int32)
    return _blocked(forms(), rule, query, key, value, (segments, key_segments, prefix))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(form, rule, query, key, value, marks):
    return _blocked_forward(form, rule, query, key, value, marks)[0]


def _blocked_forward(form, rule, query, key, value, marks):
    batch, length, heads, dim = query.shape
    rows, keys, values = _by_kv_head(query, key.shape[2]), _heads_first(key), _heads_first(value)
    outs, shares = [], []
    for block in _blocks(rule, length, key.shape[1]):
        scores = _scores(rule, block, rows, keys, marks)
        # The maximum has no tag: with one, XLA:CPU computes the exponential in another way, with other bits.
        grown = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = checkpoint_name(grown.sum(-1, keepdims=True), "attn_stats")
        share = checkpoint_name((grown / total).astype(query.dtype), "attn_probs")
        outs.append(_batched_dot(share, values[:, block.seen], 2, 1))
        shares.append(share)
    out = _from_blocks(outs, query, key.shape[2])
    out = checkpoint_name(out, "attn_out")
    return out, (query, key, value, out, tuple(shares))


def _blocked_backward(form, rule, residuals, g):
    query, key, value, out, shares = residuals
    query, key, value = form.after((query, key, value), g)
    kv_heads = key.shape[2]
    rows, keys, values = _by_kv_head(query, kv_heads), _turned(key), _turned(value)
    g_rows = _by_kv_head(g.astype(rows.dtype), kv_heads)
    delta = _by_kv_head((g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True), kv_heads)
    blocks = _blocks(rule, g.shape[1], key.shape[1])
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
        d_keys.append(form.batched_outer(_block_rows(rows, block), d_scores))
        d_values.append(form.batched_outer(g_block, share))
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


def _blocks(rule: Rule, length: int, key_length: int) -> list[Block]:
    """Up to eight equal blocks of at least 128 queries; one block if the length is not divisible.

    Blocks of 64 save products, but no time, and take a fifth longer to compile (docs/log.md, 2026-11-27).
    """
    assert rule.mask != "causal" and rule.window is None or length == key_length, (rule, length, key_length)
    count = next(n for n in (8, 4, 2, 1) if n == 1 or (length % n == 0 and length // n >= 128))
    size = length // count

    def seen(i: int) -> slice:
        start, stop = 0, key_length
        if rule.window is not None:
            start = max(0, (i * size - rule.window + 1) // size * size)
            stop = min(key_length, -(-((i + 1) * size + rule.window - 1) // size) * size)
        return slice(start, (i + 1) * size if rule.mask == "causal" else stop)

    return [Block(slice(i * size, (i + 1) * size), seen(i)) for i in range(count)]


def _heads_first(x):
    """[B, S, K, D] -> [B K, S, D]."""
    batch, length, heads, dim = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, length, dim)


def _turned(x):
    """[B, S, K, D] -> [B K, D, S]."""
    batch, length, heads, dim = x.shape
    return x.transpose(0, 2, 3, 1).reshape(batch * heads, dim, length)


def _by_kv_head(x, kv_heads):
    """[B, T, H, D] -> [B K, G, T, D]: the G = H / K query heads that share a key head are adjacent."""
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


def _scores(rule, block, rows, keys, marks):
    """float32[B K, G c, n], capped and masked."""
    scores = _batched_dot(_block_rows(rows, block), keys[:, block.seen], 2, 2) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    query_index, key_index = (jnp.arange(part.start, part.stop) for part in block)
    segments, key_segments, prefix = marks
    mask = visible(
        query_index, key_index, rule, segments[:, block.rows], or_same(key_segments, segments)[:, block.seen],
        None if prefix is None else prefix[:, block.seen],
    )  # fmt: skip
    batch = segments.shape[0]
    shaped = scores.reshape(batch, rows.shape[0] // batch, rows.shape[1], *mask.shape[-2:])
    return jnp.where(mask[:, None, None], shaped, MASKED).reshape(scores.shape)


def _gather_seen(parts, blocks, heads_split):
    """Sum each block's gradient of the keys it saw, [B K, D, n], into [B, S, K, D], without a scatter."""
    pieces, edges = [], sorted({edge for block in blocks for edge in (block.seen.start, block.seen.stop)})
    for start, stop in itertools.pairwise(edges):
        seeing = [(p, b) for p, b in zip(parts, blocks, strict=True) if b.seen.start <= start and b.seen.stop >= stop]
        pieces.append(sum(p[:, :, start - b.seen.start : stop - b.seen.start] for p, b in seeing))
    whole = jnp.concatenate(pieces, axis=2)
    return whole.reshape(*heads_split, *whole.shape[1:]).transpose(0, 3, 1, 2)


def _batched_dot(a, b, a_axis, b_axis):
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)
