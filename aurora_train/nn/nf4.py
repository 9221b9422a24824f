"""4-bit storage of frozen kernels: NormalFloat4 (Dettmers et al. 2023, QLoRA, section 3 and appendix E).

A kernel [in, out] is cut into blocks of 64 inputs of one output. A block stores its largest magnitude, rounded to
bfloat16, and for each weight the nearest of 16 levels, the quantiles of a normal distribution: 4.25 bits per weight.
Double quantisation, the paper's other half, would save another 0.12. Kernels are decoded where they are used, and again
in the backward pass, so that only one at a time exists in the compute dtype.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from aurora_train.nn.decoder_config import NF4_BLOCK as BLOCK
from aurora_train.nn.tracing import forms

CODES, SCALES = "_nf4", "_nf4_scale"  # suffixes of a kernel's name

# Appendix E: quantiles of N(0, 1), eight below zero and eight from zero on, divided by the largest.
LEVELS = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
_MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2


def encode(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., in, out] -> (uint8[..., in / 2, out], bfloat16[..., in / 64, out]); `in` must be a multiple of 64.

    A byte holds two inputs, the even one in its lower half. A block of zeros has the scale 0 and decodes to zeros.
    """
    *lead, inputs, outputs = kernel.shape
    assert inputs % BLOCK == 0, kernel.shape
    wide = kernel.astype(jnp.float32).reshape(*lead, inputs // BLOCK, BLOCK, outputs)
    scales = jnp.abs(wide).max(-2).astype(jnp.bfloat16)
    held = scales.astype(jnp.float32)[..., None, :]
    share = wide / jnp.where(held > 0, held, 1)
    codes = sum((share > middle).astype(jnp.uint8) for middle in _MIDDLES)
    pairs = codes.reshape(*lead, inputs // 2, 2, outputs)
    return pairs[..., 0, :] | (pairs[..., 1, :] << 4), scales


def decode(codes: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """The inverse of `encode`, up to rounding: the kernel [..., in, out] in `dtype`."""
    *lead, half, outputs = codes.shape
    halves = jnp.array([0, 4], jnp.uint8)[:, None]
    levels = jnp.take(LEVELS, (codes[..., None, :] >> halves) & 15, mode="clip")
    blocks = levels.reshape(*lead, 2 * half // BLOCK, BLOCK, outputs) * scales.astype(jnp.float32)[..., None, :]
    return blocks.reshape(*lead, 2 * half, outputs).astype(dtype)


def linear(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """x[..., in] times the coded kernel, in the dtype of x. The kernel has no gradient."""
    flat = x.reshape(-1, x.shape[-1])
    return _product(forms(), flat, codes, scales).reshape(*x.shape[:-1], codes.shape[-1])


def is_coded(name: str) -> bool:
    """Whether a parameter of this dotted name holds the codes or the scales of a kernel."""
    return name.endswith((CODES, SCALES))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(form, x, codes, scales):
    return form.times(x, decode(codes, scales, x.dtype))


def _product_forward(form, x, codes, scales):
    return _product(form, x, codes, scales), (codes, scales)


def _product_backward(form, residuals, g):
    # The barrier makes the compiler decode the kernel again instead of keeping the forward pass's copy.
    codes, scales, g = jax.lax.optimization_barrier((*residuals, g))
    return form.times_transposed(g, decode(codes, scales, g.dtype)), None, None


_product.defvjp(_product_forward, _product_backward)
