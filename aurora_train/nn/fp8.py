"""Operands of 8 bits for the products of a stack's units: `train.precision: fp8`.

Activations and weights in e4m3, gradients in e5m2 (Micikevicius et al. 2022, "FP8 formats for deep learning"), sums in
float32. Each tensor is scaled as it is ("current scaling"): there is no history to save, so a run resumes as any other.
A scale is a power of two, and multiplying by one is exact in any float: what is lost is what 8 bits lose.

Only training asks for it: scores are taken in bfloat16, where no example's depends on its neighbours in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from aurora_train.errors import UserError

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
DTYPE = jnp.bfloat16  # of what goes into a coded product and of what comes out
MULTIPLE = 16  # what both sizes of a kernel must divide by: the GPUs' own products ask for it
_LEAST = 2.0**-100  # below it a scale's reciprocal is not a number that float32 has room for

# `ends` while a step is traced that asks for 8 bits, else None; and whether what is traced is a unit that takes them.
_asked = jax.make_user_context(None)
_unit = jax.make_user_context(False)


class Coded(NamedTuple):
    """values times scale: an array of 8-bit floats and a float32 power of two."""

    values: jax.Array
    scale: jax.Array


def asking(precision: str, ends: int):
    """Within, the units of stacks multiply in 8 bits if `precision` is "fp8", but for `ends` units at either end."""
    return _asked(ends if precision == "fp8" else None)


def is_asked() -> bool:
    """Whether a step is being traced whose units multiply in 8 bits."""
    return _asked.value is not None


def unit(narrow: bool):
    """Within, `nn.linear` multiplies in 8 bits, or not."""
    return _unit(narrow)


def in_unit() -> bool:
    """Whether what is traced now is a unit that multiplies in 8 bits."""
    return _unit.value


def narrow(num_units: int) -> tuple[int, int]:
    """The units [first, last) of a stack that multiply in 8 bits in what is traced now."""
    return within(num_units, _asked.value) if is_asked() else (0, 0)


def within(num_units: int, ends: int) -> tuple[int, int]:
    """The units [first, last) of a stack without those at its ends. UserError where none are left."""
    if num_units <= 2 * ends:
        raise UserError(
            f"nothing is left to train in fp8: {ends} units at either end of a stack of {num_units} stay in bfloat16",
            where="train.bf16_ends", hint=f"at most {(num_units - 1) // 2}, or train.precision=bfloat16",
        )  # fmt: skip
    return ends, num_units - ends


def refuse_without(stacks) -> None:
    """UserError where 8 bits are asked for and the model has no stack whose units could take them."""
    if is_asked() and not stacks:
        raise UserError(
            "the model has no stack of blocks, and nothing else is multiplied in fp8", where="train.precision",
            hint="train.precision=bfloat16",
        )  # fmt: skip


def encode(x: jax.Array, dtype) -> Coded:
    """x as 8-bit floats, its largest magnitude in the upper half of their range.

    Rounds to the nearest, ties to even. If anything in x is not finite, no value is: a step that went wrong is seen.
    """
    most = jnp.abs(x).max().astype(jnp.float32)
    scale = _power_above(jnp.maximum(most / float(jnp.finfo(dtype).max), _LEAST))
    scale = jnp.where(jnp.isfinite(most), scale, jnp.nan)
    # In the dtype of x, where it is as exact: in float32 XLA would keep x in float32.
    return Coded((x * (1 / scale).astype(x.dtype)).astype(dtype), scale)


def scaled(product: jax.Array, a: Coded, b: Coded) -> jax.Array:
    """A product of two arrays' values as the product of the arrays, in its dtype; exact."""
    return product * (a.scale * b.scale).astype(product.dtype)


def operand(form: str, coded: Coded) -> jax.Array:
    """The values as a product takes them. "cpu": as bfloat16, which holds them all: no CPU multiplies in 8 bits."""
    if form != "cpu":
        return with_layout_constraint(coded.values, Layout((0, 1)))
    return jax.lax.optimization_barrier(coded.values).astype(DTYPE)


def refuse_shape(shape: tuple[int, ...]) -> None:
    """UserError for a kernel that the GPUs' 8-bit products do not take: they would be upcast in silence."""
    if any(size % MULTIPLE for size in shape):
        raise UserError(
            f"a kernel of {shape[0]} x {shape[1]} cannot be multiplied in fp8", where="train.precision",
            why=f"both sizes must be multiples of {MULTIPLE}",
            hint="train.precision=bfloat16, or other widths in model",
        )  # fmt: skip


def one_line(ends: int, machine) -> str:
    """What `aurora train` prints at its start. `machine`: a `machine.profile.Machine`."""
    kept = f", {ends} at either end in bfloat16" if ends else ""
    line = f"fp8: products of the blocks from 8-bit operands{kept}; attention, the head and scores in bfloat16"
    if machine.platform == "cpu":
        return f"{line}. Emulated: slower than bfloat16 on this CPU, for looking at the loss only"
    if machine.known is not None and "fp8" not in machine.known.peak_flops:
        return f"{line}. {machine.known.name} has no products of 8 bits: bfloat16 is as fast and exact"
    return line


def _power_above(x: jax.Array) -> jax.Array:
    """The least power of two that is not below x, a positive normal float32: by its bits, since log2 is not exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
