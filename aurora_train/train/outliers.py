"""Detects outlier steps on the device: a robust z-score of loss and gradient norm against those of recent good steps.

z = (value - median) / (1.4826 x median absolute deviation); the factor makes the deviation comparable to that of a
normal distribution (Iglewicz and Hoaglin 1993). The memory is part of the state, so a resumed run judges like the
undisturbed one; a skipped step is not remembered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MEMORY = 64  # steps
FEWEST = 16  # remembered steps that a judgement needs
_NORMAL = 1.4826
_LEAST = 0.01  # smallest deviation, as a share of the median: else any change after a quiet stretch is an outlier


def empty() -> dict[str, jax.Array]:
    """An empty memory: float32[64] of losses and of gradient norms, and the number of remembered steps."""
    return {"loss": jnp.zeros(MEMORY), "grad_norm": jnp.zeros(MEMORY), "count": jnp.int32(0)}


def is_outlier(recent: dict, values: dict[str, jax.Array], limit: float) -> jax.Array:
    """Whether one of the values (float32 scalars `loss`, `grad_norm`) has a z-score above `limit`."""
    known = jnp.arange(MEMORY) < recent["count"]

    def far(name):
        held = jnp.where(known, recent[name], jnp.nan)
        middle = jnp.nanmedian(held)
        spread = jnp.maximum(_NORMAL * jnp.nanmedian(jnp.abs(held - middle)), _LEAST * jnp.abs(middle))
        return values[name] - middle > limit * spread

    return (recent["count"] >= FEWEST) & (far("loss") | far("grad_norm"))


def remembered(recent: dict, values: dict[str, jax.Array], good: jax.Array) -> dict[str, jax.Array]:
    """The memory after a step; unchanged if the step is not `good`."""
    place = recent["count"] % MEMORY
    new = {name: recent[name].at[place].set(values[name]) for name in ("loss", "grad_norm")}
    new["count"] = recent["count"] + 1
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, recent)
