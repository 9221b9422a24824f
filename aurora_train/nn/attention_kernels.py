"""Attention kernels that all compute the same function; `reference` is the plain form against which others are tested.

All take query[B, T, H, D], key and value[B, S, K, D] with H a multiple of K, a Rule, and marks of the tokens; all
return [B, T, H, D] in the dtype of query, with softmax in float32. The marks, each of which may be None:

- `segments` int32[B, T] numbers the documents of a packed row: attention never crosses from one to another.
- `key_segments` int32[B, S], if keys are other tokens than the queries (cross-attention); needs `segments` too.
- `prefix` bool[B, S]: keys that every query of their document sees, even earlier queries (Raffel et al. 2020, prefix
  LM); the rule's mask is then "prefix".

A query that sees no key (padding in cross-attention) gets some finite mean of values, on which nothing may depend.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aurora_train.nn import ops
from aurora_train.nn.lean import after
from aurora_train.nn.linear import batched_outer

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
    return visible(query_index, key_index, rule, segments, _or_same(key_segments, segments), prefix)


def _or_same(key_segments, segments):
    """The documents of the keys: those of the queries, unless the keys are other tokens."""
    return segments if key_segments is None else key_segments


def masked_attention(query, key, value, rule: Rule, mask) -> jax.Array:
    """Plain attention under any mask, bool[B or 1, T, S] or None. Holds all scores: for tests and for decoding."""
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, dim)
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


def blocked(query, key, value, rule: Rule, segments=None, key_segments=None, prefix=None) -> jax.Array:
    """Attention by blocks of queries, each computed only with the keys it can see: about half of the products for a
    causal rule.

    Residuals are named inside the forward rule, so a plan chooses: with `attn_probs` kept nothing is recomputed, with
    `attn_stats` and `attn_out` one product is, and with none the whole attention is.
    """
    if segments is None:
        segments = jnp.ones(query.shape[:2], jnp.int32)
        key_segments = None if query.shape[1] == key.shape[1] else jnp.ones(key.shape[:2], jnp.int32)
    forms = ops.form("linear"), ops.form("activation")  # for its gradients' products, and for what they recompute
    return _blocked(forms, rule, query, key, value, (segments, key_segments, prefix))


BACKENDS = {"reference": reference, "xla": xla, "cudnn": cudnn, "blocked": blocked}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(forms, rule, query, key, value, marks):
    return _blocked_forward(forms, rule, query, key, value, marks)[0]


def _blocked_forward(forms, rule, query, key, value, marks):
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


def _blocked_backward(forms, rule, residuals, g):
    query, key, value, out, shares = residuals
    products, anew = forms
    query, key, value = after(anew, (query, key, value), g)
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
        query_index, key_index, rule, segments[:, block.rows], _or_same(key_segments, segments)[:, block.seen],
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
