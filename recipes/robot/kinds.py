"""The four kinds of policies, and what they cost: from the config and the facts of a run to a model."""

from __future__ import annotations

import math

from robot.act import Act
from robot.blocks import blocks_config
from robot.cloning import Cloning
from robot.diffusion import Diffusion
from robot.flow import Flow
from robot.instruction import SIZE
from robot.trunk import Shape

KINDS = {"act": Act, "flow": Flow, "diffusion": Diffusion, "cloning": Cloning}


def make_model(config, facts: dict, bounds, rngs):
    """An nnx.Module with `losses` and `actions`. `bounds`: smallest and largest scaled actions of the training data."""
    kind = config.model.kind
    extra = {"bounds": bounds} if kind == "diffusion" else {}
    return KINDS[kind](config.model, shape_of(config, facts), config.train.dtype, rngs, **extra)


def shape_of(config, facts: dict) -> Shape:
    """The sizes of a run's inputs and outputs. Where there is one instruction, the policy does not see it."""
    shapes = facts["shapes"]
    cameras = tuple((name, *shapes[name][:2]) for name in facts["cameras"])
    state = tuple(math.prod(shapes[name]) for name in facts["state"])
    words = len(facts["instructions"][0]) if "instructions" in facts else SIZE
    return Shape(state, cameras, words if len(facts["tasks"]) > 1 else 0, config.data.chunk, shapes["action"][-1])


def flops(config, facts: dict) -> float:
    """Training FLOPs of one chunk: 6 for each parameter of a block and each token it reads (Kaplan et al. 2020).

    Attention among so few tokens, maps in and out, and convolutions are neglected.
    """
    model, shape = config.model, shape_of(config, facts)
    tokens, vit = len(shape.state) + bool(shape.instruction) + (model.kind == "act"), 0
    for _, height, width in shape.cameras:
        if model.vision.kind == "vit":
            patches = (height // model.vision.patch) * (width // model.vision.patch)
            vit += patches * blocks_config(model, model.vision.layers).num_parameters(0)
        elif model.vision.kind == "keypoints":
            patches = 1
        else:
            patches = math.ceil(height / 16) * math.ceil(width / 16)
        tokens += patches
    total = vit + tokens * blocks_config(model, model.layers).num_parameters(0)
    total += shape.chunk * blocks_config(model, model.decoder_layers, reads=True).num_parameters(0)
    if model.kind == "act":
        total += (shape.chunk + 2) * blocks_config(model, model.posterior_layers).num_parameters(0)
    return 6.0 * total
