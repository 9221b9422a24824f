"""The learning rate over a run: one formula, in numpy for inspecting a config and in jax.numpy for the step."""

from __future__ import annotations

import numpy as np


def rate(step, peak: float, config, total_steps: int, numbers=np):
    """Learning rate, float32, at a step (0-based; a number or an array of them) of a run of `total_steps`.

    `config` is `optimizer.schedule`; `numbers` is numpy or jax.numpy. Linear warm-up over `warmup` steps, then:
    constant; cosine or linear, to `final * peak` at the last step; or WSD (Hu et al. 2024, MiniCPM, section 4.2):
    constant, then linear to `final * peak` at the last step, over the last `decay` share of the steps. With `extend`
    the schedule ends at the last step of a run of that many steps, and the rate stays constant after it.
    """
    length = total_steps if config.extend is None else config.extend
    warmup, last, floor = config.warmup, max(length, 1) - 1, config.final
    decaying = config.decay * (last + 1) if config.name == "wsd" else max(last - warmup, 1)
    step = numbers.asarray(step, numbers.float32)
    ramp = numbers.minimum(1.0, (step + 1) / max(warmup, 1)) if warmup else numbers.float32(1.0)
    if config.name == "constant" or not decaying:
        return (peak * ramp).astype(numbers.float32)
    # Counted from the end, so that exactly zero is left at the last step.
    left = numbers.clip((last - step) / decaying, 0.0, 1.0)
    if config.name == "cosine":
        left = 0.5 * (1 + numbers.cos(numbers.pi * (1 - left)))
    return (peak * ramp * (floor + (1 - floor) * left)).astype(numbers.float32)
