"""The evaluations of a run while it trains: when one is due, what it found, and which one is the best so far.

All of it is decided by the step and the recorded evaluations, so a killed run and an undisturbed one agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import jax

from aurora_train import mesh as meshes
from aurora_train.checkpoint.retention import is_among_best
from aurora_train.machine import processes
from aurora_train.score import validation_score
from aurora_train.train.evaluate import Evaluator, validation_batches, weights_of


class Judged(NamedTuple):
    """The number by which evaluations are compared: its name, its value, and which direction is better."""

    name: str
    value: float
    lower_is_better: bool

    def is_better(self, other: Judged) -> bool:
        """Whether it is strictly better than another one. A number that is not finite never is."""
        sign = 1 if self.lower_is_better else -1
        return math.isfinite(self.value) and not sign * self.value >= sign * other.value


class Evaluations:
    """`results`: step -> the numbers of each recorded evaluation, which the caller adds to once one is on record."""

    def __init__(self, session, results: dict[int, dict[str, float]]):
        self._session, self._config, self.results = session, session.config, results
        self.evaluator = Evaluator(session.recipe, session.blueprint, session.mesh)
        self._batches: list | None = None
        self._early: Future | None = None

    def due(self, step: int) -> bool:
        """Whether the run is evaluated after this step."""
        every = self._config.evaluate.every
        at = step == self._config.train.steps or (every is not None and step % every == 0) or self._score_due(step)
        return at and self._session.evaluates

    def _score_due(self, step: int) -> bool:
        every = self._config.evaluate.score_every
        return every is not None and (step % every == 0 or step == self._config.train.steps)

    def has_ended(self, step: int) -> bool:
        """Whether the run ends at this step: it is the last one, or `evaluate.patience` has run out."""
        patience = self._config.evaluate.patience
        if step == self._config.train.steps or patience is None:
            return step == self._config.train.steps
        done = [self.judged(self.results[at]) for at in sorted(self.results) if at <= step]
        return _without_a_better([one for one in done if one]) >= patience

    def judged(self, result: dict[str, float]) -> Judged | None:
        """The number that decides whether an evaluation is the best: the recipe's `metric` if present, else the loss.

        None for an evaluation between two scores (`evaluate.score_every`), if only the score has the metric.
        """
        name, better = self._session.recipe.metric or ("loss", "min")
        if name in result:
            return Judged(name, result[name], better == "min")
        return None if self._config.evaluate.score_every else Judged("loss", result["loss"], True)

    def is_among_best(self, one: Judged) -> bool:
        """Whether a new evaluation is among the best that `checkpoint.best` keeps."""
        known = [other.value for other in map(self.judged, self.results.values()) if other and other.name == one.name]
        return is_among_best(one.value, known, self._config.checkpoint.best, lower_is_better=one.lower_is_better)

    def measure(self, state, step: int, heed: Callable[[], None]) -> dict[str, float]:
        """Evaluate a state: the validation loss, and the score if it is due. `heed` raises if a stop was requested."""
        if self._early is not None:
            self._early.result()  # an error of the early compilation is raised here, after the save
        result = self.evaluator.loss(state, self._validation_batches())
        if self._config.evaluate.score_every and self._session.recipe.metric:
            # What the loss reports by the metric's name, of a few examples, is not what a score says of them all.
            result.pop(self._session.recipe.metric[0], None)
        if self._score_due(step):
            recipe, judged = self._session.recipe, self.for_a_score(state)
            result |= processes.agreed(lambda: validation_score(recipe, self._config, *judged, lambda *_: heed()))
        return result

    def for_a_score(self, state) -> tuple[Evaluator, object]:
        """(evaluator, state) for a score: it may run any code, so only the leader computes it, on its own devices.

        All processes call this: what they hold together is brought to each.
        """
        if processes.count() == 1:
            return self.evaluator, state
        session = self._session
        local = Evaluator(session.recipe, session.blueprint, meshes.local_mesh(session.mesh))
        return local, meshes.local_view(state._replace(opt_state={}))

    def _validation_batches(self) -> list:
        if self._batches is None:
            source = self._session.recipe.data("validation")
            plan, devices = self._session.plan, meshes.batch_ways(self._session.mesh)
            batch, examples = self._config.train.batch, self._config.evaluate.examples
            self._batches = list(validation_batches(source, batch, examples, devices, plan.microbatch))
        return self._batches

    # ---- compiling beside the first steps

    def compile_early(self, state, say: Callable[[str], None]) -> None:
        """Read the validation examples and compile their loss beside the first steps, if that does not slow them."""
        if self._early is not None or not (compiles_early(self._config) and self._session.evaluates):
            return
        place = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
        threads = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._early = threads.submit(
            lambda: self.evaluator.compile(weights_of(place), self._validation_batches()[0])
        )
        threads.shutdown(wait=False)

        def report(made: Future) -> None:
            if (error := made.exception()) is not None:
                words = str(error).splitlines() or [type(error).__name__]
                say(f"the next evaluation will fail: {words[0]}")

        self._early.add_done_callback(report)

    def await_compiler(self, say: Callable[[str], None]) -> None:
        """Wait for the early compilation: its thread would delay the process's exit silently, and slow what follows."""
        if self._early is not None and not self._early.done():
            say("waiting for the compilation of the evaluation, which has begun")
            wait([self._early])


def compiles_early(config) -> bool:
    """Whether an evaluation is compiled beside the first steps: true on a GPU, because the processor is idle then."""
    return config.evaluate.every is not None and jax.default_backend() != "cpu"


def _without_a_better(results: list[Judged]) -> int:
    """How many results in a row at the end of the list, which is in the order of steps, brought no new best."""
    since, best = 0, None
    for one in results:
        if best is None or one.name != best.name or one.is_better(best):
            since, best = 0, one
        else:
            since += 1
    return since
