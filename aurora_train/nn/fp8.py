"""8-bit operands for the products of a stack's units: `train.precision: fp8`.

Activations and weights are e4m3, gradients e5m2 (Micikevicius et al. 2022, "FP8 formats for deep learning"). Each
tensor has one scale from its current amax ("current scaling"): there is no history to save, so a run resumes like any
other. A scale is a power of two, and multiplying by one is exact in any float, so only the 8 bits lose precision.

Only training uses it: scores are computed in bfloat16, where no example depends on its neighbours in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aurora_train.compat import jaxprs_in_params
from aurora_train.errors import UserError
from aurora_train.nn.tracing import current

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
FIRST_WITH_FP8 = (8, 9)  # compute capability: Ada
DTYPE = jnp.bfloat16  # of the inputs and the output of an 8-bit product
_LEAST = 2.0**-100  # a smaller scale's reciprocal does not fit in float32


class Quantized(NamedTuple):
    """values times scale: an array of 8-bit floats and a float32 power of two."""

    values: jax.Array
    scale: jax.Array


def quantized_units(num_units: int) -> tuple[int, int]:
    """The units [first, last) of a stack that multiply in 8 bits in the current trace."""
    ends = current().fp8_ends
    return (0, 0) if ends is None else without_ends(num_units, ends)


def without_ends(num_units: int, ends: int, name: str = "a stack") -> tuple[int, int]:
    """The units [first, last) of a stack without those at its ends. UserError if none are left."""
    if num_units <= 2 * ends:
        raise UserError(
            f"nothing is left for fp8: {ends} at either end of the {num_units} units of {name} stay in bfloat16",
            where="train.bf16_ends", hint=f"train.bf16_ends={(num_units - 1) // 2} at most",
        )  # fmt: skip
    return ends, num_units - ends


def refuse_unused(jaxpr) -> None:
    """UserError for a step that should multiply in 8 bits but never does."""
    if current().fp8_ends is not None and not _has_8_bits(jaxpr):
        raise UserError(
            "nothing in this model is multiplied in fp8", where="train.precision",
            why="only aurora_train.nn.linear.linear, on bfloat16 activations in a Stack's units, does that",
            hint="train.precision=bfloat16",
        )  # fmt: skip


def _has_8_bits(jaxpr) -> bool:
    return any(
        any(getattr(v.aval, "dtype", None) in (FORWARD, GRADIENT) for v in equation.outvars)
        or any(map(_has_8_bits, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def quantize(x: jax.Array, dtype) -> Quantized:
    """x as 8-bit floats, its largest magnitude in the upper half of their range.

    Rounds to the nearest, ties to even. If anything in x is not finite, no value is, so that a bad step is noticed.
    """
    amax = jnp.abs(x).max().astype(jnp.float32)
    scale = _power_above(jnp.maximum(amax / float(jnp.finfo(dtype).max), _LEAST))
    scale = jnp.where(jnp.isfinite(amax), scale, jnp.nan)
    # Computed in the dtype of x, where it is equally exact: in float32, XLA would keep x in float32.
    return Quantized((x * (1 / scale).astype(x.dtype)).astype(dtype), scale)


def scaled(product: jax.Array, a: Quantized, b: Quantized) -> jax.Array:
    """The product of two arrays from the product of their values, in its dtype; exact."""
    return product * (a.scale * b.scale).astype(product.dtype)


def one_line(ends: int, machine) -> str:
    """The line on fp8 that `aurora train` prints at its start. `machine`: a `machine.profile.Machine`."""
    kept = f", {ends} at either end in bfloat16" if ends else ""
    line = f"fp8: products of the blocks from 8-bit operands{kept}; attention, the head and scores in bfloat16"
    if machine.platform == "cpu":
        return f"{line}. Emulated: slower than bfloat16 on this CPU, useful only to look at the loss"
    if machine.known is not None and "fp8" not in machine.known.peak_flops:
        return f"{line}. {machine.known.name} has no 8-bit products: bfloat16 is at least as fast and more exact"
    return line


def _power_above(x: jax.Array) -> jax.Array:
    """The smallest power of two >= x, a positive normal float32; computed from its bits, since log2 is not exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
