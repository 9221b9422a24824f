"""Attention to a cache, in a form for XLA:CPU: the slots in blocks, of which only those that are in use are read.

Many queries are taken a row and a head at a time, which takes a third of the processor's time (docs/log.md).
The softmax is summed block by block (Milakov and Gimelshein 2018). A block of which a row sees nothing changes nothing
in that row, to the bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.nn.attention_kernels import MASKED, Rule

BLOCK = 512  # slots
FEW = 8  # queries of a row that are taken with those of all other rows
SMALL = 2**18  # scores that are taken together as well: a loop over heads would cost more to compile than it gains


def by_blocks(query, key, value, rule: Rule, mask, used, rows=None):
    """query[B, K, T x groups, D], key and value[B, K, S, D], mask bool[B, T, S], of which the first `used` slots count
    -> float32, like query. `rows` int32[B]: those of keys and values, if they have more."""
    scores = query.size // query.shape[3] * mask.shape[2]
    if mask.shape[1] <= FEW or scores <= SMALL:
        key, value = (a if rows is None else a[rows] for a in (key, value))

        def block(start, size):
            return (jax.lax.dynamic_slice_in_dim(a, start, size, 2) for a in (key, value))

        return _summed(query, block, rule, mask[:, None], used)

    def one(numbers):
        row, head = numbers
        theirs = row if rows is None else rows[row]

        def block(start, size):
            shape = (1, 1, size, key.shape[3])
            return (jax.lax.dynamic_slice(a, (theirs, head, start, 0), shape)[0, 0] for a in (key, value))

        return _summed(query[row, head], block, rule, mask[row], used)

    number, heads = query.shape[:2]
    return jax.lax.map(one, jnp.divmod(jnp.arange(number * heads), heads)).reshape(query.shape)


def _summed(query, block, rule: Rule, mask, used):
    """query[..., T x groups, D], mask bool[..., T, S] -> float32[..., T x groups, D].

    `block(start, size)`: keys and values [..., size, D] of these slots.
    """
    slots = mask.shape[-1]
    size, groups = min(BLOCK, slots), query.shape[-2] // mask.shape[-2]

    def add(number, carry):
        top, total, out = carry
        start = jnp.minimum(number * size, slots - size)  # the last block may begin within the one before it
        keys, values = block(start, size)
        seen = jax.lax.dynamic_slice_in_dim(mask, start, size, mask.ndim - 1)
        seen &= start + jnp.arange(size) >= number * size
        scores = (query @ jnp.swapaxes(keys, -1, -2)).astype(jnp.float32) * rule.scale
        if rule.softcap is not None:
            scores = rule.softcap * jnp.tanh(scores / rule.softcap)
        seen = jnp.repeat(seen, groups, -2)
        scores = jnp.where(seen, scores, MASKED)
        higher = jnp.maximum(top, scores.max(-1, keepdims=True))
        shares, kept = jnp.where(seen, jnp.exp(scores - higher), 0), jnp.exp(top - higher)
        added = (shares.astype(values.dtype) @ values).astype(jnp.float32)
        return higher, kept * total + shares.sum(-1, keepdims=True), kept * out + added

    lead = query.shape[:-1]
    start = jnp.full((*lead, 1), MASKED), jnp.zeros((*lead, 1)), jnp.zeros((*lead, query.shape[-1]))
    if size == slots:
        _, total, out = add(0, start)
    else:
        _, total, out = jax.lax.fori_loop(0, (used + size - 1) // size, add, start)
    return out / jnp.maximum(total, 1e-30)
