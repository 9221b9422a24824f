"""Operands of 8 bits for the products of a stack's units: `train.precision: fp8`.

Activations and weights in e4m3, gradients in e5m2 (Micikevicius et al. 2022, "FP8 formats for deep learning"). Each
tensor has one scale, of its amax as it is ("current scaling"): there is no history to save, so a run resumes as any
other. A scale is a power of two, and multiplying by one is exact in any float: what is lost is what 8 bits lose.

Only training asks for it: scores are taken in bfloat16, where no example's depends on its neighbours in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from aurora_train.compat import jaxprs_in_params
from aurora_train.errors import UserError

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
FIRST_WITH_FP8 = (8, 9)  # compute capability: Ada
DTYPE = jnp.bfloat16  # of what goes into an 8-bit product and of what comes out
_LEAST = 2.0**-100  # below it a scale's reciprocal is not a number that float32 has room for

# `ends` while a step is traced that asks for 8 bits, else None; and whether what is traced is a unit that takes them.
_asked = jax.make_user_context(None)
_unit = jax.make_user_context(False)


class Quantized(NamedTuple):
    """values times scale: an array of 8-bit floats and a float32 power of two."""

    values: jax.Array
    scale: jax.Array


def asking(precision: str, ends: int):
    """Within, the units of stacks multiply in 8 bits if `precision` is "fp8", but for `ends` units at either end."""
    return _asked(ends if precision == "fp8" else None)


def is_asked() -> bool:
    """Whether a step is being traced whose units multiply in 8 bits."""
    return _asked.value is not None


def unit(quantized: bool):
    """Within, `nn.linear` multiplies in 8 bits, or not."""
    return _unit(quantized)


def in_unit() -> bool:
    """Whether what is traced now is a unit that multiplies in 8 bits."""
    return _unit.value


def quantized_units(num_units: int) -> tuple[int, int]:
    """The units [first, last) of a stack that multiply in 8 bits in what is traced now."""
    return without_ends(num_units, _asked.value) if is_asked() else (0, 0)


def without_ends(num_units: int, ends: int, name: str = "a stack") -> tuple[int, int]:
    """The units [first, last) of a stack but for those at its ends. UserError where none are left."""
    if num_units <= 2 * ends:
        raise UserError(
            f"nothing is left for fp8: {ends} at either end of the {num_units} units of {name} stay in bfloat16",
            where="train.bf16_ends", hint=f"train.bf16_ends={(num_units - 1) // 2} at most",
        )  # fmt: skip
    return ends, num_units - ends


def refuse_unused(jaxpr) -> None:
    """UserError for a step that was to multiply in 8 bits and never does."""
    if is_asked() and not _has_8_bits(jaxpr):
        raise UserError(
            "nothing in this model is multiplied in fp8", where="train.precision",
            why="only products by aurora_train.nn.linear.linear of bfloat16 activations, in the units of a Stack, are",
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

    Rounds to the nearest, ties to even. If anything in x is not finite, no value is: a step that went wrong is seen.
    """
    amax = jnp.abs(x).max().astype(jnp.float32)
    scale = _power_above(jnp.maximum(amax / float(jnp.finfo(dtype).max), _LEAST))
    scale = jnp.where(jnp.isfinite(amax), scale, jnp.nan)
    # In the dtype of x, where it is as exact: in float32 XLA would keep x in float32.
    return Quantized((x * (1 / scale).astype(x.dtype)).astype(dtype), scale)


def scaled(product: jax.Array, a: Quantized, b: Quantized) -> jax.Array:
    """A product of two arrays' values as the product of the arrays, in its dtype; exact."""
    return product * (a.scale * b.scale).astype(product.dtype)


def operand(form: str, array: Quantized, *, pinned: bool = False) -> jax.Array:
    """The values as a product takes them. "cpu": as bfloat16, which holds them all: no CPU multiplies in 8 bits.

    `pinned`: in the layout that they have. For a weight: 8-bit products want the summed axis last, and XLA would meet
    the wish far from here, by turning a whole stack of masters. Not for what a mesh shards: it would be gathered first.
    """
    if form == "cpu":
        # Without the barrier XLA takes the way to 8 bits and back for excess precision, and leaves it out.
        return jax.lax.optimization_barrier(array.values).astype(DTYPE)
    return with_layout_constraint(array.values, Layout((0, 1))) if pinned else array.values


def one_line(ends: int, machine) -> str:
    """What `aurora train` prints at its start. `machine`: a `machine.profile.Machine`."""
    kept = f", {ends} at either end in bfloat16" if ends else ""
    line = f"fp8: products of the blocks from 8-bit operands{kept}; attention, the head and scores in bfloat16"
    if machine.platform == "cpu":
        return f"{line}. Emulated: slower than bfloat16 on this CPU, for looking at the loss only"
    if machine.known is not None and "fp8" not in machine.known.peak_flops:
        return f"{line}. {machine.known.name} has no products of 8 bits: bfloat16 is at least as fast, and more exact"
    return line


def _power_above(x: jax.Array) -> jax.Array:
    """The least power of two that is not below x, a positive normal float32: by its bits, since log2 is not exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
