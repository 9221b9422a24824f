"""Everything that stands before the first step, in the order in which it has to be: data, devices, plan, state.

The order is a promise: what a user can have wrong is found before anything expensive is done, and nothing in the run
folder changes before it is known that this run may go on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from aurora_train import files
from aurora_train import mesh as meshes
from aurora_train import optimizer as optimizers
from aurora_train import run as runs
from aurora_train.checkpoint import layout
from aurora_train.checkpoint.store import CheckpointStore, refuse_damage, require_step
from aurora_train.errors import UserError
from aurora_train.memory.plan import Plan, make_plan
from aurora_train.random import stream
from aurora_train.train.state import Blueprint, TrainState, draw
from aurora_train.train.step import make_step


@dataclass
class Session:
    """One process's hold of a run: what the loop needs, made by `open_session`."""

    config: Any
    recipe: Any
    run: runs.Run
    mesh: Any
    plan: Plan
    blueprint: Blueprint
    optimizer: Any
    source: Any
    store: CheckpointStore

    def compile(self):
        """The compiled step and the seconds it took. Nothing is allocated yet."""
        began = time.perf_counter()
        step = make_step(
            self.recipe,
            self.blueprint,
            self.optimizer,
            seed=self.config.train.seed,
            accumulation=self.plan.accumulation,
            ema=self.config.optimizer.ema,
        )
        shardings = self.blueprint.shardings
        jitted = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, meshes.batch_sharding(self.mesh)),
            out_shardings=(shardings, meshes.replicated(self.mesh)),
        )
        example = self.source.take(np.zeros(1, np.int64))
        example["example"] = np.zeros(1, np.uint32)
        batch = {
            name: jax.ShapeDtypeStruct((self.config.train.batch, *array.shape[1:]), array.dtype)
            for name, array in example.items()
        }
        compiled = jitted.lower(self.blueprint.state, batch).compile()
        return compiled, time.perf_counter() - began

    def restore(self, step: int) -> TrainState:
        """The state saved at `step`, as donatable arrays where a fresh start would put them."""
        return self.store.restore(step, self.blueprint.state, self.blueprint.shardings)

    def fresh(self) -> TrainState:
        """The initial state: random, or the parameters named by `init.from`."""
        state = self.blueprint.initialise()
        if self.config.init.from_ is None:
            return state
        params = parameters_from(self.config.init.from_, self.blueprint)
        extra = {"ema": jax.tree.map(jax.numpy.copy, params)} if state.extra else {}
        return state._replace(params=params, extra=extra)


def open_session(config, run: runs.Run, progress) -> Session:
    """Prepare the data, look at the devices, plan, and draw the state. UserError for all that does not fit."""
    if run.step() == 0:
        refuse_missing_start(config)
    recipe = make_recipe(config)
    recipe.prepare(progress)
    source = recipe.data("train")
    if len(source) == 0:
        raise UserError("the training split has no example", where="data")
    recipe.data("validation")  # an empty one is found now, not at the last step
    refuse_other_data(run, source)
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
    plan = planned(config, recipe, mesh)
    optimizer = optimizers.build(config.optimizer, config.train.steps)
    blueprint = draw(recipe, plan, optimizer, mesh, seed=config.train.seed, ema=config.optimizer.ema is not None)
    policy = config.checkpoint
    store = CheckpointStore(
        run.checkpoints, run.trash, keep=policy.keep, keep_every=policy.keep_every, best=policy.best
    )
    return Session(config, recipe, run, mesh, plan, blueprint, optimizer, source, store)


def open_for_reading(config, run: runs.Run, step: int | None, progress):
    """(recipe, blueprint, mesh, state, step) of a trained run; the state holds parameters only, on one device."""
    recipe = make_recipe(config)
    recipe.prepare(progress)
    refuse_other_data(run, recipe.data("train"))
    mesh = meshes.make_mesh(1, 1)
    plan = planned(config, recipe, mesh)
    optimizer = optimizers.build(config.optimizer, config.train.steps)
    blueprint = draw(recipe, plan, optimizer, mesh, seed=config.train.seed, ema=False)
    store = CheckpointStore(run.checkpoints, run.trash)
    step = require_step(store, step, str(run.folder))
    refuse_damage(store, step)
    shardings = blueprint.shardings.params
    wanted = layout.abstract({"params": blueprint.state.params}, {"params": shardings})
    flat = load_parameters(store, step, wanted, where=str(run.folder))
    params = layout.assemble(flat, {"params": blueprint.state.params}, {"params": shardings})["params"]
    rest = blueprint.state.rest
    if jax.tree.leaves(rest):
        tree, places = {"rest": blueprint.state.rest}, {"rest": blueprint.shardings.rest}
        rest = layout.assemble(store.restore_some(step, layout.abstract(tree, places)), tree, places)["rest"]
    store.close()
    return recipe, blueprint, mesh, blueprint.state._replace(params=params, rest=rest, opt_state={}, extra={}), step


