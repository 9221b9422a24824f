"""Matrix products: float32 masters cast to the activations' dtype at use, weight gradients summed in float32.

XLA:CPU has fast bfloat16 kernels only for bf16 x bf16 -> f32 dots whose left operand is stored row by row; all else
it upcasts, three to four times slower. Hence the CPU form: explicit transposes behind barriers, which XLA would
otherwise fold back into the dot (and a folded transpose of the result crashes at run time).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from aurora_train.nn.platform import platform

barrier = jax.lax.optimization_barrier


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x[..., in] times weight[in, out] plus bias[out], in the dtype of x."""
    flat = x.reshape(-1, x.shape[-1])
    y = flat @ weight.astype(x.dtype) if x.dtype == jnp.float32 else _mixed(platform() == "cpu", flat, weight)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[-1])


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, out_dtype=jnp.float32) -> jax.Array:
    """Contract one axis of each 2-D array."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=out_dtype)


def times(on_cpu: bool, x: jax.Array, low: jax.Array) -> jax.Array:
    """x[n, in] times low[in, out], both of one dtype and so the result."""
    if on_cpu and x.dtype != jnp.float32:
        return dot(barrier(x), low, 1, 0).astype(x.dtype)
    return dot(x, low, 1, 0, x.dtype)


def times_transposed(on_cpu: bool, g: jax.Array, low: jax.Array) -> jax.Array:
    """g[n, out] times the transpose of low[in, out]: the gradient of what was multiplied by it."""
    if on_cpu and g.dtype != jnp.float32:
        return dot(g, low, 1, 1).astype(g.dtype)
    return dot(g, low, 1, 1, g.dtype)


def outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """a[n, k], b[n, m] -> float32[k, m]: the gradient of a weight, in the form that is fast on this platform."""
    if platform() != "cpu" or a.dtype == jnp.float32:
        return dot(a, b, 0, 0)
    if b.shape[1] < a.shape[1]:  # transposing the narrower of the two moves fewer bytes
        return barrier(dot(barrier(b.T), a, 1, 0)).T
    return dot(barrier(a.T), b, 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(on_cpu: bool, x, weight):
    return _mixed_forward(on_cpu, x, weight)[0]


def _mixed_forward(on_cpu, x, weight):
    return times(on_cpu, x, weight.astype(x.dtype)), (x, weight)


def _mixed_backward(on_cpu, residuals, g):
    x, weight = residuals
    low = weight.astype(x.dtype)
    if on_cpu:
        x, g = barrier(x), barrier(g)
    return times_transposed(on_cpu, g, low), outer(x, g).astype(weight.dtype)


_mixed.defvjp(_mixed_forward, _mixed_backward)
