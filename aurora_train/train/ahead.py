"""Plans and compiles the step while the data is still being prepared.

A recipe that can name its arrays before it has them (`Recipe.shapes`) is planned without its data anyway. If the data
takes long to prepare, the step is compiled meanwhile. The only result is an entry in JAX's compile cache: once the data
is ready, everything is traced and planned again with the memory that is free then, and the step is either loaded from
the cache or compiled. Tokenizing alone keeps two cores busy (docs/log.md, 2026-11-27), so this needs more cores.
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

_LONG = 0.5  # seconds of preparation after which it is likely to take longer
_CORES = 3  # fewest cores with which this saves time


class Ahead:
    """A progress callback that begins to plan and compile when a preparation takes long.

    It makes its own recipe with expected or `inherited` facts, because those of the other recipe change while its data
    are prepared. With `begin` False it is only a callback.
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
        """Whether compiling has begun."""
        return self._made is not None

    def wait(self) -> None:
        """Wait until the compiled step is in the cache. A UserError is ignored here: planning raises it again."""
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
