"""Everything that comes before the first step, in the required order: data, devices, plan, state.

The order is a promise: a user's mistakes are reported before anything expensive is done, and nothing in the run folder
changes before it is certain that this run may continue.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import jax

from aurora_train import facts as kept_facts
from aurora_train import files
from aurora_train import mesh as meshes
from aurora_train import run as runs
from aurora_train.always_on.watchdog import Watchdog
from aurora_train.boxes.gather import GatheredRun, GatheringRun
from aurora_train.check.recipe_calls import rehearse_recipe
from aurora_train.check.source import refuse_other_data, source_of
from aurora_train.checkpoint.following import FollowedStore
from aurora_train.checkpoint.reading import opened
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.energy.account import Energy
from aurora_train.errors import UserError
from aurora_train.machine.precision import settled
from aurora_train.machine.processes import agreed, count
from aurora_train.origin.parents import Parent, inherited_facts, parents_of, recorded_parents
from aurora_train.origin.weights import (
    drawn_beside,
    load_parameters,
    load_state,
    parameters_from,
    refuse_other_shapes,
    refuse_unknown_prefix,
    state_from,
)
from aurora_train.plan.account import sharded_bytes
from aurora_train.plan.plan import Plan
from aurora_train.plan.verify import compiled_bytes
from aurora_train.recipe import makes_experience
from aurora_train.train.beginning import Beginning
from aurora_train.train.planning import asked, device_kind, in_mesh, most_here, pinned_plan, plan_here, whole_shape
from aurora_train.train.rehearsal import Rehearsal, batch_shapes, expected_shapes, make_recipe, rehearse_here
from aurora_train.train.signals import StopRequest
from aurora_train.train.starting import Start, read_whole
from aurora_train.train.state import Blueprint, TrainState, together
from aurora_train.units import size

log = logging.getLogger("aurora_train")


@dataclass
class Process:
    """What a process holds independently of the plan. `deadline`: in time.monotonic(); None is never."""

    run: runs.Run
    stop: StopRequest
    energy: Energy
    console: Any
    quiet: bool
    watchdog: Watchdog
    deadline: float | None = None

    def set_deadline(self, config) -> None:
        """Set the deadline of `train.stop_after_minutes`, which counts from the first step of this process."""
        if self.deadline is None and config.train.stop_after_minutes is not None:
            self.deadline = time.monotonic() + 60 * config.train.stop_after_minutes

    def deadline_passed(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclass
class Session:
    """A run opened by one process: what the loop needs, made by `open_session`."""

    run: runs.Run
    program: Rehearsal
    plan: Plan
    source: Any
    store: CheckpointStore
    parents: tuple[Parent, ...] = ()  # the sources of a run that has no step yet
    given_up: Plan | None = None  # the pinned plan that this one replaces, if any
    reason: str = ""  # why it does: "out of memory" or "--replan"
    fault: Any = None  # the `oom.Fault`, if that is why
    evaluates: bool = True  # False if nothing is held out for validation

    @property
    def config(self):
        """The config of this run, in which nothing is `auto` that a run settles."""
        return self.program.config

    @property
    def recipe(self):
        """The recipe, with its data prepared and its facts known."""
        return self.program.recipe

    @property
    def mesh(self):
        """The devices of this run."""
        return self.program.mesh

    @property
    def blueprint(self) -> Blueprint:
        """The abstract state under the plan."""
        return self.program.blueprint(self.plan)

    def compile(self, *, fresh: bool = False):
        """(the compiled step, seconds spent waiting for it and, if `fresh`, for the initialiser).

        Nothing is allocated yet.
        """
        began = time.perf_counter()
        if fresh:
            self.program.initialiser(self.plan)
        try:
            compiled = self.program.compile(self.plan)
        finally:  # after an out-of-memory error, a new plan must not be compiled beside this
            self.program.await_initialiser()
        known, needed = self.plan.compiled_bytes, compiled_bytes(compiled).peak
        # A pinned plan may have been compiled for another precision or other forms.
        self.plan = replace(self.plan, compiled_bytes=needed)
        if known is None and self.plan.beside_copy_bytes is not None:  # how saves are made followed from an estimate
            self.plan = replace(self.plan, saves_in_place=needed > self.plan.beside_copy_bytes)
        return together(compiled), time.perf_counter() - began

    def under(self, plan: Plan, *, reason: str, fault=None) -> Session:
        """The same run under another plan. This session must not be used any more; its store is closed."""
        store = make_store(self.config, self.run, self.program.blueprint(plan))
        return replace(self, plan=plan, store=store, given_up=self.plan, reason=reason, fault=fault)

    def restore(self, step: int) -> TrainState:
        """The state saved at `step`, as donatable arrays, placed like those of a fresh start."""
        shardings = self.blueprint.shardings
        refuse_facts_of_another(self.store, step, self.recipe.known)
        return self.store.restore(step, self.blueprint.state, shardings)

    def fresh(self) -> TrainState:
        """The initial state: random, except for the parameters for which `init` names a source."""
        state = self.program.initialiser(self.plan).result()()
        if not self.parents:
            return state
        blueprint = self.blueprint
        drawn = drawn_beside(self.parents, {"params": state.params, "frozen": state.frozen})
        state = state._replace(params={}, frozen={})  # released first, because the model may not fit twice
        params, frozen = parameters_from(self.parents, blueprint, drawn)
        rest = state_from(self.parents, blueprint, state.rest)
        # Compiled, what a hook keeps of the parameters has buffers of its own: the step donates both.
        extra = jax.jit(self.program.features.begin, out_shardings=blueprint.shardings.extra)(params)
        return state._replace(params=params, frozen=frozen, rest=rest, extra=extra)


def open_session(config, run: runs.Run, progress, *, replan: bool = False) -> Session:
    """Prepare the data, inspect the devices, plan, and open the checkpoints. UserError for all that does not fit.

    `replan` drops the plan that the run is pinned to.
    """
    config = settled(config, run)
    beginning = Beginning.of(config, run)
    recipe, fresh = beginning.recipe, run.step() == 0 and not run.plan.exists()
    program, source, evaluates = _prepared(config, beginning, progress, None if replan else run)
    pinned = pinned_plan(run, config, program.mesh)
    if not config.recipe_bundled and (run.step() == 0 or runs.changed_code(run, config)):
        for line in rehearse_recipe(config, recipe, program, source):
            log.warning("%s", line)
    if fresh:
        program.begin_initialiser()

    def chosen() -> Plan:
        if pinned is not None and not replan:
            return pinned
        return plan_here(config, recipe, program, progress)

    plan = agreed(chosen, Plan.to_json, Plan.from_json)
    dropped = {"given_up": pinned, "reason": "--replan"} if replan and pinned else {}
    if makes_experience(recipe):
        _refuse_cut_experience(program.blueprint(plan))
    store = make_store(config, run, program.blueprint(plan))
    return Session(run, program, plan, source, store, parents=beginning.parents, evaluates=evaluates, **dropped)


def _refuse_cut_experience(blueprint: Blueprint) -> None:
    """UserError if processes hold the model together: each makes its own experience, with the whole of it."""
    places, leaves = jax.tree.leaves(blueprint.shardings.params), jax.tree.leaves(blueprint.state.params)
    if not all(meshes.is_here(place, leaf.shape) for place, leaf in zip(places, leaves, strict=True)):
        raise UserError(
            "fsdp or tensor crosses processes, and this recipe makes its own experience", where="mesh",
            why="every process makes its part of it with the whole model",
            hint="for mesh.fsdp x mesh.tensor a number that divides the devices of one process",
        )  # fmt: skip


def rehearse_config(config, progress, *, prepare: bool) -> list[str]:
    """Call everything in the recipe of a config, on this machine, if its data are prepared or may be prepared.

    Returns what was not rehearsed, and why. UserError for anything that would refuse a run or make it fail.
    """
    config = settled(config)
    beginning = Beginning.of(config)
    if not (prepare or beginning.is_prepared()):
        expected, recipe = beginning.recipe.expected_facts(), beginning.recipe
        if expected is not None and expected.keys() <= recipe.inherited.keys():  # nothing is only expected
            shapes = expected_shapes(recipe)
            if shapes is not None:
                program = _program(config, recipe, shapes)
                refuse_unknown_prefix(config, program.model())
                _refuse_start(config, beginning, program)
        return ["not rehearsed: the data are not prepared yet; --prepare does that, and so does `aurora train`"]
    program, source, _ = _prepared(config, beginning, progress)
    _refuse_start(config, beginning, program)
    return rehearse_recipe(config, beginning.recipe, program, source)


def _prepared(config, beginning: Beginning, progress, run=None) -> tuple[Rehearsal, Any, bool]:
    """(program, training data, whether there are validation data), once the data are prepared."""
    source, recipe = beginning.ready(progress), beginning.recipe
    evaluates = source_of(recipe, "validation") is not None  # an empty one is refused now, not at the last step
    program = _program(config, recipe, batch_shapes(recipe, source), run)
    refuse_unknown_prefix(config, program.model())
    return program, source, evaluates


def _program(config, recipe, shapes, run=None) -> Rehearsal:
    return in_mesh(config, lambda shape: rehearse_here(config, recipe, meshes.make_mesh(*shape), shapes), run)


def _refuse_start(config, beginning: Beginning, program) -> None:
    """UserError if a source of `init` has other parameters than the model, or if the state alone does not fit: no plan
    can help."""
    blueprint = program.blueprint(program.simplest_plan())
    refuse_other_shapes(beginning.parents, blueprint)
    state = blueprint.state
    held = sharded_bytes(state, blueprint.shardings)
    limit, reason = most_here(config, program)
    if held > limit:
        raise UserError(
            f"the parameters and the optimizer take {size(held)} of the {size(limit)} that a device may use",
            where="memory.budget", why=reason, hint="`aurora plan CONFIG` shows what would reduce it",
        )  # fmt: skip


def make_store(config, run: runs.Run, blueprint: Blueprint) -> CheckpointStore:
    """The checkpoints of a run, with the config's retention rules, written by all processes that hold a part of it."""
    kept = {name: getattr(config.checkpoint, name) for name in ("keep", "keep_every", "best")}
    owners = meshes.owners(blueprint.state, blueprint.shardings) if count() > 1 else (0,)
    if isinstance(run, GatheringRun | GatheredRun):
        return run.store(owners, **kept)
    kind = FollowedStore if run.follows else CheckpointStore
    return kind(run.checkpoints, run.trash, owners=owners, **kept)


