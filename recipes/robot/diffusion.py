"""Diffusion (Ho et al. 2020) of chunks of actions (Chi et al. 2023), sampled by DDIM (Song et al. 2021).

At level n of N a chunk is sqrt(a_n) actions + sqrt(1 - a_n) noise, where a_n falls by a squared cosine (Nichol and
Dhariwal 2021); the network learns the noise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from robot.noising import Denoiser
from robot.settings import ModelConfig
from robot.trunk import Shape


class Diffusion(Denoiser):
    """A denoiser whose field is the noise. `bounds`: the smallest and largest scaled action of the training frames."""

    def __init__(self, config: ModelConfig, shape: Shape, dtype: str, rngs, bounds=None):
        super().__init__(config, shape, dtype, rngs)
        self.levels, self.steps, self.bounds = config.noising.levels, config.noising.steps, bounds

    def error(self, memory, action, time, noise, keys):
        level = jnp.minimum((jnp.asarray(time) * self.levels).astype(jnp.int32), self.levels - 1)
        kept = jnp.asarray(signal(self.levels), jnp.float32)[level][..., None, None]
        x = jnp.sqrt(kept) * action + jnp.sqrt(1 - kept) * noise
        return jnp.square(self.field(memory, x, level / self.levels, keys) - noise)

    def actions(self, seen: dict, keys=None):
        """Scaled actions float32[B, K, A], a sample for each key; without keys from one fixed noise."""
        memory = self.trunk.read(seen)

        def noise(x, level):
            return self.field(memory, x, level / self.levels)

        return ddim(noise, self.start(memory, keys), self.levels, self.steps, self.bounds)


def signal(levels: int) -> np.ndarray:
    """float64[levels], a_n: the share of the variance that is signal at each level (Nichol and Dhariwal 2021, eq. 17).

    A level keeps at least 0.001 of the one before.
    """
    share = np.cos((np.arange(levels + 1) / levels + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(np.maximum(share[1:] / share[:-1], 0.001))


def visited(levels: int, steps: int) -> np.ndarray:
    """int[steps]: the levels that a sample passes through, evenly spaced from the noisiest down."""
    return np.round(np.linspace(levels, 0, steps, endpoint=False)).astype(int) - 1


def ddim(noise, x, levels: int, steps: int, bounds=None):
    """Deterministic DDIM (eta = 0) from x at the noisiest level to actions, where `noise(x, level)` predicts noise.

    `bounds`: (low, high) within which every estimate of the actions is clipped, or None.
    """
    at = visited(levels, steps)
    kept = np.append(signal(levels)[at], 1.0)
    pairs = [jnp.asarray(values, jnp.float32) for values in (at, kept[:-1], kept[1:], 1 - kept[:-1], 1 - kept[1:])]

    def backward(x, one):
        level, kept, kept_next, lost, lost_next = one
        said = noise(x, level)
        actions = (x - jnp.sqrt(lost) * said) / jnp.sqrt(kept)
        if bounds is not None:
            actions = jnp.clip(actions, jnp.asarray(bounds[0], jnp.float32), jnp.asarray(bounds[1], jnp.float32))
        return jnp.sqrt(kept_next) * actions + jnp.sqrt(lost_next) * said, None

    return jax.lax.scan(backward, x, tuple(pairs))[0]
