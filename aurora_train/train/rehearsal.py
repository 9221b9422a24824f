"""Builds and compiles a step without running it: for this machine, or for one that is absent.

The planner asks it what a plan costs; the session asks it for the step that it will run. There is only one way from a
config and a plan to a compiled step, so the planned step is the one that runs.
"""

from __future__ import annotations

import contextlib
import math
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aurora_train import files
from aurora_train import mesh as meshes
from aurora_train import optimizer as optimizers
from aurora_train.check.blame import place_of, recipe_code
from aurora_train.errors import UserError
from aurora_train.generate.engine import bucket, planned_bytes
from aurora_train.generate.weights import bytes_beside
from aurora_train.machine.memory import reserve_bytes
from aurora_train.machine.profile import this_machine
from aurora_train.nn import carried, fp8
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.stack import Segment, named_stacks, watched
from aurora_train.nn.tracing import tracing
from aurora_train.plan.account import save_bytes
from aurora_train.plan.flops import product_flops
from aurora_train.plan.plan import Plan, make_plan
from aurora_train.plan.residuals import kept_bytes
from aurora_train.plan.verify import can_compile_for_gpu, pretend_cudnn, quiet, target_devices
from aurora_train.random import example_keys, stream
from aurora_train.recipe import makes_experience
from aurora_train.train.hooks import features_of
from aurora_train.train.state import Blueprint, TrainState, draw, frozen_as_argument
from aurora_train.train.step import make_step

# At LLVM's level 1 the initialiser draws the same values as at the default level (up to jax 0.10 to the bit, from 0.11
# to the last place) and compiles in half the time, of which a step would gain only 6 %.
_DRAWN_ONCE = {"xla_backend_optimization_level": 1}


