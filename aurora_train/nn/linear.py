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
    low = weight.astype(x.dtype)
    if on_cpu:
        return dot(barrier(x), low, 1, 0).astype(x.dtype), (x, weight)
    return dot(x, low, 1, 0, x.dtype), (x, weight)


def _mixed_backward(on_cpu, residuals, g):
    x, weight = residuals
    low = weight.astype(x.dtype)
    if on_cpu:
        x, g = barrier(x), barrier(g)
        dx = dot(g, low, 1, 1).astype(x.dtype)
    else:
        dx = dot(g, low, 1, 1, x.dtype)
    return dx, outer(x, g).astype(weight.dtype)


_mixed.defvjp(_mixed_forward, _mixed_backward)
