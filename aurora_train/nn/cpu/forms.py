"""The functions of `nn/plain.py` written for XLA:CPU; they run anywhere.

XLA:CPU has fast bfloat16 kernels only for bf16 x bf16 -> f32 dots whose left operand is stored row by row; it upcasts
everything else, which is two to four times slower. If the left operand is needed transposed, the summed axis is written
as two axes, so that XLA copies it row by row; a transpose, even behind a barrier, would be folded back into the dot and
upcast. A transpose of a 2-D bf16 dot's result stands behind a barrier (`nn/losses.py`), because folded into the dot it
crashes at run time. Reductions over rows do not use all lanes, and are written as products with ones.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from aurora_train.nn import plain
from aurora_train.nn.cpu import few_rows
from aurora_train.nn.plain import dot

barrier = jax.lax.optimization_barrier

TURNS_TIED_GRADIENT = True  # summed as its product comes, and transposed once


def times(x: jax.Array, low: jax.Array, out_dtype=None) -> jax.Array:
    """See `plain.times`."""
    if x.dtype == jnp.float32:
        return plain.times(x, low, out_dtype)
    return dot(barrier(x), low, 1, 0).astype(out_dtype or x.dtype)


def times_few(x: jax.Array, weight: jax.Array, axis: int = 0, out_dtype=jnp.float32) -> jax.Array:
    """See `plain.times_few`."""
    if weight.dtype == jnp.float32 == x.dtype and axis == 0:
        return plain.times_few(x, weight, axis)
    if axis == 1 and weight.dtype == x.dtype and few_rows.has_kernel(x.dtype):
        return few_rows.by_outputs(x, weight).astype(out_dtype)
    if weight.dtype == jnp.float32 or len(x) > few_rows.most(x.dtype, weight.dtype):
        return plain.times_few(barrier(x), weight, axis).astype(out_dtype)
    return few_rows.times(x, weight, axis).astype(out_dtype)


def times_transposed(g: jax.Array, low: jax.Array, out_dtype=None) -> jax.Array:
    """See `plain.times_transposed`."""
    if g.dtype == jnp.float32:
        return plain.times_transposed(g, low, out_dtype)
    return dot(g, low, 1, 1).astype(out_dtype or g.dtype)


def outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """See `plain.outer`."""
    if a.dtype == jnp.float32:
        return plain.outer(a, b)
    dims = (((0, 1), (0, 1)), ((), ()))
    return jax.lax.dot_general(_two_axes(a, 0), _two_axes(b, 0), dims, preferred_element_type=jnp.float32)


def batched_outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """See `plain.batched_outer`."""
    if a.dtype == jnp.float32:
        return plain.batched_outer(a, b)
    dims = (((1, 2), (1, 2)), ((0,), (0,)))
    return jax.lax.dot_general(_two_axes(a, 1), _two_axes(b, 1), dims, preferred_element_type=jnp.float32)


def _two_axes(x, axis):
    """x with one axis split into two, padded with zeros if it is odd."""
    length = x.shape[axis]
    parts = next((n for n in (8, 4, 2) if length % n == 0), None)
    if parts is None:
        pads = [(0, int(i == axis)) for i in range(x.ndim)]
        return _two_axes(jnp.pad(x, pads), axis)
    return x.reshape(*x.shape[:axis], parts, length // parts, *x.shape[axis + 1 :])


def column_sum(x: jax.Array) -> jax.Array:
    """See `plain.column_sum`. As a reduction it takes ten times as long."""
    rows = x.reshape(-1, x.shape[-1])
    # The bfloat16 kernels work on several rows at a time.
    height = 1 if x.dtype == jnp.float32 else 8
    return dot(jnp.ones((height, rows.shape[0]), x.dtype), rows, 1, 0)[0]


def row_mean(x: jax.Array) -> jax.Array:
    """See `plain.row_mean`."""
    size = x.shape[-1]
    return (x.reshape(-1, size) @ jnp.full((size, 1), 1 / size, x.dtype)).reshape(*x.shape[:-1], 1)


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """See `plain.add_bias`."""
    return plain.add_bias(y, bias)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), bias), lambda bias, g: (g, column_sum(g).astype(bias.dtype)))


def operand(values: jax.Array, *, pinned: bool = False) -> jax.Array:
    """The values as bfloat16, which holds them exactly: no CPU multiplies in 8 bits."""
    # Without the barrier XLA treats the conversion to 8 bits and back as excess precision and removes it.
    return barrier(values).astype(jnp.bfloat16)


def row_by_row(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """See `plain.row_by_row`; the compiler may not store them transposed for one of the two products."""
    return tuple(barrier(a) for a in arrays)


def after(tree, g: jax.Array):
    """Return `tree` bit for bit, but only once `g` (bfloat16 or float32) exists.

    XLA:CPU would otherwise compute early, and keep, what a backward pass recomputes (a slice, a transpose, an
    activation), because it drops optimization barriers before scheduling. So the arrays are made to depend on a test of
    `g` that is never true, which only LLVM recognises and removes.
    """
    if g.size == 0:
        return tree
    word = jax.lax.bitcast_convert_type(g[(0,) * g.ndim], jnp.int16 if g.dtype.itemsize == 2 else jnp.int32)
    never = (word | 1) == 0
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), tree)


def kept(tree):
    """See `plain.kept`: a product with the identity, which changes no number. XLA:CPU would merge cosines and sines
    into every layer, and compute them anew for each head."""
    return jax.tree.map(lambda a: a @ jnp.eye(a.shape[-1], dtype=a.dtype), tree)


def cache_dtype(dtype):
    """See `plain.cache_dtype`: XLA:CPU would convert a whole bfloat16 cache to float32 for every token."""
    return "float32"


def units(stacked, count: int) -> list:
    """See `plain.units`; leaf by leaf, so that frozen leaves are not differentiated."""
    leaves, structure = jax.tree.flatten(stacked)
    return [structure.unflatten(unit) for unit in zip(*(_slices(leaf, count) for leaf in leaves), strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _slices(x, count: int):
    """x[0], x[1], ..., whose gradients are stacked once. The gradient of a plain slice is a whole stack of zeros around
    it, and XLA:CPU writes each of these."""
    return tuple(plain.units(x, count))


_slices.defvjp(lambda x, count: (_slices(x, count), None), lambda count, _, parts: (jnp.stack(parts),))


def over_units(function):
    """See `plain.over_units`; one unit after another, or else XLA:CPU sums the squares of another cut of a stack in
    another order."""
    return lambda stacked: jax.lax.map(function, stacked)
