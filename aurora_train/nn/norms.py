"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), computed in float32 for any activations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.nn import param
from aurora_train.nn.tracing import forms


class Norm(nnx.Module):
    """[..., size] -> [..., size], same dtype. `kind`: "rmsnorm", or "layernorm" with a bias.

    `offset` multiplies by 1 + scale and starts scale at zero (Gemma).
    """

    def __init__(self, size: int, kind: str = "rmsnorm", eps: float = 1e-5, offset: bool = False):
        self.eps, self.centred, self.offset = eps, kind == "layernorm", offset
        self.scale = param.zeros(size, "norm") if offset else param.ones(size, "norm")
        if self.centred:
            self.bias = param.zeros(size, "norm")

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...] + 1.0 if self.offset else self.scale[...]
        return normalise(self.eps, self.centred, x, scale, self.bias[...] if self.centred else None)


def normalise(eps: float, centred: bool, x, scale, bias):
    """Normalise the last axis of x to unit mean square (and zero mean if `centred`), then scale and shift."""
    return _normalise(forms(), eps, centred, x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _normalise(form, eps, centred, x, scale, bias):
    return _forward(form, eps, centred, x, scale, bias)[0]


def _statistics(form, eps, centred, x):
    wide = x.astype(jnp.float32)
    if centred:
        wide = wide - form.row_mean(wide)
    inverse = jax.lax.rsqrt(form.row_mean(wide * wide) + eps)
    return wide * inverse, inverse


def _forward(form, eps, centred, x, scale, bias):
    unit, _ = _statistics(form, eps, centred, x)
    y = unit * scale.astype(jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype), (x, scale, bias)


def _backward(form, eps, centred, residuals, g):
    x, scale, bias = residuals
    unit, inverse = _statistics(form, eps, centred, x)
    g = g.astype(jnp.float32)
    scaled = g * scale.astype(jnp.float32)
    dx = scaled - unit * form.row_mean(scaled * unit)
    if centred:
        dx = dx - form.row_mean(scaled)
    dbias = None if bias is None else form.column_sum(g).astype(bias.dtype)
    return (dx * inverse).astype(x.dtype), form.column_sum(g * unit).astype(scale.dtype), dbias


_normalise.defvjp(_forward, _backward)
