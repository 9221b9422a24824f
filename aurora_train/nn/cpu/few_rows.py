"""Products of a few rows with stored weights, as decoding has them, written for XLA:CPU.

XLA:CPU multiplies one row by float32 alone, and would first convert a whole weight: of every layer at once, into memory
that is new for each token, which the kernel maps page by page. That took ten times as long as the product itself
(docs/log.md, 2026-12-01). So a weight is converted in pieces that a cache holds, each only when the product before it
is done, and all in the same small memory.

Where there are kernels for the dtype, they pack the right operand anew in every call, but read the left one as it is
stored. So weights that are kept as [out, in] are the left operand of a few rows (`by_outputs`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.machine.profile import cpu_flags
from aurora_train.nn.plain import dot

barrier = jax.lax.optimization_barrier

_ROWS, _ROWS_OF_CODES = 4, 64
_PIECE = 1 << 20  # values of a weight that are converted at a time: 4 MB


def most(dtype, stored) -> int:
    """How many rows of a dtype are best multiplied here by weights of another that is stored: for more in bfloat16, XLA
    has kernels; but 8-bit codes have to be converted in any case."""
    return _ROWS if dtype == stored else _ROWS_OF_CODES


def has_kernel(dtype) -> bool:
    """Whether products of this dtype need no conversion here: of bfloat16 on x86 with AVX-512 BF16 or AMX."""
    if dtype == jnp.float32:
        return True
    return dtype == jnp.bfloat16 and not cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16"))


def by_outputs(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x[n, in] times a weight [out, in] of its dtype -> float32[n, out]; for few rows it is the left operand."""
    count, wide = len(x), x.dtype == jnp.float32
    if count > (16 if wide else 32) or (wide and count == 1):
        return dot(barrier(x), weight, 1, 1)
    padded = jnp.pad(x, ((0, -count % 8), (0, 0)))  # kernels take eight columns at a time
    # A mere transpose would be folded into the product, for which there is no kernel then.
    columns = jnp.where(_never(padded), jnp.zeros((), x.dtype), padded.T)
    return barrier(dot(weight, columns, 1, 0))[:, :count].T


def times(x: jax.Array, weight: jax.Array, axis: int = 0) -> jax.Array:
    """x[n, in] times a weight of fewer bits than float32, [in, out] (`axis` 0) or [out, in] (`axis` 1), in float32.

    The values of x and of the weight are multiplied as they are and summed in float32, as by `plain.dot`.
    """
    wide, outputs = x.astype(jnp.float32), weight.shape[1 - axis]
    step = max(1, _PIECE // weight.shape[axis])
    done, results = wide, []
    for start in range(0, outputs, step):
        piece = jax.lax.slice_in_dim(weight, start, min(start + step, outputs), axis=1 - axis)
        done = dot(wide, _converted(piece, done), 1, axis)
        results.append(done)
    return results[0] if len(results) == 1 else jnp.concatenate(results, axis=1)


def _converted(piece: jax.Array, done: jax.Array) -> jax.Array:
    """A piece in float32, but not before `done` (float32) exists: it depends on a test of it that is never true, as in
    `forms.after`."""
    return jnp.where(_never(done), 0.0, piece.astype(jnp.float32))


def _never(x):
    """False, as only LLVM finds out."""
    return (jax.lax.bitcast_convert_type(x[0, 0], jnp.int32 if x.dtype.itemsize == 4 else jnp.int16) | 1) == 0