def open_for_reading(config, run: runs.Run, step: int | None, progress):
    """(recipe, blueprint, mesh, state, step) of a trained run; the state holds parameters only, on one device."""
    recipe = recipe_of(config, run, progress)
    blueprint, mesh = read_whole(config, recipe)
    store = CheckpointStore(run.checkpoints, run.trash)

    def read(step: int):
        refuse_facts_of_another(store, step, recipe.known)
        return *load_parameters(store, step, blueprint, where=str(run.folder)), load_state(store, step, blueprint)

    step, (params, frozen, rest) = opened(store, step, str(run.folder), read)
    store.close()
    state = blueprint.state._replace(params=params, frozen=frozen, rest=rest, opt_state={}, extra={})
    return recipe, blueprint, mesh, state, step


def recipe_of(config, run: runs.Run, progress):
    """The recipe of a trained run, with the run's facts."""
    recipe, kept = make_recipe(config), kept_facts.read(run.facts)
    if records := recorded_parents(files.read_json(run.provenance, {})):
        recipe.start = Start(config, records)
    if kept is None:  # a run from before facts existed is read with its data
        refuse_other_data(run, recipe.ready(progress).data("train"))
    else:
        recipe.inherited = kept
        recipe.use(kept)
    return recipe


def open_start_for_reading(config):
    """(recipe, blueprint, mesh, state) of the model from which a config starts: as `open_for_reading`, without a run.

    Raises UserError if its source is invalid.
    """
    parents = parents_of(config, {})
    recipe = make_recipe(config)
    recipe.inherited = inherited_facts(config, parents)
    recipe.use(recipe.inherited)
    blueprint, mesh = read_whole(config, recipe)
    params, frozen = parameters_from(parents, blueprint, {})
    return recipe, blueprint, mesh, blueprint.state._replace(params=params, frozen=frozen, opt_state={}, extra={})


