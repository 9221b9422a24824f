"""The trunk of all policies: an encoder of what is observed, and a decoder of the chunk of actions that reads it.

What is observed becomes tokens: one for each vector feature, one for the instruction, several for each camera. Both
halves are stacks of the package's own blocks, so memory plans cut them and checkpoints name their layers. Places enter
as in DETR (Carion et al. 2020), which ACT took over: they are added to queries and keys in every layer, not to values.
All values are scaled (`robot.scaling`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.nn import param
from aurora_train.nn.attention import Context, choose_attention
from aurora_train.nn.block import unit_maker
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.linear import linear
from aurora_train.nn.norms import Norm
from aurora_train.nn.stack import Stack
from robot.settings import ModelConfig
from robot.vision import make_vision

DECODER_SITE = 0xD  # makes the decoder's dropout masks others than the encoder's


class Shape(NamedTuple):
    """What a policy sees and does: the sizes of the state's features, cameras as (name, height, width), the size of an
    instruction's features (0: it sees none), actions in a chunk, entries of an action."""

    state: tuple[int, ...]
    cameras: tuple[tuple[str, int, int], ...]
    instruction: int
    chunk: int
    actions: int


class Memory(NamedTuple):
    """What the decoder reads: the encoder's output, and the places of its tokens, [B, T, width] and [1, T, width]."""

    tokens: jax.Array
    places: jax.Array


class Affine(nnx.Module):
    """[..., inputs] -> [..., outputs]: a kernel and a bias."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.kernel = param.kernel(rngs, (inputs, outputs), ("inputs", "embed"))
        self.bias = param.zeros(outputs, "embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(x, self.kernel[...], self.bias[...])


class Blocks(nnx.Module):
    """x[B, T, width] -> [B, T, width]: blocks in which every token sees all tokens of its segment.

    With `reads`, each layer also attends to a memory: self-attention, cross-attention, MLP (Vaswani et al. 2017).
    `final_norm`: whether a norm follows; by default, where the blocks' outputs are not normalised already.
    """

    def __init__(self, config: ModelConfig, layers: int, dtype: str, rngs: nnx.Rngs, *, reads: bool = False,
                 final_norm: bool | None = None):  # fmt: skip
        self.config = blocks_config(config, layers, reads)
        self.attention = choose_attention(self.config, dtype, "bidirectional")
        make_unit, num_units = unit_maker(self.config, self.attention.name, "bidirectional")
        self.stack = Stack(make_unit, num_units, rngs)
        has_norm = config.norm_place == "before" if final_norm is None else final_norm
        self.final_norm = Norm(config.width, "layernorm") if has_norm else None

    def __call__(self, x, places, keys=None, segments=None, memory: Memory | None = None):
        """`places`: [1, T, width]. `keys`: key[B] or None. `segments`: int32[B, T], or one segment."""
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        context = Context(positions, segments, places=places)
        if memory is not None:
            context = context._replace(memory=memory.tokens, memory_places=memory.places)
        x, _, _ = self.stack(x, context, keys)
        return x if self.final_norm is None else self.final_norm(x)


def blocks_config(config: ModelConfig, layers: int, reads: bool = False) -> DecoderConfig:
    """The shape of `Blocks` as the package's own section, which also counts their parameters."""
    table = [{"mlp": False}, {"kind": "cross"}] if reads else None
    return DecoderConfig(
        width=config.width, layers=layers * (2 if reads else 1), heads=config.heads, mlp_width=config.mlp_width,
        activation=config.activation, norm="layernorm", norm_place=config.norm_place, bias="all", positions="none",
        dropout=config.dropout, layer_table=table,
    )  # fmt: skip


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
        self.places = _places(rngs, singles, width)
        self.vision = make_vision(config, shape.cameras, dtype, rngs) if shape.cameras else None
        if shape.cameras:
            self.camera_places = _places(rngs, len(shape.cameras), width)
        self.encoder = Blocks(config, config.layers, dtype, rngs)
        self.chunk_places = param.named(sinusoid(jnp.arange(shape.chunk), width), ("positions", "embed"))
        self.decoder = Blocks(config, config.decoder_layers, dtype, rngs, reads=True, final_norm=True)
        self.head = Affine(width, shape.actions, rngs)

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
        tokens, places = [jnp.stack(tokens, 1)] if tokens else [], [self.places[...]]
        for number, (name, _, _) in enumerate(self.shape.cameras):
            picture = self.vision(seen[f"image.{name}"].astype(self.dtype), keys)
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
        keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, DECODER_SITE))(keys)
        x = self.decoder(x, self.chunk_places[...][None], keys, memory=memory)
        return self.head(x.astype(jnp.float32))


def mean_of_real(errors: jax.Array, padded: jax.Array) -> jax.Array:
    """float32[B]: errors[B, K, A] summed over the actions that are real and divided by K A, as LeRobot's ACT does.

    A chunk at the end of an episode so weighs as much as it has real actions.
    """
    return jnp.where(padded[..., None], 0, errors.astype(jnp.float32)).mean((1, 2))


def sinusoid(at: jax.Array, width: int) -> jax.Array:
    """float32[..., width]: sines and cosines in turn, of wavelengths from 2 pi to 20000 pi (Vaswani et al. 2017)."""
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = jnp.asarray(at, jnp.float32)[..., None] * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*angle.shape[:-1], -1)[..., :width]


def sinusoid_2d(height: int, width: int, size: int) -> jax.Array:
    """float32[height * width, size]: the first half of a place says the row, the second the column."""
    half = size // 2
    rows = jnp.broadcast_to(sinusoid(jnp.arange(height), half)[:, None], (height, width, half))
    columns = jnp.broadcast_to(sinusoid(jnp.arange(width), size - half)[None], (height, width, size - half))
    return jnp.concatenate([rows, columns], -1).reshape(height * width, size)


def _places(rngs: nnx.Rngs, count: int, width: int) -> nnx.Param:
    """Learned places, normal with standard deviation 1: as large as sinusoids, so that attention begins with them."""
    return param.named(jax.random.normal(rngs.params(), (count, width), jnp.float32), ("positions", "embed"))
