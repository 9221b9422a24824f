"""Rotary positions (Su et al. 2021), halves convention (GPT-NeoX, Llama): component i turns with i + dim/2."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from aurora_train.nn.decoder_config import Rope


def rope_frequencies(rope: Rope) -> np.ndarray:
    """float32[dims / 2], radians per position."""
    frequency = rope.theta ** (-np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    if rope.scaling.kind == "linear":
        frequency = frequency / rope.scaling.factor
    if rope.scaling.kind == "llama3":
        frequency = _llama3(frequency, rope.scaling)
    return frequency.astype(np.float32)


def _llama3(frequency, scaling):
    """Stretch long waves by `factor`, keep short ones, and blend those between (Llama 3.1 reference code)."""
    turns = scaling.original_length * frequency / (2 * math.pi)  # turns of each wave within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (keep + (1 - keep) / scaling.factor)


def rope_table(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """int32[B, T] -> cosines and sines, float32[B, T, dims / 2] each; made once for all layers."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x[B, T, heads, head_dim] rotated by its position, in float32, returned in the dtype of x.

    If the table has fewer entries than a head, only the first entries of each head turn (GPT-NeoX).
    """
    dims = 2 * rope[0].shape[-1]
    if dims < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :dims], rope), x[..., dims:]], -1)
    cosine, sine = (part[:, :, None, :] for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(x.dtype)
