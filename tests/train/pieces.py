"""The trainer's own pieces put together in a test: a recipe, a plan, an optimizer and a mesh make a step."""

from __future__ import annotations

import jax

from aurora_train import mesh as meshes
from aurora_train import optimizer as optimizers
from aurora_train.data.batches import read_batch
from aurora_train.nn.stack import Segment
from aurora_train.plan.plan import Plan
from aurora_train.train.hooks import features_of
from aurora_train.train.precision import settled
from aurora_train.train.rehearsal import make_recipe
from aurora_train.train.state import draw
from aurora_train.train.step import make_step


def assembled(config, cut=None, accumulation=None, mesh=None):
    """(recipe, blueprint, compiled-on-first-call step) for a config, with one stack cut as told."""
    recipe = make_recipe(settled(config))
    recipe.ready(lambda done, total, what: None)
    mesh = mesh or meshes.make_mesh(1, 1)
    accumulation = accumulation or config.memory.accumulation
    plan = Plan(config.train.batch // accumulation, accumulation, {"stack": cut or [Segment(0, config.model.layers)]})
    optimizer = optimizers.build(config.optimizer, config.train.steps)
    features = features_of(config, recipe)
    blueprint = draw(recipe, plan, optimizer, mesh, seed=config.train.seed, features=features)
    step = make_step(recipe, blueprint, optimizer, features, seed=config.train.seed, accumulation=accumulation)
    shardings = blueprint.shardings
    jitted = jax.jit(
        step, donate_argnums=0, in_shardings=(shardings, meshes.batch_sharding(mesh)),
        out_shardings=(shardings, meshes.replicated(mesh)),
    )
    return recipe, blueprint, jitted


def trained(config, steps: int, **how):
    """(losses, state) after some steps from the start."""
    recipe, blueprint, step = assembled(config, **how)
    source, state, losses = recipe.data("train"), blueprint.initialise(), []
    for number in range(steps):
        state, metrics = step(state, read_batch(source, config.train.seed, config.train.batch, number))
        losses.append(float(metrics["loss"]))
    return losses, state
