"""Matrix products: float32 masters cast to the activations' dtype at use, weight gradients summed in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from aurora_train.nn import fp8
from aurora_train.nn.tracing import current, forms


def linear(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None = None, *, wide: bool = False, turned: bool = False
) -> jax.Array:
    """x[..., in] times weight[in, out] plus bias[out], in the dtype of x.

    In a unit that multiplies in 8 bits (`nn.fp8`) operands are rounded to 8 bits, unless `wide`. `turned`: the weight
    is stored as [out, in], for decoding.
    """
    flat = x.reshape(-1, x.shape[-1])
    if x.dtype != jnp.float32 and current().in_8_bits and not wide:
        y = _quantized(forms(), flat, weight)
    elif turned or current().decoding:
        y = forms().times_few(flat, weight, int(turned), out_dtype=x.dtype)
    elif x.dtype == jnp.float32:
        y = flat @ weight.astype(x.dtype)
    else:
        y = _mixed(forms(), flat, weight)
    if bias is not None:
        y = forms().add_bias(y, bias)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(form, x, weight):
    return _mixed_forward(form, x, weight)[0]


def _mixed_forward(form, x, weight):
    return form.times(x, weight.astype(x.dtype)), (x, weight)


def _mixed_backward(form, residuals, g):
    x, weight = residuals
    low = weight.astype(x.dtype)
    x, g = form.row_by_row(x, g)
    return form.times_transposed(g, low), form.outer(x, g).astype(weight.dtype)


_mixed.defvjp(_mixed_forward, _mixed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantized(form, x, weight):
    return _quantized_forward(form, x, weight)[0]


def _quantized_forward(form, x, weight):
    x, low = fp8.quantize(x, fp8.FORWARD), fp8.quantize(weight, fp8.FORWARD)
    y = form.times(form.operand(x.values), form.operand(low.values, pinned=True), fp8.DTYPE)
    return fp8.scaled(y, x, low), (x, weight)  # x in 8 bits: half of what bfloat16 would keep


def _quantized_backward(form, residuals, g):
    x, weight = residuals
    # Recomputed, because keeping it would be one more copy of all weights.
    low, g = fp8.quantize(weight, fp8.FORWARD), fp8.quantize(g, fp8.GRADIENT)
    rows, columns = form.operand(g.values), form.operand(x.values)
    dx = form.times_transposed(rows, form.operand(low.values, pinned=True), fp8.DTYPE)
    return fp8.scaled(dx, g, low), fp8.scaled(form.outer(columns, rows), x, g).astype(weight.dtype)


_quantized.defvjp(_quantized_forward, _quantized_backward)
