"""Operations in their plain forms: as the formula reads, for any compiler.

`nn/cpu/forms.py` has the same functions, written for XLA:CPU. Layers take one of the two modules from
`nn.tracing.forms` while they are traced. Both compute the same, up to the order and the rounding of sums.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

TURNS_TIED_GRADIENT = False  # whether a tied head's gradient is summed transposed (`nn.losses`)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, out_dtype=jnp.float32) -> jax.Array:
    """Contract one axis of each 2-D array."""
    # As in flax's fp8_ops: a GPU may sum 8-bit products in fewer bits than float32, but not those of gradients.
    precision = jax.lax.Precision.HIGHEST if jnp.float8_e5m2 in (a.dtype, b.dtype) else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=out_dtype)


def times(x: jax.Array, low: jax.Array, out_dtype=None) -> jax.Array:
    """x[n, in] times low[in, out] of the same dtype, which is also that of the result unless `out_dtype` is given."""
    return dot(x, low, 1, 0, out_dtype or x.dtype)


def times_few(x: jax.Array, weight: jax.Array, axis: int = 0, out_dtype=jnp.float32) -> jax.Array:
    """For decoding: x[n, in] times a weight as it is stored, [in, out] (`axis` 0) or [out, in] (`axis` 1)."""
    return dot(x, weight.astype(x.dtype), 1, axis, out_dtype)


def times_transposed(g: jax.Array, low: jax.Array, out_dtype=None) -> jax.Array:
    """g[n, out] times the transpose of low[in, out]: the gradient of the other operand."""
    return dot(g, low, 1, 1, out_dtype or g.dtype)


def outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """a[n, k], b[n, m] -> float32[k, m]: the gradient of a weight."""
    return dot(a, b, 0, 0)


def batched_outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """a[N, n, k], b[N, n, m] -> float32[N, k, m]: `outer` for a batch."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def column_sum(x: jax.Array) -> jax.Array:
    """[..., n] -> float32[n]: the gradient of a vector shared by all rows."""
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32).sum(0)


def row_mean(x: jax.Array) -> jax.Array:
    """float32[..., n] -> float32[..., 1]."""
    return jnp.mean(x, -1, keepdims=True)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y[..., out] plus bias[out], in the dtype of y."""
    return y + bias.astype(y.dtype)


def operand(values: jax.Array, *, pinned: bool = False) -> jax.Array:
    """8-bit values (`nn.fp8`) as an operand of a product.

    `pinned`: keep their layout. For weights: 8-bit products need the summed axis last, and XLA would otherwise
    transpose a whole stack of masters far from here. Not for what a mesh shards: it would be gathered first.
    """
    return with_layout_constraint(values, Layout((0, 1))) if pinned else values


def row_by_row(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The operands of a layer's two gradients, as they are stored for both."""
    return arrays


def after(tree, g: jax.Array):
    """What a backward pass computes again from `tree`; `g` is the gradient that reaches it."""
    return tree


def kept(tree):
    """Arrays [..., n] that many layers read, computed once."""
    return tree


def cache_dtype(dtype):
    """The dtype in which a cache keeps keys and values that are computed in `dtype`."""
    return dtype


def units(stacked, count: int) -> list:
    """The `count` units of stacked parameters."""
    return [entry(stacked, j) for j in range(count)]


def entry(tree, j: int):
    """Entry j of every array of a tree."""
    return jax.tree.map(lambda a: jax.lax.index_in_dim(a, j, keepdims=False), tree)


def over_units(function):
    """`function` of one unit as a function of stacked units."""
    return jax.vmap(function)
