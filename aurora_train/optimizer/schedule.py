"""The learning rate over a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp


def make_schedule(peak: float, config, total_steps: int) -> Callable[[Any], Any]:
    """Learning rate as a float32 function of the step (0-based).

    Linear warm-up over `warmup` steps, then: constant; cosine or linear, to `final * peak` at the last step; or
    WSD (Hu et al. 2024, MiniCPM, section 4.2): constant, then linear to `final * peak` at the last step, over the last
    `decay` share of the steps.
    """
    warmup, last, floor = config.warmup, max(total_steps, 1) - 1, config.final
    decaying = config.decay * (last + 1) if config.name == "wsd" else max(last - warmup, 1)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum(1.0, (step + 1) / max(warmup, 1)) if warmup else jnp.float32(1.0)
        if config.name == "constant" or not decaying:
            return (peak * ramp).astype(jnp.float32)
        # Counted from the end, so that the last step has exactly none of it left.
        left = jnp.clip((last - step) / decaying, 0.0, 1.0)
        if config.name == "cosine":
            left = 0.5 * (1 + jnp.cos(jnp.pi * (1 - left)))
        return (peak * ramp * (floor + (1 - floor) * left)).astype(jnp.float32)

    return schedule
