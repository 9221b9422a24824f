"""Attention with a cache: keys and values of earlier tokens, which a layer with a window forgets in a ring.

A cache is {"key", "value"} of [B, S, kv_heads, head_dim]. The key of position p lies in slot p modulo S: S is as many
as there are positions, or the window if that is less, for no later token sees further back. What a slot holds follows
from the position of a row's last token, so nothing else is stored, and a slot written by an earlier text of the row is
never seen.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.nn.attention_kernels import Rule, masked_attention, visible


def attend(query, key, value, cache, rule: Rule, context):
    """Write the new keys and values, and attend to all that the rule shows of the cache and of them.

    query[B, T, heads, head_dim]; key, value[B, T, kv_heads, head_dim]; `context`: an `nn.attention.Context`, whose
    positions follow each other within a row. Tokens that are not `context.real`, at the end of a row, are not written.
    Returns (output like query, cache).
    """
    positions, real, slots = context.positions, context.real, cache["key"].shape[1]
    is_ring = rule.window is not None and slots == rule.window
    if is_ring and query.shape[1] > 1:  # a new key may take the place of one that an earlier query of these sees
        before = _held(positions[:, :1] - 1, slots)
        places = jnp.concatenate([before, positions], 1)
        there = jnp.concatenate([before >= 0, jnp.full(positions.shape, True) if real is None else real], 1)
        parts = {"key": key, "value": value}
        whole = {name: jnp.concatenate([cache[name], new.astype(cache[name].dtype)], 1) for name, new in parts.items()}
        cache = _write(cache, key, value, positions % slots, real)
    else:
        whole = cache = _write(cache, key, value, positions % slots if is_ring else positions, real)
        places = _held(positions, slots) if is_ring else jnp.arange(slots)[None]
        there = places >= 0
    prefix = None
    if rule.mask == "prefix" and context.prefix is not None:
        prefix = jnp.take_along_axis(context.prefix, jnp.maximum(places, 0), 1) if is_ring else context.prefix
    mask = visible(positions, places, rule, prefix=prefix) & there[:, None]
    return masked_attention(query, whole["key"], whole["value"], rule, mask), cache


def _held(last: jax.Array, slots: int) -> jax.Array:
    """int32[B, S]: the position whose key each slot of a ring holds after position `last` int32[B, 1]; negative if it
    holds none."""
    return last - jnp.mod(last - jnp.arange(slots), slots)


def _write(cache, key, value, places, real):
    """Write keys and values to slots `places` int32[B, T]; of more than there are slots, the last."""
    slots, length = cache["key"].shape[1], places.shape[1]
    count = jnp.full(places.shape[:1], length) if real is None else real.sum(1)
    kept = (jnp.arange(length) < count[:, None]) & (jnp.arange(length) >= count[:, None] - slots)
    places = jnp.where(kept, places, slots)  # beyond the end: dropped
    rows = jnp.arange(places.shape[0])[:, None]
    return {
        name: cache[name].at[rows, places].set(new.astype(cache[name].dtype), mode="drop")
        for name, new in (("key", key), ("value", value))
    }
