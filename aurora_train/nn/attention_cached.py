"""Attention with a cache: keys and values of earlier tokens, which a layer with a window forgets in a ring.

A cache is {"key", "value"} of [B, kv_heads, S, head_dim]. The key of position p lies in slot p modulo S: S is as many
as there are positions, or the window if that is less, for no later token sees further back. What a slot holds follows
from the position of a row's last token, so nothing else is stored, and a slot written by an earlier text of the row is
never seen.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.nn.attention_kernels import MASKED, Rule, visible
from aurora_train.nn.cpu.cached import by_blocks, by_head, from_heads
from aurora_train.nn.tracing import form_name


def attend(query, key, value, cache, rule: Rule, context):
    """Write the new keys and values, and attend to all that the rule shows of the cache and of them.

    query[B, T, heads, head_dim]; key, value[B, T, kv_heads, head_dim]; `context`: an `nn.attention.Context`, whose
    positions follow each other within a row. Tokens that are not `context.real`, at the end of a row, are not written.
    With `context.rows`, the cache has more rows than these.
    Returns (output like query, cache).
    """
    positions, real, rows, slots = context.positions, context.real, context.rows, cache["key"].shape[2]
    is_ring = rule.window is not None and slots == rule.window
    if is_ring and query.shape[1] > 1:  # a new key may take the place of one that an earlier query of these sees
        before = _held(positions[:, :1] - 1, slots)
        places = jnp.concatenate([before, positions], 1)
        there = jnp.concatenate([before >= 0, jnp.full(positions.shape, True) if real is None else real], 1)
        new = {"key": key, "value": value}
        whole = {
            name: jnp.concatenate([_of(old, rows), jnp.moveaxis(new[name], 1, 2).astype(old.dtype)], 2)
            for name, old in cache.items()
        }
        cache = _write(cache, key, value, positions % slots, real, rows)
        used, rows = slots + query.shape[1], None
    else:
        whole = cache = _write(cache, key, value, positions % slots if is_ring else positions, real, rows)
        places = _held(positions, slots) if is_ring else jnp.arange(slots)[None]
        there = places >= 0
        used = jnp.minimum(positions.max() + 1, slots)
    prefix = None
    if rule.mask == "prefix" and context.prefix is not None:
        prefix = jnp.take_along_axis(context.prefix, jnp.maximum(places, 0), 1) if is_ring else context.prefix
    mask = visible(positions, places, rule, prefix=prefix) & there[:, None]
    return _attend(query, whole["key"], whole["value"], rule, mask, used, rows), cache


def _attend(query, key, value, rule: Rule, mask, used, rows=None):
    """Attention under a mask bool[B, T, S] to the first `used` slots; key, value[B, kv_heads, S, head_dim], or of more
    rows, of which these are `rows`."""
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, length, kv_heads, -1, dim)
    mask = jnp.broadcast_to(mask, (batch, length, key.shape[2]))
    out = (by_blocks if form_name() == "cpu" else whole)(grouped, key, value, rule, mask, used, rows)
    return out.reshape(batch, length, heads, dim).astype(query.dtype)


def whole(query, key, value, rule: Rule, mask, used=None, rows=None):
    """All scores at once: query[B, T, K, groups, D] -> float32, like it."""
    length, query, key, value = query.shape[1], by_head(query).astype(key.dtype), _of(key, rows), _of(value, rows)
    scores = jnp.einsum("bkqd,bksd->bkqs", query, key, preferred_element_type=jnp.float32) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    groups = query.shape[2] // mask.shape[1]
    scores = jnp.where(jnp.repeat(mask, groups, 1)[:, None], scores, MASKED)
    shares = jax.nn.softmax(scores, -1).astype(value.dtype)
    return from_heads(jnp.einsum("bkqs,bksd->bkqd", shares, value, preferred_element_type=jnp.float32), length)


def _of(cache: jax.Array, rows) -> jax.Array:
    return cache if rows is None else cache[rows]


def _held(last: jax.Array, slots: int) -> jax.Array:
    """int32[B, S]: the position whose key each slot of a ring holds after position `last` int32[B, 1]; negative if it
    holds none."""
    return last - jnp.mod(last - jnp.arange(slots), slots)


def _write(cache, key, value, places, real, rows):
    """Write keys and values to slots `places` int32[B, T]; of more than there are slots, the last."""
    slots, length = cache["key"].shape[2], places.shape[1]
    count = jnp.full(places.shape[:1], length) if real is None else real.sum(1)
    kept = (jnp.arange(length) < count[:, None]) & (jnp.arange(length) >= count[:, None] - slots)
    places = jnp.where(kept, places, slots)  # beyond the end: dropped
    if places.size == 1 and form_name() == "cpu":
        # A write of one place is merged into all that reads the cache, each with a copy of it; one of two is not.
        places = jnp.pad(places, ((0, 0), (0, 1)), constant_values=slots)
        key, value = (jnp.pad(new, ((0, 0), (0, 1), (0, 0), (0, 0))) for new in (key, value))
    rows = (jnp.arange(places.shape[0]) if rows is None else rows)[:, None]
    return {
        name: cache[name].at[rows, :, places].set(new.astype(cache[name].dtype), mode="drop")
        for name, new in (("key", key), ("value", value))
    }
