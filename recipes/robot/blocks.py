"""The parts of the trunk: affine maps, stacks of blocks that see both ways, and sinusoidal places.

The blocks are the package's own, so memory plans cut the stacks and checkpoints name their layers. Places enter as in
DETR (Carion et al. 2020), which ACT took over: they are added to queries and keys in every layer, not to values.
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


class Memory(NamedTuple):
    """What the decoder reads: the encoder's output, and the places of its tokens, [B, T, width] and [1, T, width]."""

    tokens: jax.Array
    places: jax.Array


class Affine(nnx.Module):
    """[..., inputs] -> [..., outputs]: a kernel, normal with deviation gain / sqrt(inputs), and a bias."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, gain: float = 1.0):
        self.kernel = param.kernel(rngs, (inputs, outputs), ("inputs", "embed"), gain)
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
