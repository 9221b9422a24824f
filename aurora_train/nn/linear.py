"""Matrix products: float32 masters cast to the activations' dtype at use, weight gradients summed in float32.

XLA:CPU has fast bfloat16 kernels only for bf16 x bf16 -> f32 dots whose left operand is stored row by row; it upcasts
everything else, which is two to four times slower. Hence the form "cpu" (`nn.ops`). If the left operand is needed
transposed, the summed axis is written as two axes, so that XLA copies it row by row; a transpose, even behind a
barrier, would be folded back into the dot and upcast. A transpose of a 2-D bf16 dot's result stands behind a barrier
(`losses.py`), because folded into the dot it crashes at run time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from aurora_train.nn import fp8, ops

barrier = jax.lax.optimization_barrier


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None, *, wide: bool = False) -> jax.Array:
    """x[..., in] times weight[in, out] plus bias[out], in the dtype of x.

    In a unit that multiplies in 8 bits (`nn.fp8`) operands are rounded to 8 bits, unless `wide`.
    """
    flat = x.reshape(-1, x.shape[-1])
    if x.dtype == jnp.float32:
        y = flat @ weight.astype(x.dtype)
    elif fp8.in_unit() and not wide:
        y = _quantized(ops.form("linear"), flat, weight)
    else:
        y = _mixed(ops.form("linear"), flat, weight)
    if bias is not None:
        y = add_bias(y, bias)
    return y.reshape(*x.shape[:-1], weight.shape[-1])


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y[..., out] plus bias[out], in the dtype of y."""
    return _biased(y, bias) if ops.form("linear") == "cpu" else y + bias.astype(y.dtype)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, out_dtype=jnp.float32) -> jax.Array:
    """Contract one axis of each 2-D array."""
    # As in flax's fp8_ops: a GPU may sum 8-bit products in fewer bits than float32, but not those of gradients.
    precision = jax.lax.Precision.HIGHEST if fp8.GRADIENT in (a.dtype, b.dtype) else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=out_dtype)


def times(form: str, x: jax.Array, low: jax.Array, out_dtype=None) -> jax.Array:
    """x[n, in] times low[in, out] of the same dtype, which is also that of the result unless `out_dtype` is given."""
    out_dtype = out_dtype or x.dtype
    if form == "cpu" and x.dtype != jnp.float32:
        return dot(barrier(x), low, 1, 0).astype(out_dtype)
    return dot(x, low, 1, 0, out_dtype)


def times_transposed(form: str, g: jax.Array, low: jax.Array, out_dtype=None) -> jax.Array:
    """g[n, out] times the transpose of low[in, out]: the gradient of the other operand."""
    out_dtype = out_dtype or g.dtype
    if form == "cpu" and g.dtype != jnp.float32:
        return dot(g, low, 1, 1).astype(out_dtype)
    return dot(g, low, 1, 1, out_dtype)


def outer(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """a[n, k], b[n, m] -> float32[k, m]: the gradient of a weight."""
    if form != "cpu" or a.dtype == jnp.float32:
        return dot(a, b, 0, 0)
    return jax.lax.dot_general(
        _two_axes(a, 0), _two_axes(b, 0), (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32
    )


def batched_outer(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """a[N, n, k], b[N, n, m] -> float32[N, k, m]: `outer` for a batch."""
    if form != "cpu" or a.dtype == jnp.float32:
        dims = (((1,), (1,)), ((0,), (0,)))
    else:
        a, b, dims = _two_axes(a, 1), _two_axes(b, 1), (((1, 2), (1, 2)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _two_axes(x, axis):
    """x with one axis split into two, padded with zeros if it is odd."""
    length = x.shape[axis]
    parts = next((n for n in (8, 4, 2) if length % n == 0), None)
    if parts is None:
        pads = [(0, int(i == axis)) for i in range(x.ndim)]
        return _two_axes(jnp.pad(x, pads), axis)
    return x.reshape(*x.shape[:axis], parts, length // parts, *x.shape[axis + 1 :])


def column_sum(form: str, x: jax.Array) -> jax.Array:
    """[..., n] -> float32[n]: the gradient of a vector shared by all rows.

    "cpu": a product with ones, since XLA:CPU's reductions over rows take ten times as long.
    """
    rows = x.reshape(-1, x.shape[-1])
    if form != "cpu":
        return rows.astype(jnp.float32).sum(0)
    # The bfloat16 kernels work on several rows at a time.
    height = 1 if x.dtype == jnp.float32 else 8
    return dot(jnp.ones((height, rows.shape[0]), x.dtype), rows, 1, 0)[0]


@jax.custom_vjp
def _biased(y, bias):
    return y + bias.astype(y.dtype)


_biased.defvjp(lambda y, bias: (_biased(y, bias), bias), lambda bias, g: (g, column_sum("cpu", g).astype(bias.dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(form: str, x, weight):
    return _mixed_forward(form, x, weight)[0]


def _mixed_forward(form, x, weight):
    return times(form, x, weight.astype(x.dtype)), (x, weight)


def _mixed_backward(form, residuals, g):
    x, weight = residuals
    low = weight.astype(x.dtype)
    if form == "cpu":
        x, g = barrier(x), barrier(g)
    return times_transposed(form, g, low), outer(form, x, g).astype(weight.dtype)


_mixed.defvjp(_mixed_forward, _mixed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantized(form: str, x, weight):
    return _quantized_forward(form, x, weight)[0]


def _quantized_forward(form, x, weight):
    x, low = fp8.quantize(x, fp8.FORWARD), fp8.quantize(weight, fp8.FORWARD)
    y = times(form, fp8.operand(form, x), fp8.operand(form, low, pinned=True), fp8.DTYPE)
    return fp8.scaled(y, x, low), (x, weight)  # x in 8 bits: half of what bfloat16 would keep


def _quantized_backward(form, residuals, g):
    x, weight = residuals
    # Recomputed, because keeping it would be one more copy of all weights.
    low, g = fp8.quantize(weight, fp8.FORWARD), fp8.quantize(g, fp8.GRADIENT)
    rows, columns = fp8.operand(form, g), fp8.operand(form, x)
    dx = times_transposed(form, rows, fp8.operand(form, low, pinned=True), fp8.DTYPE)
    return fp8.scaled(dx, g, low), fp8.scaled(outer(form, columns, rows), x, g).astype(weight.dtype)


_quantized.defvjp(_quantized_forward, _quantized_backward)
