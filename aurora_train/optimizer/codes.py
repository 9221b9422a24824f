"""Stores a moment in eight bits: a dynamic code in blocks, each scaled by its own largest magnitude.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", sections 2.1 and 2.2. Code k > 0 has its leading
bit at i and stands for the decade (10^(i-top-1), 10^(i-top)], which the bits below divide evenly: large values are
finely resolved, and small ones still have seven decades. It differs from the paper's table in one respect: values lie
at the upper ends of their intervals instead of in the middle, so that the largest of a block is restored exactly. Code
and value are then piecewise linear functions of each other, the code concave and the value convex, so that neither a
table nor a logarithm is needed: the code is the minimum of its lines and the value the maximum.

Measured on a small language model (AdamW, 200 steps, loss near 4.2): linear codes of the second moment diverge, while
linear codes of its root do as well as these, which reach two decades further. Rounding is stochastic because rounding
to the nearest code freezes a slow moment: at beta2 0.999 one that should have fallen to 0.30 of a block's largest
stayed at 0.78.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from aurora_train.optimizer.rounding import uniform

BLOCK = 256  # elements with one scale, along the last axis: a cut along any other axis never cuts a block
_TINY = float(np.finfo(np.float32).tiny)  # a block below this is zero: its scale has no inverse


def measure(x):
    """float32[..., n] -> float32[..., ceil(n / 256)]: the largest magnitude of each block, the scale of its codes."""
    scales = _in_blocks(jnp.abs(x)).max(-1)
    return jnp.where(scales >= _TINY, scales, 0)


def pack(x, scales, dtype, noise):
    """float32[..., n] and the `measure` of it -> codes of `dtype` [..., n].

    int8 codes have a sign. uint8 codes are for values that are never negative, and no positive value becomes zero,
    because Adam divides by its root. `noise` (uint32[..., n]) rounds with a mean error of zero; None rounds to the
    nearest code.
    """
    divisor = _per_element(jnp.where(scales > 0, scales, jnp.inf), x.shape[-1])
    share = jnp.minimum(jnp.abs(x) / divisor, 1)
    code = jnp.floor(_least(share, dtype) + (0.5 if noise is None else uniform(noise)))
    code = jnp.minimum(code, jnp.iinfo(dtype).max)
    if dtype == jnp.uint8:
        # `share > 0` would make XLA:GPU keep the zeros of the comparison in memory, as many as there are parameters.
        return jnp.maximum(code, jnp.ceil(share)).astype(dtype)
    return (jnp.sign(x) * code).astype(dtype)


def unpack(codes, scales):
    """The float32[..., n] that `pack` coded."""
    wide = codes.astype(jnp.float32)
    value = _greatest(jnp.abs(wide), codes.dtype) * _per_element(scales, codes.shape[-1])
    return value if codes.dtype == jnp.uint8 else jnp.sign(wide) * value


def blocks(size: int) -> int:
    """Number of scales along a last axis of `size`."""
    return -(-size // min(BLOCK, size))


def _lines(dtype) -> list[tuple[float, float]]:
    """(slope, offset) of the code over the value, one line for each decade; the lowest goes through zero."""
    top = 7 if dtype == jnp.uint8 else 6
    decades = [(2.0**i * 10.0 ** (top - i) / 0.9, 2.0**i - 1 - 2.0**i / 9) for i in range(1, top + 1)]
    return [(10.0**top, 0.0), *decades]


def _least(value, dtype):
    first, *others = (value * np.float32(slope) + np.float32(offset) for slope, offset in _lines(dtype))
    for line in others:
        first = jnp.minimum(first, line)
    return first


def _greatest(code, dtype):
    first, *others = ((code - np.float32(offset)) * np.float32(1 / slope) for slope, offset in _lines(dtype))
    for line in others:
        first = jnp.maximum(first, line)
    return first


def _in_blocks(x):
    size = x.shape[-1]
    width = min(BLOCK, size)
    padding = blocks(size) * width - size
    if padding:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], -1, width)


def _per_element(scales, size: int):
    """[..., blocks] -> [..., size]"""
    width = min(BLOCK, size)
    wide = jnp.broadcast_to(scales[..., None], (*scales.shape, width))
    return wide.reshape(*scales.shape[:-1], -1)[..., :size]
