"""A step that is planned and compiled while the data is still being prepared.

A recipe that can name its arrays before it has them (`Recipe.shapes`) is planned without its data anyway; where that
data takes long to prepare, the step is compiled meanwhile. All that comes of it is an entry in JAX's compile cache:
with the data there everything is traced and planned anew, with the memory that is free then, and the step is found in
the cache by all that it is compiled from, or it is compiled. Two cores are kept busy by tokenizing alone
(docs/log.md, 2026-11-27), so it takes more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from aurora_train import mesh as meshes
from aurora_train.errors import UserError
from aurora_train.facts import Facts
from aurora_train.machine.profile import cpu_cores
from aurora_train.train.planning import planner_here
from aurora_train.train.rehearsal import expected_shapes, make_recipe, rehearse_here

log = logging.getLogger("aurora_train")

_LONG = 0.5  # seconds of preparing after which there is likely more to come
_CORES = 3  # at least


class Ahead:
    """A progress callback that begins to plan and compile when a preparation proves to be long.

    It makes a recipe of its own, that knows its facts by expectation or has `inherited` them: what the other knows
    changes as its data come. `begin` False: a callback and nothing more.
    """

    def __init__(self, config, inherited: Facts, progress: Callable, *, begin: bool):
        self._config, self._inherited, self._progress = config, inherited, progress
        self._since = time.monotonic() if begin and _pays() else float("inf")
        self._made: Future | None = None

    def __call__(self, done: int, total: int | None, what: str) -> None:
        if self._made is None and time.monotonic() - self._since > _LONG:
            thread = ThreadPoolExecutor(1, "ahead")
            self._made = thread.submit(self._compile)
            thread.shutdown(wait=False)  # it ends when that is done
        self._progress(done, total, what)

    @property
    def began(self) -> bool:
        """Whether anything is or was under way."""
        return self._made is not None

    def wait(self) -> None:
        """Until what is under way is in the cache. A UserError there comes again where it can be told."""
        if self._made is not None:
            self._progress(0, None, "compiling")
            error = self._made.exception()
            if error is not None and not isinstance(error, UserError):
                log.warning("compiling beside the data failed, so it is done after it: %s", error)

    def _compile(self) -> None:
        recipe = make_recipe(self._config)
        recipe.inherited = self._inherited
        shapes = expected_shapes(recipe)
        if shapes is None:
            return
        mesh = meshes.make_mesh(self._config.mesh.data, self._config.mesh.fsdp)
        program = rehearse_here(self._config, recipe, mesh, shapes)
        program.begin_initialiser()
        plan = planner_here(self._config, recipe, program=program, compiled_later=True).run()
        program.initialiser(plan)
        program.compile(plan)
        program.await_initialisers()


def _pays() -> bool:
    cached = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
    return bool(cached) and cpu_cores() >= _CORES
