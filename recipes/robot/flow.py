"""Flow matching (Lipman et al. 2023) along straight lines, the rectified flow of Liu et al. 2023.

At time t in [0, 1] a chunk is x_t = (1 - t) noise + t actions; the network learns the mean of its velocity, actions -
noise, and acting means to follow that velocity from noise to actions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robot.noising import Denoiser
from robot.settings import ModelConfig
from robot.trunk import Shape


class Flow(Denoiser):
    """A denoiser whose field is the velocity."""

    def __init__(self, config: ModelConfig, shape: Shape, dtype: str, rngs):
        super().__init__(config, shape, dtype, rngs)
        self.steps, self.solver = config.noising.steps, config.noising.solver

    def error(self, memory, action, time, noise, keys):
        t = jnp.asarray(time)[..., None, None]
        return jnp.square(self.field(memory, (1 - t) * noise + t * action, time, keys) - (action - noise))

    def actions(self, seen: dict, keys=None):
        """Scaled actions float32[B, K, A], a sample for each key; without keys from one fixed noise."""
        memory = self.trunk.read(seen)
        return follow(lambda x, t: self.field(memory, x, t), self.start(memory, keys), self.steps, self.solver)


def follow(velocity, x, steps: int, solver: str = "euler"):
    """Integrate dx/dt = velocity(x, t) from t = 0 to 1 in equal steps, by Euler's rule or the midpoint rule."""
    step = 1 / steps

    def forward(x, t):
        slope = velocity(x, t)
        if solver == "midpoint":
            slope = velocity(x + step / 2 * slope, t + step / 2)
        return x + step * slope, None

    return jax.lax.scan(forward, x, jnp.arange(steps, dtype=jnp.float32) * step)[0]
