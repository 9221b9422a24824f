"""A step that is planned and compiled while the data is still being prepared.

A recipe that can name its arrays before it has them (`Recipe.shapes`) is planned without its data anyway; where that
data takes long to prepare, the step is compiled meanwhile. Nothing of it is taken on trust: with the data there, the
step is traced anew, and what was compiled is found in JAX's compile cache, by all that it was compiled from. Two cores
are kept busy by tokenizing alone (docs/log.md, 2026-11-27), so it takes more.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from aurora_train import mesh as meshes
from aurora_train.memory.plan import Plan
from aurora_train.train.planning import planner_here
from aurora_train.train.rehearsal import Rehearsal, rehearse_here

_LONG = 0.5  # seconds of preparing after which a second trace (0.4 s at 10M) is sure to be won back
_CORES = 3  # at least


def _pays() -> bool:
    return (os.cpu_count() or 1) >= _CORES and jax.config.jax_enable_compilation_cache


class Ahead:
    """A progress callback that begins to plan and compile when a preparation proves to be long.

    `recipe` is one of its own: what the other says of its model may change as its data comes. `begin` False: a
    callback and nothing more.
    """

    def __init__(self, config, recipe, progress, *, begin: bool):
        self._config, self._recipe, self._progress = config, recipe, progress
        self._since = time.monotonic() if begin and _pays() else float("inf")
        self._made: Future | None = None

    def __call__(self, done: int, total: int | None, what: str) -> None:
        if self._made is None and time.monotonic() - self._since > _LONG:
            thread = ThreadPoolExecutor(1, "ahead")
            self._made = thread.submit(self._compiled)
            thread.shutdown(wait=False)  # it ends when that is done
        self._progress(done, total, what)

    def plan(self, program: Rehearsal) -> Plan | None:
        """The plan that was made, where it is one for `program`, which has its data; else None, and all is still to do.

        It waits for what is under way. What went wrong there goes wrong again where it can be told.
        """
        if self._made is None:
            return None
        self._progress(0, None, "compiling")
        if self._made.exception() is not None or self._made.result() is None:
            return None
        plan, other = self._made.result()
        same = program.shapes == other.shapes and program.blueprint(plan).state == other.blueprint(plan).state
        return plan if same else None

    def _compiled(self) -> tuple[Plan, Rehearsal] | None:
        shapes = self._recipe.shapes()
        if shapes is None:
            return None
        mesh = meshes.make_mesh(self._config.mesh.data, self._config.mesh.fsdp)
        program = rehearse_here(self._config, self._recipe, mesh, shapes)
        program.begin_initialiser()
        plan = planner_here(self._config, self._recipe, program=program, compiled_later=True).run()
        drawn = program.initialiser(plan)
        program.compile(plan)
        drawn.result()
        return plan, program
