"""What flow matching and diffusion share: a trunk that is given a noisy chunk and how noisy it is, and their noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from robot.blocks import Affine, sinusoid
from robot.settings import ModelConfig
from robot.trunk import Shape, Trunk, mean_of_real

NOISE_SITE, TIME_SITE = 0xF0, 0xF1
EVALUATED = (0.125, 0.375, 0.625, 0.875)  # the times at which a loss without keys is measured
FIXED = 0  # the seed of the noise where there is no key


class Denoiser(nnx.Module):
    """A function of (a noisy chunk, a time in [0, 1], what was observed), which a subclass gives its meaning."""

    def __init__(self, config: ModelConfig, shape: Shape, dtype: str, rngs: nnx.Rngs):
        self.trunk = Trunk(config, shape, dtype, rngs)
        self.noisy = Affine(shape.actions, config.width, rngs)
        self.time_in = Affine(config.width, config.width, rngs)
        self.time_out = Affine(config.width, config.width, rngs)

    def field(self, memory, x, time, keys=None):
        """float32[B, K, A] for x float32[B, K, A] and time float32[B] or a scalar."""
        dtype, width = self.trunk.dtype, self.time_in.kernel.shape[0]
        time = jnp.broadcast_to(time, x.shape[:1])
        said = jax.nn.silu(self.time_in(sinusoid(1000 * time, width).astype(dtype)))
        return self.trunk.decode(memory, keys, self.noisy(x.astype(dtype)) + self.time_out(said)[:, None])

    def losses(self, seen: dict, action, padded, keys=None):
        """(float32[B], metrics): the squared error of each chunk at a time of its own. `action` is scaled.

        Without keys it is the mean over a few fixed times, with the same noise for all examples. Padded actions, which
        repeat the last one, are part of the noisy chunk, as later actions are when the policy acts; their errors do not
        count.
        """
        memory = self.trunk.read(seen, keys)

        def at(time, noise):
            return mean_of_real(self.error(memory, action, time, noise, keys), padded)

        if keys is not None:
            time = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, TIME_SITE)))(keys)
            return at(time, noise_like(action, keys)), {}
        fixed = jax.random.normal(jax.random.key(FIXED), (len(EVALUATED), *action.shape[1:]))
        each = jax.lax.map(lambda one: at(one[0], jnp.broadcast_to(one[1], action.shape)),
                           (jnp.array(EVALUATED, jnp.float32), fixed))  # fmt: skip
        return each.mean(0), {}

    def error(self, memory, action, time, noise, keys):
        """Squared error float32[B, K, A] at a time float32[B] or a scalar."""
        raise NotImplementedError

    def start(self, memory, keys):
        """The noise float32[B, K, A] from which a chunk is made; the same for all rows without keys."""
        shape = self.trunk.shape
        return noise_like(jnp.zeros((memory.tokens.shape[0], shape.chunk, shape.actions), jnp.float32), keys)


def noise_like(x, keys):
    """Standard normal noise float32[B, ...] of the shape of x, from a key for each example, or from none."""
    if keys is None:
        return jnp.broadcast_to(jax.random.normal(jax.random.key(FIXED), x.shape[1:]), x.shape)
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, NOISE_SITE), x.shape[1:]))(keys)
