"""The model that a run starts from, for a recipe that measures its data by it: the reference of learned preferences.

`Recipe.start` is set before `prepare` is called. It names weights and reads none until `predictor` is called, so a
recipe that finds its measurements in the cache costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from aurora_train import mesh as meshes
from aurora_train import optimizer as optimizers
from aurora_train.machine.profile import choose_devices
from aurora_train.nn import carried
from aurora_train.nn.stack import Segment, named_stacks
from aurora_train.origin.parents import Parent, parents_of
from aurora_train.origin.weights import drawn_beside, parameters_from, state_from
from aurora_train.plan.plan import Plan
from aurora_train.train.evaluate import Evaluator
from aurora_train.train.state import Blueprint, draw


@dataclass(frozen=True)
class Start:
    """The sources of a run's first parameters. `records`: what provenance records of each, by prefix."""

    config: Any
    records: dict[str, dict]

    @property
    def digest(self) -> str:
        """sha256 hex over what decides the first parameters: the sources' own digests, added tokens and the seed."""
        init, seed = self.config.init, self.config.train.seed
        known = [[prefix, record["digest"]] for prefix, record in sorted(self.records.items())]
        return hashlib.sha256(json.dumps([known, init.tokens, seed]).encode()).hexdigest()

    def predictor(self, recipe) -> Callable[[dict], Any]:
        """`predict(batch) -> numpy pytree` by `recipe.predict`, with the parameters from before the first step.

        On one device of this process, which holds the model for as long as the function is kept. `recipe` knows its
        facts. Raises UserError if a source is gone, or is not what it was when the run began.
        """
        parents = self._parents()
        blueprint, mesh = read_whole(self.config, recipe, jax.local_devices())
        whole = any(not parent.prefix for parent in parents)
        if whole and recipe.is_adapter is None and not jax.tree.leaves(blueprint.state.rest):
            kept, rest = {}, blueprint.state.rest
        else:  # compiled together, so that what a source provides is not drawn
            kept, rest = jax.jit(lambda: _drawn(parents, blueprint.initialise()))()
        params, frozen = parameters_from(parents, blueprint, kept)
        rest = state_from(parents, blueprint, rest)
        state = blueprint.state._replace(params=params, frozen=frozen, rest=rest, opt_state={}, extra={})
        return Evaluator(recipe, blueprint, mesh).predictor(state)

    def _parents(self) -> tuple[Parent, ...]:
        parents = parents_of(self.config, self.records)
        if not parents:  # an imported run is trained further
            parents = tuple(Parent.of(prefix, one["from"], one) for prefix, one in self.records.items())
        for parent in parents:
            parent.refuse_changed(self.records[parent.prefix])
        return parents


def _drawn(parents: tuple[Parent, ...], state) -> tuple[dict, Any]:
    return drawn_beside(parents, {"params": state.params, "frozen": state.frozen}), state.rest


def read_whole(config, recipe, devices=None) -> tuple[Blueprint, Any]:
    """(blueprint, mesh) of a model on one device, the first of `devices` or of all, with every stack whole."""
    mesh = meshes.make_mesh(1, 1) if devices is None else _mesh_of_one(devices)
    optimizer = optimizers.build(config.optimizer, config.train.steps, seed=config.train.seed)
    return draw(recipe, whole_plan(config, recipe), optimizer, mesh, seed=config.train.seed), mesh


def _mesh_of_one(devices) -> Any:
    chosen, _ = choose_devices(devices)
    return meshes.mesh_of(np.asarray(chosen[:1], dtype=object))


def whole_plan(config, recipe) -> Plan:
    """A plan with every stack whole: for reading a run, where nothing is kept for a backward pass."""
    model = nnx.eval_shape(lambda: carried.build(recipe, config.train.seed))
    cuts = {name: [Segment(0, stack.num_units)] for name, stack in named_stacks(model).items()}
    return Plan(config.train.batch, 1, cuts, "reading")