@dataclass
class Rehearsal:
    """`shapes`: one example's arrays (ShapeDtypeStruct, no batch axis). `remote`: the mesh is of another machine.

    `apart`: whether a device has its own memory. `capability`: that of the GPU as (major, minor), if known.
    `host_bytes`: how much of the processor's memory a device may use for offloading, if known.
    """

    config: Any
    recipe: Any
    mesh: Any
    platform: str
    remote: bool
    shapes: dict[str, jax.ShapeDtypeStruct]
    apart: bool = False
    capability: tuple[int, int] | None = None
    host_bytes: int | None = None
    weighed: list = field(default_factory=list)  # what `boxes.choice` found of the meshes among which it chose

    def __post_init__(self):
        self.optimizer = optimizers.build(
            self.config.optimizer, self.config.train.steps, seed=self.config.train.seed
        )
        self.features = features_of(self.config, self.recipe)
        self.forget()

    def forget(self) -> None:
        """Drop everything that was traced and compiled."""
        self._traced, self._compiled, self._blueprints, self._residuals = {}, {}, {}, {}
        self._initialiser: tuple[str, Future] | None = None  # the cut for which it is, and its compilation
        self._model = self._calls = None

    def here(self):
        """The context in which the step is traced: in the forms and the precision of the config, for its machine."""
        stack, train = contextlib.ExitStack(), self.config.train
        ends = train.bf16_ends if train.precision == "fp8" else None
        stack.enter_context(tracing(forms=train.forms, fp8_ends=ends, rows=meshes.rows(self.mesh)))
        if self.remote:
            stack.enter_context(tracing(target=self.platform))
            stack.enter_context(pretend_cudnn())
        return stack

    def model(self):
        """The model, abstract and not yet cut."""
        if self._model is None:
            with self.here(), recipe_code(self.recipe, "model"):
                self._model = nnx.eval_shape(lambda: carried.build(self.recipe, self.config.train.seed))
        return self._model

    def batch(self, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a batch of so many examples, abstract."""
        arrays = {name: jax.ShapeDtypeStruct((examples, *s.shape), s.dtype) for name, s in self.shapes.items()}
        return arrays | {"example": jax.ShapeDtypeStruct((examples,), np.uint32)}

    def blueprint(self, plan: Plan) -> Blueprint:
        """The abstract state under a plan. Made once per cut of the stacks: the microbatch does not change it."""
        key = repr(plan.stacks)
        if key not in self._blueprints:
            with self.here():
                self._blueprints[key] = draw(
                    self.recipe, plan, self.optimizer, self.mesh,
                    seed=self.config.train.seed, features=self.features, ends=self.config.train.bf16_ends,
                )  # fmt: skip
        return self._blueprints[key]

    def step(self, plan: Plan, blueprint: Blueprint):
        """The step as a function of (state, batch), not yet compiled."""
        return make_step(
            self.recipe, blueprint, self.optimizer, self.features, seed=self.config.train.seed,
            accumulation=plan.accumulation,
        )  # fmt: skip

    def trace(self, plan: Plan) -> tuple[Any, TrainState]:
        """(the traced step, whose `.jaxpr` is of (state, frozen, batch); its abstract state). Made once per plan."""
        key = repr(plan.work)
        if key not in self._traced:
            blueprint = self.blueprint(plan)
            state, places = blueprint.state, blueprint.shardings
            moving, rest = state._replace(frozen={}), places._replace(frozen={})
            with self.here():
                jitted = jax.jit(
                    frozen_as_argument(self.step(plan, blueprint)),
                    donate_argnums=0,
                    in_shardings=(rest, places.frozen, meshes.batch_sharding(self.mesh)),
                    out_shardings=(rest, meshes.replicated(self.mesh)),
                )
                traced = jitted.trace(moving, state.frozen, self.batch(self.config.train.batch))
                fp8.refuse_unused(traced.jaxpr.jaxpr)
            self._traced[key] = traced, state
        return self._traced[key]

    def compile(self, plan: Plan):
        """The compiled step of (state, frozen, batch). Nothing is allocated; compiled once per plan."""
        key = repr(plan.work)
        if key not in self._compiled:
            traced, _ = self.trace(plan)
            with self.here(), _alone() if self.remote else contextlib.nullcontext():
                self._compiled = {key: _in_a_thread(traced.lower().compile).result()}  # one: programs are large
        return self._compiled[key]

    def initialiser(self, plan: Plan) -> Future:
        """The initialiser, () -> TrainState, compiled in its own thread. Only that of the last cut is kept."""
        key = repr(plan.stacks)
        if self._initialiser is None or self._initialiser[0] != key:
            if self._initialiser is not None:
                wait([self._initialiser[1]])  # of a cut that was not chosen
            lowered = self.blueprint(plan).initialise.lower()
            options = _DRAWN_ONCE if self.platform == "cpu" else None
            self._initialiser = key, _in_a_thread(lowered.compile, options)
        return self._initialiser[1]

    def begin_initialiser(self) -> None:
        """Begin to compile the initialiser before there is a plan: only on a CPU, where the cut is known in advance."""
        if self.platform == "cpu":
            with contextlib.suppress(UserError):  # the planner raises a more specific error
                self.initialiser(self.asked_plan())

    def await_initialiser(self) -> None:
        """Wait until the initialiser is compiled, if that has begun, and raise its failure."""
        if self._initialiser is not None:
            self._initialiser[1].result()

    def product_flops(self, plan: Plan) -> int | None:
        """FLOPs of the products of one step under a plan, over all devices; None if unknown."""
        traced, _ = self.trace(plan)
        return product_flops(traced.jaxpr)

    def optimizer_state(self, **changes):
        """The optimizer's abstract state with changed settings (`moments="int8"`)."""
        section = self.config.optimizer.model_copy(update=changes)
        optimizer = optimizers.build(section, self.config.train.steps, seed=self.config.train.seed)
        return jax.eval_shape(optimizer.init, self.blueprint(self.simplest_plan()).state.params)

    def taken_by_a_save(self, *, in_place: bool) -> int:
        """Bytes of the processor's memory, for each device, that a save takes; where memory is shared, the device's."""
        return save_bytes(self.blueprint(self.simplest_plan()).state, in_place=in_place) // self.mesh.devices.size

    def writing(self) -> dict | None:
        """What samples and scores that write texts take on one device beside the state: `texts` at once, the tokens of
        each (`length`), and their `bytes`, weights as they are decoded included. None if there are none."""
        asked = self.recipe.writes()
        if asked is None or not isinstance(self.model(), Decoder):  # another model is written with by its recipe
            return None
        texts, length = asked[0], bucket(asked[1], 64)
        with self.here():
            held = planned_bytes(self.model(), texts, length)
            weights = bytes_beside(self.model()) // self.mesh.shape["fsdp"]
        return {"texts": texts, "length": length, "bytes": weights + held["caches"] + held["rest"]}

    def asked_plan(self) -> Plan:
        """The plan that the config asks for, before any search and before the batch is split to fit."""
        ways = meshes.batch_ways(self.mesh)
        return make_plan(self.config, self.model(), platform=self.platform, num_devices=ways, apart=self.apart)

    def simplest_plan(self) -> Plan:
        """The whole batch at once and every stack whole: for what does not depend on the plan."""
        cuts = {path: [Segment(0, stack.num_units)] for path, stack in self.stacks().items()}
        return Plan(self.config.train.batch, 1, cuts)

    def stack_calls(self) -> dict[str, tuple]:
        """For each stack by path: (stack, x, context, keys), abstract, for one example.

        Taken from a trace of the loss itself, so that the plan follows each recipe's own use of its stacks.
        """
        if self._calls is None:
            self.loss_residuals(1)
        return self._calls

    def loss_residuals(self, examples: int) -> int:
        """Bytes that the loss of so many examples keeps for its backward pass, with every unit recomputed.

        Arguments (parameters, the batch) are not counted.
        """
        if examples not in self._residuals:
            self._residuals[examples] = self._traced_residuals(examples)
        return self._residuals[examples]

    def _traced_residuals(self, examples: int) -> int:
        cuts = {path: [Segment(0, stack.num_units, ())] for path, stack in self.stacks().items()}
        blueprint = self.blueprint(Plan(examples, 1, cuts))

        def residuals(params, state, batch):
            keys = example_keys(stream(0, "dropout"), jnp.int32(0), batch["example"])

            def loss(params):
                model = blueprint.merge(params, state.rest, state.frozen)
                paths = {id(stack): path for path, stack in named_stacks(model).items()}
                with watched() as calls:
                    total = carried.training_loss(self.recipe, model, batch, keys).total
                if self._calls is None:
                    self._calls = {
                        paths[id(stack)]: (self.stacks()[paths[id(stack)]], *jax.tree.map(_abstract, given))
                        for stack, *given in calls
                    }
                return total

            return jax.tree.leaves(jax.vjp(loss, params)[1])

        with self.here():
            made = jax.make_jaxpr(residuals)(blueprint.state.params, blueprint.state, self.batch(examples))
        return kept_bytes(made)

    def uncalled(self, called) -> dict[str, list[Segment]]:
        """The segments of stacks that the loss does not call: each stack whole, as it keeps nothing."""
        return {path: [Segment(0, s.num_units)] for path, s in self.stacks().items() if path not in called}

    def stacks(self) -> dict:
        """The stacks of the model by dotted path, abstract."""
        return named_stacks(self.model())


def _in_a_thread(work, *arguments) -> Future:
    """Begin `work` in a thread of its own.

    The main thread can then be interrupted while it waits; inside XLA it could not, and Ctrl-C would take effect only
    once the whole program is compiled.
    """
    thread = ThreadPoolExecutor(1)
    begun = thread.submit(work, *arguments)
    thread.shutdown(wait=False)  # the thread ends when its work is done
    return begun


@contextlib.contextmanager
def _alone():
    """Compile for an absent device, without its warnings and without the cache, which could not be read back."""
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with quiet():
            yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def _abstract(leaf):
    if not hasattr(leaf, "shape"):
        return leaf  # a plain number, known to the layers while they are traced
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def make_recipe(config):
    """The recipe of a config."""
    return config.recipe_class(config, files.cache_folder())


def expected_shapes(recipe) -> dict[str, jax.ShapeDtypeStruct] | None:
    """One example's arrays before there is data, under the expected facts; None if the recipe needs its data."""
    shapes, expected = recipe.shapes(), recipe.expected_facts()
    if shapes is None or expected is None:
        return None
    recipe.use({**expected, **recipe.inherited})
    return shapes


def rehearse(config, recipe, *, mesh=None, target=None, sizes=None, progress=None) -> Rehearsal:
    """A rehearsal on `mesh`, or for `target` (a `machine.targets.Target`), whose devices need not be present.

    `sizes`: of the axes of a target's mesh; by default those of the config, with one device for `data` -1. If the
    recipe cannot name its arrays without its data, the data is prepared first.
    """
    shapes = recipe.shapes() if recipe.known else expected_shapes(recipe)
    if shapes is None:
        shapes = batch_shapes(recipe, recipe.ready(progress or (lambda *_: None)).data("train"))
    if target is None:
        mesh = mesh if mesh is not None else meshes.asked(config.mesh)
        return rehearse_here(config, recipe, mesh, shapes)
    sizes = sizes or (max(config.mesh.data, 1), config.mesh.fsdp, config.mesh.tensor)
    count = math.prod(sizes)
    # Tracing works with devices of any kind; only compiling needs the target's own.
    devices = target_devices(target, count) if can_compile_for_gpu() else jax.devices()[:count]
    if len(devices) < count:
        raise UserError(
            f"a plan for {count} devices cannot be estimated with {len(devices)} here",
            where="mesh",
            hint="pip install 'aurora_train[plan]' to compile for them, or plan for one device: mesh.data=1 "
            "mesh.fsdp=1 mesh.tensor=1",
        )
    mesh = meshes.mesh_of(np.asarray(devices, dtype=object), *sizes)
    return Rehearsal(
        config, recipe, mesh, "gpu", True, shapes, apart=not target.row.unified, capability=target.compute_capability
    )


def rehearse_here(config, recipe, mesh, shapes) -> Rehearsal:
    """A rehearsal on devices of this machine. `shapes` as in Rehearsal."""
    here = this_machine()
    room = here.memory.usable - reserve_bytes(here.memory)
    return Rehearsal(
        config, recipe, mesh, jax.default_backend(), False, shapes,
        apart=here.device_memory_bytes is not None and not here.unified, capability=_capability_here(),
        host_bytes=room // max(here.device_count, 1),
    )  # fmt: skip


def _capability_here() -> tuple[int, int] | None:
    """The compute capability of jax's GPU; None for any other device."""
    known = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")
    return tuple(map(int, known)) if jax.default_backend() == "gpu" and all(map(str.isdigit, known)) else None


def batch_shapes(recipe, source) -> dict[str, jax.ShapeDtypeStruct]:
    """One example's arrays of a prepared recipe's training batches. UserError if it should announce them and does not.

    Experience is only announced, not checked here, because that would need a model.
    """
    if not makes_experience(recipe):
        return shapes_of(source)
    shapes = recipe.shapes()
    if shapes is None:
        raise UserError(
            f"{type(recipe).__name__} defines `experience` and no `shapes`", where=place_of(type(recipe).experience),
            hint="def shapes(self): return one example's arrays of what `experience` returns, as jax.ShapeDtypeStruct",
        )  # fmt: skip
    return shapes


def shapes_of(source) -> dict[str, jax.ShapeDtypeStruct]:
    """One example's arrays of a prepared source."""
    if len(source) == 0:
        raise UserError("the training split has no example", where="data")
    example = source.take(np.zeros(1, np.int64))
    return {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in example.items()}
