"""Elementwise functions that keep only their inputs for the backward pass, and means over rows (forms: `nn.ops`)."""

import functools

import jax
import jax.numpy as jnp


def lean(function, form: str):
    """`function` of arrays, returning one float array, with a backward pass that keeps only the inputs and recomputes.

    `form`: that of the operation "activation".
    """

    @jax.custom_vjp
    @functools.wraps(function)
    def wrapped(*inputs):
        return function(*inputs)

    def backward(inputs, g):
        return jax.vjp(function, *after(form, inputs, g))[1](g)

    wrapped.defvjp(lambda *inputs: (function(*inputs), inputs), backward)
    return wrapped


def after(form: str, tree, g: jax.Array):
    """Return `tree` bit for bit; in the form "cpu", only once `g` (bfloat16 or float32) exists.

    XLA:CPU would otherwise compute early, and keep, what a backward pass recomputes (a slice, a transpose, an
    activation), because it drops optimization barriers before scheduling. So the arrays are made to depend on a test of
    `g` that is never true, which only LLVM recognises and removes.
    """
    if form != "cpu" or g.size == 0:
        return tree
    word = jax.lax.bitcast_convert_type(g[(0,) * g.ndim], jnp.int16 if g.dtype.itemsize == 2 else jnp.int32)
    never = (word | 1) == 0
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), tree)


def row_mean(form: str, x: jax.Array) -> jax.Array:
    """float32[..., n] -> float32[..., 1]. "cpu": a product with ones, as XLA:CPU's reductions do not use all lanes."""
    size = x.shape[-1]
    if form != "cpu":
        return jnp.mean(x, -1, keepdims=True)
    return (x.reshape(-1, size) @ jnp.full((size, 1), 1 / size, x.dtype)).reshape(*x.shape[:-1], 1)
