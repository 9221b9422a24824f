"""The learning rate as a function that a compiled step can call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from aurora_train.learning_rate import rate


def make_schedule(peak: float, config, total_steps: int) -> Callable[[Any], Any]:
    """Learning rate as a float32 function of the step (0-based); `config` is `optimizer.schedule`. See `rate`."""

    def schedule(step):
        return rate(step, peak, config, total_steps, jnp)

    return schedule
