"""8-bit storage of kernels for decoding: whole numbers, a scale for each output (Dettmers et al. 2022, section 2.1).

Activations stay in the compute dtype: what is saved is the reading of weights, by which decoding is bound.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.nn.tracing import forms

CODES, SCALES = "_int8", "_int8_scale"  # suffixes of a kernel's name


def encode(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., in, out] -> (int8[..., in, out], float32[..., 1, out]). An output without weights has the scale 0."""
    wide = kernel.astype(jnp.float32)
    scales = jnp.abs(wide).max(-2, keepdims=True) / 127
    return jnp.round(wide / jnp.where(scales > 0, scales, 1)).astype(jnp.int8), scales


def decode(codes: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """The inverse of `encode`, up to rounding: the kernel [..., in, out] in `dtype`."""
    return (codes.astype(jnp.float32) * scales).astype(dtype)


def linear(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """x[..., in] times the stored kernel, in the dtype of x; scaled after the sum, which is in float32."""
    flat = x.reshape(-1, x.shape[-1])
    y = forms().times_few(flat, codes) * scales
    return y.astype(x.dtype).reshape(*x.shape[:-1], codes.shape[-1])
