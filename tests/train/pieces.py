"""The very step of a run, for a test: built and compiled by the `Rehearsal` from which a run takes it."""

from __future__ import annotations

from aurora_train import mesh as meshes
from aurora_train.data.batches import read_batch
from aurora_train.machine.precision import settled
from aurora_train.nn.stack import Segment
from aurora_train.plan.plan import Plan
from aurora_train.train.rehearsal import Rehearsal, make_recipe, rehearse
from aurora_train.train.state import together


def rehearsed(config, cut=None, accumulation=None, mesh=None) -> tuple[Rehearsal, Plan]:
    """The rehearsal of a config whose data are prepared, and a plan with one stack cut as told."""
    config = settled(config)
    recipe = make_recipe(config).ready(lambda done, total, what: None)
    accumulation = accumulation or config.memory.accumulation
    plan = Plan(config.train.batch // accumulation, accumulation, {"stack": cut or [Segment(0, config.model.layers)]})
    return rehearse(config, recipe, mesh=mesh or meshes.make_mesh(1, 1)), plan


def assembled(config, **how):
    """(recipe, initialiser, compiled step) for a config; `how` as in `rehearsed`."""
    program, plan = rehearsed(config, **how)
    return program.recipe, program.initialiser(plan).result(), together(program.compile(plan))


def trained(config, steps: int, **how):
    """(losses, state) after some steps from the start."""
    recipe, initialise, step = assembled(config, **how)
    source, state, losses = recipe.data("train"), initialise(), []
    for number in range(steps):
        state, metrics = step(state, read_batch(source, config.train.seed, config.train.batch, number))
        losses.append(float(metrics["loss"]))
    return losses, state
