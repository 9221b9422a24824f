"""Rotary positions (Su et al. 2021), halves convention (GPT-NeoX, Llama): component i turns with i + dim/2."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from aurora_train.nn.decoder_config import Rope, RopeScaling


def rope_frequencies(rope: Rope) -> np.ndarray:
    """float32[dims / 2], radians per position; for longrope, of rows up to the original length."""
    frequency = rope.theta ** (-np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    if rope.scaling.kind == "linear":
        frequency = frequency / rope.scaling.factor
    if rope.scaling.kind == "llama3":
        frequency = _llama3(frequency, rope.scaling)
    if rope.scaling.kind == "yarn":
        frequency = _yarn(frequency, rope)
    if rope.scaling.kind == "longrope":
        frequency = frequency / np.asarray(rope.scaling.short_factors)
    return frequency.astype(np.float32)


def _llama3(frequency, scaling):
    """Stretch long waves by `factor`, keep short ones, and blend those between (Llama 3.1 reference code)."""
    turns = scaling.original_length * frequency / (2 * math.pi)  # turns of each wave within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (keep + (1 - keep) / scaling.factor)


def _yarn(frequency, rope: Rope):
    """Blend by the number of a pair, between the pairs that turn `beta_fast` and `beta_slow` times (Peng et al. 2023).

    The bounds are rounded outwards to whole pairs, as in the authors' code.
    """
    scaling = rope.scaling

    def pair(turns):  # the number of the pair that turns so often within the original context, a real number
        return rope.dims * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), rope.dims - 1)
    stretch = np.clip((np.arange(rope.dims // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return frequency * (1 - stretch + stretch / scaling.factor)


def attention_factor(scaling: RopeScaling) -> float:
    """The factor on cosines and sines, 1 without yarn or longrope (Peng et al. 2023, eq. 22; Ding et al. 2024)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind not in ("yarn", "longrope") or scaling.factor <= 1:
        return 1.0
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_length))


def rope_table(positions: jax.Array, rope: Rope, real=None, lasts=None) -> tuple[jax.Array, jax.Array]:
    """int32[B, T] -> cosines and sines, float32[B, T, dims / 2] each; made once for all layers.

    With longrope, a text with a position beyond the original length takes the long factors for all of its positions.
    A text is a run of positions that follow each other. `real`: bool[B, T], False for padding, which counts for none.
    `lasts`: int32[B], the last position of the text of which each row is a part, if rows are parts.
    """
    frequencies, factor = rope_frequencies(rope), attention_factor(rope.scaling)
    if rope.scaling.kind == "longrope":
        last = _last_of_text(positions, real) if lasts is None else lasts[:, None]
        beyond = last[..., None] >= rope.scaling.original_length
        ratio = np.asarray(rope.scaling.short_factors) / np.asarray(rope.scaling.long_factors)
        frequencies = jnp.where(beyond, (frequencies * ratio).astype(np.float32), frequencies)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    if factor == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _last_of_text(positions: jax.Array, real: jax.Array | None) -> jax.Array:
    """int32[B, T]: the last position of the text in which each position lies."""
    places = jnp.arange(positions.shape[1])
    follows = positions[:, 1:] == positions[:, :-1] + 1
    if real is not None:
        follows &= real[:, 1:]
    ends = jnp.pad(~follows, ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(ends, places, positions.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(positions, end, axis=1)


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
