"""ACT, the Action Chunking Transformer (Zhao et al. 2023): a conditional VAE whose decoder is the trunk.

In training, an encoder of its own reads the actions of the expert and describes their style by a latent variable, which
the trunk is given as one more token. When the policy acts, the latent is the mean of its prior, zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.nn import param
from robot.blocks import Affine, Blocks, sinusoid
from robot.settings import ModelConfig
from robot.trunk import Shape, Trunk, folded, mean_of_real

STYLE_SITE, POSTERIOR_SITE = 0xAC, 0xAD


class Act(nnx.Module):
    """The trunk with the latent's token first, and the posterior q(latent | state, actions)."""

    def __init__(self, config: ModelConfig, shape: Shape, dtype: str, rngs: nnx.Rngs):
        self.latent, self.weight = config.latent, config.kl_weight
        self.trunk = Trunk(config, shape, dtype, rngs, extras=1)
        self.style = Affine(config.latent, config.width, rngs)
        self.posterior = Posterior(config, shape, dtype, rngs)

    def losses(self, seen: dict, action, padded, keys=None):
        """(float32[B], metrics): absolute error plus kl_weight times KL(q || N(0, 1)) of each chunk.

        Without keys the latent is the mean of q, not a sample of it.
        """
        mean, log_variance = self.posterior(seen, action, padded, keys)
        latent = mean
        if keys is not None:
            latent = mean + jnp.exp(log_variance / 2) * style_noise(keys, self.latent)
        chunk = self._decoded(seen, latent, keys)
        error = mean_of_real(jnp.abs(chunk - action), padded)
        kl = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(-1)
        count = jnp.float32(len(error))
        return error + self.weight * kl, {"l1": (error.sum(), count), "kl": (kl.sum(), count)}

    def actions(self, seen: dict, keys=None):
        """Scaled actions float32[B, K, A] under the mean of the prior; keys are not used."""
        batch = next(iter(seen.values())).shape[0]
        return self._decoded(seen, jnp.zeros((batch, self.latent), jnp.float32))

    def _decoded(self, seen, latent, keys=None):
        token = self.style(latent.astype(self.trunk.dtype))
        return self.trunk.decode(self.trunk.read(seen, keys, [token]), keys)


class Posterior(nnx.Module):
    """(mean, log variance) of the latent, float32[B, latent] each, from the state's first feature and the actions.

    Its tokens are a class token, that feature if there is one, and the actions, of which padded ones are not seen.
    """

    def __init__(self, config: ModelConfig, shape: Shape, dtype: str, rngs: nnx.Rngs):
        self.size, self.dtype, width = (shape.state[0] if shape.state else 0), dtype, config.width
        self.first = param.table(rngs, (1, width), ("positions", "embed"))
        self.state = Affine(self.size, width, rngs) if self.size else None
        self.action = Affine(shape.actions, width, rngs)
        self.blocks = Blocks(config, config.posterior_layers, dtype, rngs)
        self.out = Affine(width, 2 * config.latent, rngs, gain=0.1)  # begins near the prior

    def __call__(self, seen: dict, action, padded, keys=None):
        batch, width = action.shape[0], self.first.shape[1]
        tokens = [jnp.broadcast_to(self.first[...].astype(self.dtype), (batch, 1, width))]
        if self.state is not None:
            tokens.append(self.state(seen["state"][:, None, : self.size].astype(self.dtype)))
        x = jnp.concatenate([*tokens, self.action(action.astype(self.dtype))], 1)
        # Padding is a segment of its own, which no real token sees.
        segments = jnp.concatenate([jnp.ones((batch, len(tokens)), bool), ~padded], 1).astype(jnp.int32)
        keys = folded(keys, POSTERIOR_SITE)
        x = self.blocks(x, sinusoid(jnp.arange(x.shape[1]), width)[None], keys, segments)
        return jnp.split(self.out(x[:, 0].astype(jnp.float32)), 2, -1)


def style_noise(keys, size: int):
    """float32[B, size], standard normal, from a key for each example."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, STYLE_SITE), (size,)))(keys)
