"""Chunked behaviour cloning: the chunk that minimises the squared error, which is the mean of what experts did."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from robot.settings import ModelConfig
from robot.trunk import Shape, Trunk, mean_of_real


class Cloning(nnx.Module):
    """The trunk alone. Where experts do one of two things, it does what lies between them."""

    def __init__(self, config: ModelConfig, shape: Shape, dtype: str, rngs: nnx.Rngs):
        self.trunk = Trunk(config, shape, dtype, rngs)

    def losses(self, seen: dict, action, padded, keys=None):
        """(float32[B], metrics): the squared error of each chunk. `action` float32[B, K, A] is scaled."""
        error = jnp.square(self.trunk.decode(self.trunk.read(seen, keys), keys) - action)
        return mean_of_real(error, padded), {}

    def actions(self, seen: dict, keys=None):
        """Scaled actions float32[B, K, A]; keys are not used."""
        return self.trunk.decode(self.trunk.read(seen))
