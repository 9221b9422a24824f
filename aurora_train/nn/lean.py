"""Elementwise functions that keep only their inputs for the backward pass; means in the form fast on each platform."""

import functools

import jax
import jax.numpy as jnp

from aurora_train.nn.platform import platform


def lean(function):
    """`function` of arrays whose backward pass recomputes from the inputs: cheap, and nothing else is stored."""

    @jax.custom_vjp
    @functools.wraps(function)
    def wrapped(*inputs):
        return function(*inputs)

    wrapped.defvjp(lambda *inputs: (function(*inputs), inputs), lambda inputs, g: jax.vjp(function, *inputs)[1](g))
    return wrapped


def row_mean(x: jax.Array) -> jax.Array:
    """float32[..., n] -> float32[..., 1]. On CPU a product with ones: XLA:CPU's reductions do not use all lanes."""
    size = x.shape[-1]
    if platform() != "cpu":
        return jnp.mean(x, -1, keepdims=True)
    return (x.reshape(-1, size) @ jnp.full((size, 1), 1 / size, x.dtype)).reshape(*x.shape[:-1], 1)
