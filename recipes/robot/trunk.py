"""The trunk of all policies: an encoder of what is observed, and a decoder of the chunk of actions that reads it.

What is observed becomes tokens: one for each vector feature, one for the instruction, several for each camera. All
values are scaled (`robot.scaling`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.nn import param
from robot.blocks import Affine, Blocks, Memory, sinusoid, sinusoid_2d
from robot.settings import ModelConfig
from robot.vision import make_vision

# Sites that make the dropout masks of the decoder, and of each camera's ViT, others than the encoder's.
DECODER_SITE, CAMERA_SITE = 0xD, 0xCA00


class Shape(NamedTuple):
    """What a policy sees and does: the sizes of the state's features, cameras as (name, height, width), the size of an
    instruction's features (0: it sees none), actions in a chunk, entries of an action."""

    state: tuple[int, ...]
    cameras: tuple[tuple[str, int, int], ...]
    instruction: int
    chunk: int
    actions: int


class Trunk(nnx.Module):
    """Batches of observations to chunks of actions.

    `extras`: tokens of the policy's own before those of the observation. `noisy`: the decoder is given a noisy chunk
    of actions (`decode(x=...)`); otherwise it begins with zeros.
    """

    def __init__(self, config: ModelConfig, shape: Shape, dtype: str, rngs: nnx.Rngs, *, extras: int = 0):
        self.shape, self.dtype, width = shape, dtype, config.width
        self.state = nnx.List([Affine(size, width, rngs) for size in shape.state])
        self.instruction = Affine(shape.instruction, width, rngs) if shape.instruction else None
        singles = extras + len(shape.state) + (self.instruction is not None)
        if singles:  # a policy may see pictures alone, and no checkpoint holds an array of no entries
            self.places = _places(rngs, singles, width)
        self.vision = make_vision(config, shape.cameras, dtype, rngs) if shape.cameras else None
        if shape.cameras:
            self.camera_places = _places(rngs, len(shape.cameras), width)
        self.encoder = Blocks(config, config.layers, dtype, rngs)
        self.chunk_places = param.named(sinusoid(jnp.arange(shape.chunk), width), ("positions", "embed"))
        self.decoder = Blocks(config, config.decoder_layers, dtype, rngs, reads=True, final_norm=True)
        self.head = Affine(width, shape.actions, rngs, gain=0.1)

    def read(self, seen: dict, keys=None, extras=()) -> Memory:
        """Encode an observation: `state` float32[B, S], `image.NAME` float32[B, H, W, 3], `instruction` float32[B, F].

        `extras`: tokens [B, width].
        """
        tokens, start = list(extras), 0
        for size, entry in zip(self.shape.state, self.state, strict=True):
            tokens.append(entry(seen["state"][:, start : start + size].astype(self.dtype)))
            start += size
        if self.instruction is not None:
            tokens.append(self.instruction(seen["instruction"].astype(self.dtype)))
        tokens, places = ([jnp.stack(tokens, 1)], [self.places[...]]) if tokens else ([], [])
        for number, (name, _, _) in enumerate(self.shape.cameras):
            picture = self.vision(seen[f"image.{name}"].astype(self.dtype), folded(keys, CAMERA_SITE + number))
            _, height, width, size = picture.shape
            tokens.append(picture.reshape(len(picture), height * width, size))
            places.append(sinusoid_2d(height, width, size) + self.camera_places[...][number])
        x, places = jnp.concatenate(tokens, 1), jnp.concatenate(places)[None]
        return Memory(self.encoder(x, places, keys), places)

    def decode(self, memory: Memory, keys=None, x=None) -> jax.Array:
        """A chunk float32[B, K, A] from what was read, and from x[B, K, width] if the policy gives the decoder one."""
        batch, width = memory.tokens.shape[0], memory.tokens.shape[2]
        if x is None:
            x = jnp.zeros((batch, self.shape.chunk, width), self.dtype)
        x = self.decoder(x, self.chunk_places[...][None], folded(keys, DECODER_SITE), memory=memory)
        return self.head(x.astype(jnp.float32))


def mean_of_real(errors: jax.Array, padded: jax.Array) -> jax.Array:
    """float32[B]: errors[B, K, A] summed over the actions that are real and divided by K A, as LeRobot's ACT does.

    A chunk at the end of an episode so weighs as much as it has real actions.
    """
    return jnp.where(padded[..., None], 0, errors.astype(jnp.float32)).mean((1, 2))


def folded(keys, site: int):
    """Keys of a site of their own; None for none."""
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, site))(keys)


def _places(rngs: nnx.Rngs, count: int, width: int) -> nnx.Param:
    """Learned places, normal with standard deviation 1: as large as sinusoids, so that attention begins with them."""
    return param.named(jax.random.normal(rngs.params(), (count, width), jnp.float32), ("positions", "embed"))
