"""Products of a few rows with stored weights, as decoding has them, written for XLA:CPU.

XLA:CPU multiplies one row by float32 alone, and would first convert a whole weight: of every layer at once, into memory
that is new for each token, which the kernel maps page by page. That took ten times as long as the product itself
(docs/log.md, 2026-12-01). So a weight is converted in pieces that a cache holds, each only when the product before it
is done, and all in the same small memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.nn.plain import dot

_ROWS, _ROWS_OF_CODES = 4, 64
_PIECE = 1 << 20  # values of a weight that are converted at a time: 4 MB


def most(dtype, stored) -> int:
    """How many rows of a dtype are best multiplied here by weights of another that is stored: for more in bfloat16, XLA
    has kernels; but 8-bit codes have to be converted in any case."""
    return _ROWS if dtype == stored else _ROWS_OF_CODES


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
    never = (jax.lax.bitcast_convert_type(done[0, 0], jnp.int32) | 1) == 0
    return jnp.where(never, 0.0, piece.astype(jnp.float32))