def _pinned(session: Session) -> dict:
    return {
        "plan": session.plan.to_json(),
        "mesh": dict(session.mesh.shape),
        "device": device_kind(session.mesh),
        "processes": count(),
        "asked": asked(session.config),
    }


def pin(session: Session) -> None:
    """Record the plan, the mesh and the device with which the run continues."""
    files.write_json(session.run.plan, _pinned(session))


def pin_plan(session: Session) -> None:
    """Record the plan alone: `moved` must still compare the mesh and the device with the recorded ones."""
    known = files.read_json(session.run.plan) or _pinned(session)
    files.write_json(session.run.plan, {**known, "plan": session.plan.to_json()})


def moved(session: Session) -> list[tuple[str, object, object]]:
    """(what, before, after) for each of plan, mesh, device, processes, code and versions that has changed."""
    now, before = _pinned(session), files.read_json(session.run.plan)
    changes = []
    if before:
        now["plan"], before["plan"] = session.plan.work, Plan.from_json(before["plan"]).work
        before.setdefault("processes", 1)  # as in runs from when there was only one
        before["mesh"] = whole_shape(before["mesh"])
        moving = ("plan", "mesh", "device", "processes")
        changes = [(key, before[key], now[key]) for key in moving if before[key] != now[key]]
    known = files.read_json(session.run.provenance, {})
    here = {"code_sha256": runs.code_hash(), "versions": runs.versions()}
    changed = runs.changed_code(session.run, session.config)
    if changed and session.config.recipe_bundled:
        changes.append(("recipe", *changed))
    return changes + [(key, known[key], here[key]) for key in here if key in known and known[key] != here[key]]


def refuse_facts_of_another(store: CheckpointStore, step: int, facts: kept_facts.Facts) -> None:
    """UserError if a checkpoint was saved with facts other than those with which it is read."""
    recorded = store.record(step).get("facts")
    if recorded is not None and recorded != kept_facts.sha256(facts):
        raise UserError(
            f"the checkpoint of step {step} was saved with facts other than those in the run folder",
            where=str(store.folder / str(step)), hint="restore the `facts` folder that belongs to it from a copy",
        )  # fmt: skip
