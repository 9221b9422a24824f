"""The learning rate over a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp


def make_schedule(peak: float, config, total_steps: int) -> Callable[[Any], Any]:
    """Learning rate as a float32 function of the step (0-based).

    Linear warm-up over `warmup` steps, then: constant; cosine or linear to `final * peak` at the last step; or
    WSD (Hu et al. 2024, MiniCPM, section 4.2): constant, then linear to `final * peak` over the last `decay` share.
    """
    warmup, end = config.warmup, max(total_steps, 1)
    floor = config.final

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum(1.0, (step + 1) / max(warmup, 1)) if warmup else jnp.float32(1.0)
        progress = jnp.clip((step - warmup) / max(end - warmup, 1), 0.0, 1.0)
        if config.name == "constant":
            shape = jnp.float32(1.0)
        elif config.name == "cosine":
            shape = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.name == "linear":
            shape = 1 - (1 - floor) * progress
        else:
            start = end * (1 - config.decay)
            shape = 1 - (1 - floor) * jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)
        return (peak * ramp * shape).astype(jnp.float32)

    return schedule
