"""What turns a picture into tokens: a small convolutional network, one that says where things are, or a small ViT."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.errors import UserError
from aurora_train.nn.norms import Norm
from robot.blocks import Affine, Blocks, sinusoid_2d
from robot.settings import ModelConfig

SHIFT_SITE = 0x51


class Convolutions(nnx.Module):
    """float[B, H, W, 3] -> [B, H / 16, W / 16, width], rounded up: four 3x3 convolutions of stride 2 and a map."""

    def __init__(self, config: ModelConfig, dtype: str, rngs: nnx.Rngs):
        first = config.vision.channels
        sizes = [3, first, 2 * first, 4 * first, 4 * first]
        self.layers = nnx.List([
            nnx.Conv(before, after, (3, 3), 2, use_bias=False, dtype=dtype, rngs=rngs)
            for before, after in zip(sizes[:-1], sizes[1:], strict=True)
        ])  # fmt: skip
        self.norms = nnx.List([Norm(size, "layernorm") for size in sizes[1:]])
        self.out = Affine(sizes[-1], config.width, rngs)

    def __call__(self, picture, keys=None):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            picture = jax.nn.gelu(norm(layer(picture)))
        return self.out(picture)


class Keypoints(nnx.Module):
    """float[B, H, W, 3] -> [B, 1, 1, width]: where in the picture each of 4 `channels` features is, as one token.

    Three 3x3 convolutions, of stride 2, 2 and 1. Each channel of the last is a softmax over places, whose mean is a
    place between -1 and 1 along each axis, finer than a pixel (spatial softmax: Levine et al. 2016, section 5.1).
    """

    def __init__(self, config: ModelConfig, dtype: str, rngs: nnx.Rngs):
        first = config.vision.channels
        sizes, strides = [3, first, 2 * first, 4 * first], [2, 2, 1]
        self.layers = nnx.List([
            nnx.Conv(before, after, (3, 3), stride, use_bias=False, dtype=dtype, rngs=rngs)
            for before, after, stride in zip(sizes[:-1], sizes[1:], strides, strict=True)
        ])  # fmt: skip
        self.norms = nnx.List([Norm(size, "layernorm") for size in sizes[1:-1]])
        self.out = Affine(2 * sizes[-1], config.width, rngs)

    def __call__(self, picture, keys=None):
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            picture = jax.nn.gelu(norm(layer(picture)))
        where = jax.nn.softmax(self.layers[-1](picture).astype(jnp.float32), (1, 2))
        rows, columns = (jnp.linspace(-1, 1, size) for size in where.shape[1:3])
        places = [jnp.einsum("bhwc,h->bc", where, rows), jnp.einsum("bhwc,w->bc", where, columns)]
        return self.out(jnp.concatenate(places, -1).astype(picture.dtype))[:, None, None]


class Patches(nnx.Module):
    """float[B, H, W, 3] -> [B, H / patch, W / patch, width]: a ViT (Dosovitskiy et al. 2021) without a class token."""

    def __init__(self, config: ModelConfig, dtype: str, rngs: nnx.Rngs):
        self.patch = config.vision.patch
        self.entry = Affine(3 * self.patch**2, config.width, rngs)
        self.blocks = Blocks(config, config.vision.layers, dtype, rngs)

    def __call__(self, picture, keys=None):
        batch, height, width = picture.shape[0], picture.shape[1] // self.patch, picture.shape[2] // self.patch
        x = picture.reshape(batch, height, self.patch, width, self.patch, 3).swapaxes(2, 3)
        x = self.entry(x.reshape(batch, height * width, -1))
        x = self.blocks(x, sinusoid_2d(height, width, x.shape[-1])[None], keys)
        return x.reshape(batch, height, width, -1)


def make_vision(config: ModelConfig, cameras, dtype: str, rngs: nnx.Rngs):
    """The network of all cameras, (name, height, width) each. UserError for a picture that patches do not divide."""
    if config.vision.kind != "vit":
        return {"cnn": Convolutions, "keypoints": Keypoints}[config.vision.kind](config, dtype, rngs)
    for name, height, width in cameras:
        if height % config.vision.patch or width % config.vision.patch:
            fitting = [str(n) for n in range(2, min(height, width) + 1) if height % n == 0 and width % n == 0]
            raise UserError(
                f"patches of {config.vision.patch} pixels do not divide the {height} x {width} pixels of `{name}`",
                where="model.vision.patch", hint=f"use one of {', '.join(fitting)}" if fitting else "kind: cnn",
            )  # fmt: skip
    return Patches(config, dtype, rngs)


def shifted(pictures: jax.Array, keys: jax.Array, most: int) -> jax.Array:
    """uint8[B, H, W, 3], each moved by up to `most` pixels in each direction; its border is repeated."""
    if most == 0:
        return pictures
    return jax.vmap(functools.partial(_shifted, most=most))(pictures, keys)


def _shifted(picture, key, most: int):
    at = jax.random.randint(jax.random.fold_in(key, SHIFT_SITE), (2,), 0, 2 * most + 1)
    padded = jnp.pad(picture, ((most, most), (most, most), (0, 0)), "edge")
    return jax.lax.dynamic_slice(padded, (at[0], at[1], 0), picture.shape)