def make_recipe(config):
    """The recipe of a config."""
    return config.recipe_class(config, files.cache_folder())


def _pinned(session: Session) -> dict:
    kind = device_kind(session.mesh)
    return {"plan": session.plan.to_json(), "mesh": dict(session.mesh.shape), "device": kind}


def pin(session: Session) -> None:
    """Write down the plan, the mesh and the device that the run goes on with."""
    files.write_json(session.run.plan, _pinned(session))


def moved(session: Session) -> list[tuple[str, object, object]]:
    """(what, before, after) of plan, mesh, device, code and versions that a resume does not find as they were."""
    now, before = _pinned(session), files.read_json(session.run.plan)
    changes = [(key, before[key], now[key]) for key in now if before[key] != now[key]] if before else []
    known = files.read_json(session.run.provenance, {})
    here = {"code_sha256": runs.code_hash(), "versions": runs.versions()}
    return changes + [(key, known[key], here[key]) for key in here if key in known and known[key] != here[key]]


def planned(config, recipe, mesh) -> Plan:
    """What the config asks for, on this machine."""
    model = nnx.eval_shape(lambda: recipe.model(nnx.Rngs(params=stream(config.train.seed, "init"))))
    plan = make_plan(config, model, platform=jax.default_backend(), num_devices=mesh.devices.size)
    if plan.accumulation > 1 and recipe.couples != "example":
        raise UserError(
            f"the loss of {config.recipe} couples a whole batch, so it cannot be split into microbatches",
            where="memory.accumulation",
            hint="memory.accumulation=1 and a smaller train.batch",
        )
    return plan


def device_kind(mesh) -> str:
    """What JAX calls the devices of a mesh."""
    return mesh.devices.flat[0].device_kind


def refuse_missing_start(config) -> None:
    """What `init.from` names must be there before anything expensive is done."""
    start = config.init.from_
    if start is not None and not Path(start).is_file():
        other = runs.Run.existing(start)
        require_step(CheckpointStore(other.checkpoints, other.trash), None, start)


def refuse_other_data(run: runs.Run, source) -> None:
    """A resumed run must read the bytes it started on."""
    known = files.read_json(run.provenance)
    if known is None:
        return
    started_on = known["data"]["fingerprint"]
    if started_on != source.fingerprint:
        raise UserError(
            "the training data is not what this run started on",
            where=str(run.folder),
            why=f"its fingerprint was {started_on[:16]}, it is now {source.fingerprint[:16]}",
            hint="bring the old data back, or start a run of its own: `aurora train CONFIG --fresh`",
        )


def parameters_from(path: str, blueprint: Blueprint):
    """Parameters from another run's newest checkpoint (its moving average where kept) or a safetensors file."""
    shardings = blueprint.shardings.params
    wanted = layout.abstract({"params": blueprint.state.params}, {"params": shardings})
    if Path(path).is_file():
        flat = read_safetensors(Path(path), wanted)
    else:
        other = runs.Run.existing(path)
        store = CheckpointStore(other.checkpoints, other.trash)
        refuse_damage(store, require_step(store, None, path))
        flat = load_parameters(store, None, wanted, where=path)
    return layout.assemble(flat, {"params": blueprint.state.params}, {"params": shardings})["params"]


def load_parameters(store: CheckpointStore, step: int | None, wanted: dict, *, where: str) -> dict:
    """The named parameters from a store, under their `params.` names, from the moving average where there is one."""
    step = require_step(store, step, where)
    averaged = {name.replace("params.", "extra.ema.", 1): spec for name, spec in wanted.items()}
    if any(name.startswith("extra.ema.") for name in store.shapes(step)):
        flat = store.restore_some(step, averaged)
        return {name.replace("extra.ema.", "params.", 1): array for name, array in flat.items()}
    return store.restore_some(step, wanted)


def read_safetensors(path, wanted: dict) -> dict:
    """Arrays by canonical name from a safetensors file. UserError where names or shapes differ."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            arrays = {f"params.{name}": handle.get_tensor(name) for name in handle.keys()}
    except SafetensorError as error:
        raise UserError(f"not a readable safetensors file: {error}", where=str(path)) from error
    layout.refuse_difference(arrays, wanted, where=str(path))
    return {name: jax.device_put(array, wanted[name].sharding) for name, array in arrays.items()}
