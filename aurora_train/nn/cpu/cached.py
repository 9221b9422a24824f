"""Attention to a cache, in a form for XLA:CPU: the slots in blocks, of which only those that are in use are read.

Many queries are taken a row, a head and a part at a time, which takes a third of the processor's time (docs/log.md);
each part reads the blocks that it sees, and multiplies in its own dtype, from which the cache's values came.
The softmax is summed block by block (Milakov and Gimelshein 2018). A block of which a row sees nothing changes nothing
in that row, to the bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.nn.attention_kernels import MASKED, Rule

BLOCK = 512  # slots
FEW = 8  # queries of a row that are taken with those of all other rows
PART = 256  # tokens whose queries are taken together, where there are many
SMALL = 2**18  # scores that are taken together as well: a loop over heads would cost more to compile than it gains


def by_blocks(query, key, value, rule: Rule, mask, used, rows=None):
    """query[B, T, K, groups, D], key and value[B, K, S, D], mask bool[B, T, S], of which the first `used` slots count
    -> float32, like query. `rows` int32[B]: those of keys and values, if they have more."""
    number, length, heads, groups, dim = query.shape
    if length <= FEW or query.size // dim * mask.shape[2] <= SMALL:
        key, value = (a if rows is None else a[rows] for a in (key, value))

        def block(start, size):
            return (jax.lax.dynamic_slice_in_dim(a, start, size, 2) for a in (key, value))

        return from_heads(_summed(by_head(query).astype(key.dtype), block, rule, mask[:, None], 0, used), length)

    parts = length // PART if length % PART == 0 else 1
    size = length // parts
    query, mask = query.reshape(number, parts, size, heads, groups, dim), mask.reshape(number, parts, size, -1)
    first, last = _seen_range(mask)

    def one(place):
        row, part, head = place
        theirs = row if rows is None else rows[row]

        def block(start, size):
            shape = (1, 1, size, dim)
            taken = (jax.lax.dynamic_slice(a, (theirs, head, start, 0), shape) for a in (key, value))
            return (a[0, 0].astype(query.dtype) for a in taken)

        # Taken where they lie: heads would be brought before tokens one number at a time.
        own = jax.lax.dynamic_slice(query, (row, part, 0, head, 0, 0), (1, 1, size, 1, groups, dim))
        own = own.reshape(size * groups, dim)
        return _summed(own, block, rule, mask[row, part], first[row, part], last[row, part])

    places = jnp.unravel_index(jnp.arange(number * parts * heads), (number, parts, heads))
    out = jax.lax.map(one, places).reshape(number, parts, heads, size, groups, dim)
    return jnp.moveaxis(out, 2, 3).reshape(number, length, heads, groups, dim)


def by_head(query):
    """[B, T, K, groups, D] -> [B, K, T x groups, D]: the heads of a group are rows of one product."""
    number, _, heads, _, dim = query.shape
    return jnp.moveaxis(query, 2, 1).reshape(number, heads, -1, dim)


def from_heads(out, length: int):
    """The inverse of `by_head` for so many tokens."""
    number, heads, _, dim = out.shape
    return jnp.moveaxis(out.reshape(number, heads, length, -1, dim), 1, 2)


def _seen_range(mask):
    """bool[B, parts, T, S] -> (the first slot that a query of a part sees, the one after the last), int32[B, parts]."""
    seen, slots = mask.any(2), mask.shape[3]
    return seen.argmax(-1), jnp.where(seen.any(-1), slots - seen[..., ::-1].argmax(-1), 0)


def _summed(query, block, rule: Rule, mask, first, last):
    """query[..., T x groups, D], mask bool[..., T, S] -> float32[..., T x groups, D].

    `block(start, size)`: keys and values [..., size, D] of these slots. All that is seen lies from slot `first` to
    before `last`.
    """
    slots = mask.shape[-1]
    size, groups = min(BLOCK, slots), query.shape[-2] // mask.shape[-2]

    def add(number, carry):
        top, total, out = carry
        start = jnp.minimum(number * size, slots - size)  # the last block may begin within the one before it
        keys, values = block(start, size)
        seen = jax.lax.dynamic_slice_in_dim(mask, start, size, mask.ndim - 1)
        seen &= start + jnp.arange(size) >= number * size
        scores = _product("...qd,...sd->...qs", query, keys) * rule.scale
        if rule.softcap is not None:
            scores = rule.softcap * jnp.tanh(scores / rule.softcap)
        seen = jnp.repeat(seen, groups, -2)
        scores = jnp.where(seen, scores, MASKED)
        higher = jnp.maximum(top, scores.max(-1, keepdims=True))  # far above MASKED, of which the exponential is 0
        shares, kept = jnp.exp(scores - higher).astype(values.dtype), jnp.exp(top - higher)
        added = _product("...qs,...sd->...qd", shares, values)
        return higher, kept * total + shares.sum(-1, keepdims=True, dtype=jnp.float32), kept * out + added

    lead = query.shape[:-1]
    start = jnp.full((*lead, 1), MASKED / 2), jnp.zeros((*lead, 1)), jnp.zeros((*lead, query.shape[-1]))
    if size == slots:
        _, total, out = add(0, start)
    else:
        _, total, out = jax.lax.fori_loop(first // size, (last + size - 1) // size, add, start)
    return out / jnp.maximum(total, 1e-30)


def _product(form: str, a, b):
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)
