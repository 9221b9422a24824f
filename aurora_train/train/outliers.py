"""Which step is an outlier: a robust z-score of its loss and gradient norm against the last good steps', on the device.

z = (value - median) / (1.4826 x median absolute deviation), the factor that makes the deviation that of a normal
distribution (Iglewicz and Hoaglin 1993). The memory is part of the state, so a resumed run judges as the undisturbed
one; a step that was skipped is not remembered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MEMORY = 64  # steps
FEWEST = 16  # remembered steps, before which none is judged
_NORMAL = 1.4826
_LEAST = 0.01  # of the median: a deviation below it counts as this, or a quiet stretch would call any change an outlier


def empty() -> dict[str, jax.Array]:
    """Nothing remembered: float32[64] of losses and of gradient norms, and how many steps were remembered."""
    return {"loss": jnp.zeros(MEMORY), "grad_norm": jnp.zeros(MEMORY), "count": jnp.int32(0)}


def is_outlier(recent: dict, values: dict[str, jax.Array], limit: float) -> jax.Array:
    """Whether one of the values (float32 scalars `loss`, `grad_norm`) lies more than `limit` above its median."""
    known = jnp.arange(MEMORY) < recent["count"]

    def far(name):
        held = jnp.where(known, recent[name], jnp.nan)
        middle = jnp.nanmedian(held)
        spread = jnp.maximum(_NORMAL * jnp.nanmedian(jnp.abs(held - middle)), _LEAST * jnp.abs(middle))
        return values[name] - middle > limit * spread

    return (recent["count"] >= FEWEST) & (far("loss") | far("grad_norm"))


def remembered(recent: dict, values: dict[str, jax.Array], good: jax.Array) -> dict[str, jax.Array]:
    """The memory after a step; as it was where the step is not `good`."""
    place = recent["count"] % MEMORY
    new = {name: recent[name].at[place].set(values[name]) for name in ("loss", "grad_norm")}
    new["count"] = recent["count"] + 1
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, recent)
