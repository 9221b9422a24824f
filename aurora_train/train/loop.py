"""The training loop. The order of its actions must never change.

1. The records of steps up to s are on disk before the checkpoint of s counts: a resume meets no gap.
2. The state is copied out before the next step is dispatched, because that step overwrites its buffers.
3. The evaluation comes after the save: an evaluation that crashes costs no training. If it is among the best so far,
   its step is saved before the evaluation is recorded: after a kill between the two, the evaluation is repeated.
4. The step number and the records up to it decide what is due at a step, so a killed run and an undisturbed one agree.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait

import jax

from aurora_train import facts
from aurora_train import mesh as meshes
from aurora_train.checkpoint import layout
from aurora_train.checkpoint.retention import is_among_best
from aurora_train.errors import UserError
from aurora_train.machine import processes
from aurora_train.record.metrics import EventLog, MetricsLog
from aurora_train.record.throughput import Throughput
from aurora_train.train.bad_numbers import Streak
from aurora_train.train.evaluate import (
    Evaluator,
    Judged,
    evaluations_without_a_better,
    judged,
    validation_batches,
    weights_of,
)
from aurora_train.train.feed import open_feed
from aurora_train.train.guard import guard_of
from aurora_train.train.oom import noticed, refused
from aurora_train.train.saving import Saver
from aurora_train.train.score import validation_score
from aurora_train.train.session import Session
from aurora_train.train.signals import Stopped, StopRequest
from aurora_train.train.watchdog import Watchdog

_EVALUATING = (
    "an evaluation takes as many examples at once as the plan's microbatch, and is not replanned: `aurora resume RUN "
    "memory.accumulation=N` with a larger N makes it smaller, and continues from the newest checkpoint"
)


UNSAVED = "a disk that cannot be written"  # why a run ended if it could not be saved
_SAVED_AT_LAST = "a disk that could not be written until the end"  # several processes had agreed to stop


class Loop:
    """Trains a session's state from its step to the last one. `run` returns why it ended; `state` is the state."""

    def __init__(
        self,
        session: Session,
        state,
        compiled,
        *,
        stop: StopRequest,
        metrics: MetricsLog,
        events: EventLog,
        progress,
        throughput: Throughput,
        memory_bytes,
        energy,
        watchdog: Watchdog,
        deadline: float | None = None,
    ):
        self.session, self.state, self._compiled = session, state, compiled
        self._stop, self._metrics, self._events = stop, metrics, events
        self._progress, self._throughput, self._memory_bytes = progress, throughput, memory_bytes
        self._energy, self._watchdog = energy, watchdog
        self._config, self._store = session.config, session.store
        self._step = int(jax.device_get(state.step))
        self._first = self._recorded = self._step
        self._saver = Saver(
            session.store, session.run.folder, facts=facts.sha256(session.recipe.known),
            in_place=session.plan.saves_in_place, metrics=metrics, events=events, progress=progress, watchdog=watchdog,
            patience=60 * session.config.checkpoint.patience_minutes,
            last=self._step,  # 0 for a fresh run: nothing is saved yet
        )  # fmt: skip
        self._guard = guard_of(session, saving=lambda: self._saver.under_way)
        lag = int(jax.device_get(state.data_step)) - self._step
        self._lag, self._streak = lag, Streak(session.config.train.rewind_after, lag)
        self._late: deque = deque()  # metrics of steps that may still be running
        self._evaluator = Evaluator(session.recipe, session.blueprint, session.mesh)
        self._validation = self._early = None
        self._results: dict[int, dict[str, float]] = {}  # recorded evaluations by step
        self._timed = False  # the first step of a process includes work left by the compiler
        self.deadline = deadline  # in time.monotonic(); None is never
        if deadline is None and self._config.train.stop_after_minutes is not None:
            self.deadline = time.monotonic() + 60 * self._config.train.stop_after_minutes

    @property
    def evaluator(self) -> Evaluator:
        """The jitted loss and predict, for the score after the last step."""
        return self._evaluator

    def run(self, evaluated: dict[int, dict[str, float]]) -> str | None:
        """Train to the last step. `evaluated`: step -> the result of each recorded evaluation.

        Returns None at the run's end (the last step, or when `evaluate.patience` runs out), else the name of what
        requested a stop; the state is saved either way, unless the name is UNSAVED. Raises OutOfMemory if a step was
        refused memory (the state is lost then, and only `release` may be called), and BadNumbers if too many steps in a
        row were skipped.
        """
        last, self._results = self._config.train.steps, dict(evaluated)
        if not self.session.evaluates:
            self._progress.event("nothing is held out for validation: its loss is not measured")
        with noticed(self._failing, self.finished_steps), self._stop.held(), self._guard:
            while True:
                interrupted = not self._train(last)
                self._settle()
                state = meshes.local_view(self.state)
                if not self._saver.settle(state, self._step, lambda: self._stop.name or self._guard.why):
                    return UNSAVED
                if interrupted or self.has_ended() or self._asked():
                    break
                # The stop was for an overdue save, which has succeeded since: keep training.
        self._await_compiler()
        if self.has_ended() and self._step < last:
            self._progress.event(
                f"ended at step {self._step} of {last}: {self._config.evaluate.patience} evaluations in a row "
                "without a new best (evaluate.patience); the best one's checkpoint is kept"
            )
        asked = self._asked() if interrupted or not self.has_ended() else None
        return _SAVED_AT_LAST if asked == UNSAVED else asked

    def _train(self, last: int) -> bool:
        """Train to the last step or until a stop is requested; False if a signal interrupted an evaluation.

        The order is a promise: the batch, the step, the records of the previous step, the save, the evaluation.
        """
        try:
            self._evaluate_if_missed()
            if self.has_ended():
                return True
            data_step = self._step + self._lag
            with open_feed(self.session, data_step, last + self._lag) as feed:
                while not self.has_ended() and not self._asked():
                    with self._watchdog.during("a step"):
                        batch = self._timed_batch(feed)
                        self.state, metrics = self._compiled(self.state, batch)
                        self._step += 1
                        self._late.append((self._step, metrics))
                        while len(self._late) > 1:
                            self._record(*self._late.popleft())
                    self._compile_evaluation_early()
                    self._save_if_due(self._step)
                    if self._evaluation_due(self._step):
                        self._settle()
                        self._aside(self._evaluate, self._step)
        except Stopped:
            return False
        except UserError:
            self._saver.finish()  # so that the error names the newest checkpoint correctly
            raise
        return True

    @property
    def step(self) -> int:
        """How many steps the state has taken."""
        return self._step

    def has_ended(self) -> bool:
        """Whether the run is at its end. Decided by the step and the recorded evaluations, so a resume agrees."""
        patience = self._config.evaluate.patience
        if self._step == self._config.train.steps or patience is None:
            return self._step == self._config.train.steps
        done = [self._judged(self._results[step]) for step in sorted(self._results) if step <= self._step]
        return evaluations_without_a_better([one for one in done if one]) >= patience

    def _judged(self, result: dict[str, float]) -> Judged | None:
        return judged(self._config, self.session.recipe, result)

    def _timed_batch(self, feed):
        """The next batch. The wait counts only if every earlier step is done; otherwise a running step hides it."""
        asked_at = time.perf_counter()
        batch = feed(self._step + self._lag, self.state)
        if self._idle():
            self._throughput.waited(time.perf_counter() - asked_at)
        return batch

    def _failing(self) -> str:
        # The error may come when a step is dispatched or when its numbers are read: the steps before it are good.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._settle()
        return f"step {self._recorded + 1}"

    def finished_steps(self) -> int:
        """How many steps this loop has logged."""
        return self._recorded - self._first

    def release(self) -> None:
        """Release every array after an out-of-memory error. A save that is still running is of an earlier step."""
        for leaf in jax.tree.leaves((self.state, [metrics for _, metrics in self._late])):
            if not leaf.is_deleted():
                leaf.delete()
        self._await_compiler()
        self.state = self._compiled = self._evaluator = self._validation = self._early = None
        self._late.clear()
        self._saver.finish()

    def _idle(self) -> bool:
        """Whether every dispatched step is done."""
        return all(array.is_ready() for _, metrics in self._late for array in metrics.values())

    def _save_if_due(self, step: int) -> None:
        due = self._save_due(step) or self._saver.retry_due()
        if due:
            self._settle()
        # Nothing is saved among bad steps, so the newest checkpoint is older than they are.
        if due and (not self._streak.length or step == self._config.train.steps):
            self._aside(lambda at: self._saver.save(meshes.local_view(self.state), at), step)
        else:
            self._saver.finish(wait=False)

    def _aside(self, work, step: int) -> None:
        """Do work that is not training; its time does not count in rates or in the time left."""
        with self._throughput.excluding():
            work(step)
        self._progress.skip()

    # ---- records

    def _record(self, step: int, metrics) -> None:
        fetched = jax.device_get(metrics)
        names = sorted(fetched, key=lambda name: (name != "loss", name))
        values = {name: float(fetched[name]) for name in names}
        if self._timed:
            self._throughput.count(values["tokens"])
        else:
            self._throughput.begin()
            self._timed = True
        record = {"step": step, **values, "tokens": int(values["tokens"]), "skipped": int(values["skipped"])}
        if self._lag:
            record["data_step"] = step - 1 + self._lag
        if step % self._config.log.every == 0 or step == self._config.train.steps:
            record |= {**self._throughput.measure(), "memory_bytes": self._memory_bytes(), "time": time.time()}
            self._energy.read()  # some counters wrap within the hour
        self._metrics.write(record)
        self._recorded = self._watchdog.step = step
        self._progress.step(record)
        if record["skipped"]:
            self._events.event("skip", step, loss=values["loss"], grad_norm=values["grad_norm"])
            finite = math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
            what = "is an outlier" if finite else "is not finite"
            self._progress.event(f"step {step}: loss or gradient {what}; the update was not applied")
        self._streak.count(step, bool(record["skipped"]))

    def _settle(self) -> None:
        """Log every outstanding record."""
        while self._late:
            with self._watchdog.during("a step"):
                self._record(*self._late.popleft())

    # ---- saving and evaluating

    def _save_due(self, step: int) -> bool:
        return step == self._config.train.steps or step % self._config.checkpoint.every == 0

    def _evaluate_if_missed(self) -> None:
        """Make an evaluation that is missing because the run was killed between a save and its evaluation."""
        if self._step > 0 and self._evaluation_due(self._step) and self._step not in self._results:
            self._evaluate(self._step)

    def _evaluation_due(self, step: int) -> bool:
        every = self._config.evaluate.every
        at = step == self._config.train.steps or (every is not None and step % every == 0) or self._score_due(step)
        return at and self.session.evaluates

    def _score_due(self, step: int) -> bool:
        every = self._config.evaluate.score_every
        return every is not None and (step % every == 0 or step == self._config.train.steps)

    def _evaluate(self, step: int) -> None:
        watched = self._watchdog.during("an evaluation")
        # One of several processes must not leave a collective in which the others are waiting.
        allowed = self._stop.allowed() if processes.count() == 1 else contextlib.nullcontext()
        with refused(f"evaluating step {step}", _EVALUATING), allowed, watched:
            if self._early is not None:
                self._early.result()  # an error of the early compilation is raised here, after the save
            result = self._evaluator.loss(self.state, self._validation_batches())
            if self._config.evaluate.score_every and self.session.recipe.metric:
                # What the loss reports by the metric's name, of a few examples, is not what a score says of them all.
                result.pop(self.session.recipe.metric[0], None)
            if self._score_due(step):
                result |= processes.agreed(self._score)
            self._stop.heed()
        # The record comes last: it says that nothing is left to do for this step.
        judged = self._judged(result)
        if judged is not None and self._is_among_best(step, judged):
            self._saver.save(meshes.local_view(self.state), step)
        self._results[step] = result
        if judged is not None:
            self._saver.attach_score(step, judged)
        self._metrics.write({"step": step, "evaluation": result})
        scored = "" if judged is None or judged.name == "loss" else f", {judged.name} {judged.value:.4f}"
        self._progress.event(f"step {step}: validation loss {result['loss']:.4f}{scored}")

    def _score(self) -> dict[str, float]:
        """The validation score. It may run any code, so only the leader computes it, on its own devices."""
        session, evaluator = self.session, self._evaluator
        if processes.count() > 1:
            evaluator = Evaluator(session.recipe, session.blueprint, meshes.local_mesh(session.mesh))
        state = meshes.local_view(self.state)
        return validation_score(session.recipe, self._config, evaluator, state, lambda *_: self._stop.heed())

    def _is_among_best(self, step: int, judged: Judged) -> bool:
        """Whether a step must be saved for its evaluation and is not saved yet. Never among bad steps."""
        if step == self._saver.last or self._streak.length:
            return False
        known = [one for one in map(self._judged, self._results.values()) if one and one.name == judged.name]
        best, lower = self._config.checkpoint.best, judged.lower_is_better
        return is_among_best(judged.value, [one.value for one in known], best, lower_is_better=lower)

    def _compile_evaluation_early(self) -> None:
        """Read the validation examples and compile their loss beside the first steps, if that does not slow them."""
        if self._early is not None or not (compiles_early(self._config) and self.session.evaluates):
            return
        place = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self.state)
        evaluator, threads = self._evaluator, ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        made = threads.submit(lambda: evaluator.compile(weights_of(place), self._validation_batches()[0]))
        threads.shutdown(wait=False)
        made.add_done_callback(self._report_failure)
        self._early = made

    def _report_failure(self, made: Future) -> None:
        if (error := made.exception()) is not None:
            words = str(error).splitlines() or [type(error).__name__]
            self._progress.event(f"the next evaluation will fail: {words[0]}")

    def _await_compiler(self) -> None:
        """Wait for the early compilation: its thread would delay the process's exit silently, and slow what follows."""
        if self._early is not None and not self._early.done():
            self._progress.event("waiting for the compilation of the evaluation, which has begun")
            wait([self._early])

    def _validation_batches(self):
        if self._validation is None:
            source = self.session.recipe.data("validation")
            plan, devices = self.session.plan, self.session.mesh.devices.size
            batch, examples = self._config.train.batch, self._config.evaluate.examples
            self._validation = list(validation_batches(source, batch, examples, devices, plan.microbatch))
        return self._validation

    def _asked(self) -> str | None:
        mine = self._stop.name
        if mine is None and self.deadline is not None and time.monotonic() > self.deadline:
            mine = "train.stop_after_minutes"
        if mine is None and self._saver.overdue():
            mine = UNSAVED
        mine = mine or self._guard.asked(self._step, self._settle)
        return processes.stop_asked(self._step, mine)


def compiles_early(config) -> bool:
    """Whether an evaluation is compiled beside the first steps: true on a GPU, because the processor is idle then."""
    return config.evaluate.every is not None and jax.default_backend() != "cpu"


def state_hash(state) -> str:
    """sha256 hex over every leaf of a state by canonical name: equal hashes mean equal bits."""
    import hashlib

    hasher = hashlib.sha256()
    for name, leaf in sorted(layout.unread(state).items()):
        hasher.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        hasher.update(leaf.read().tobytes())
    return hasher.hexdigest()
