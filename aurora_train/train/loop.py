"""The training loop. The order of its actions must never change.

1. The records of steps up to s are on disk before the checkpoint of s counts: a resume meets no gap.
2. The state is copied out before the next step is dispatched, because that step overwrites its buffers.
3. The evaluation comes after the save: an evaluation that crashes costs no training. If it is among the best so far,
   its step is saved before the evaluation is recorded: after a kill between the two, the evaluation is repeated.
4. Between two steps only a batch goes to the device, and only the numbers of a finished step come back: whatever else
   is read of a running step makes the device wait (`tests/train/test_transfers.py` counts it).
5. The step number and the records up to it decide what is due at a step, so a killed run and an undisturbed one agree.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable

import jax

from aurora_train.always_on.guard import guard_of
from aurora_train.always_on.pace import Pace
from aurora_train.always_on.watchdog import STEP
from aurora_train.checkpoint import layout
from aurora_train.errors import Stopped, UserError
from aurora_train.machine import processes
from aurora_train.record.metrics import MetricsLog
from aurora_train.record.progress import Progress
from aurora_train.record.throughput import Throughput
from aurora_train.record.voice import Voice
from aurora_train.train.bad_numbers import Streak
from aurora_train.train.evaluations import Evaluations
from aurora_train.train.feed import open_feed
from aurora_train.train.oom import noticed, refused
from aurora_train.train.saving import Saver
from aurora_train.train.session import Process, Session
from aurora_train.units import decimal

_EVALUATING = (
    "an evaluation takes as many examples at once as the plan's microbatch, and is not replanned: `aurora resume RUN "
    "memory.accumulation=N` with a larger N makes it smaller, and continues from the newest checkpoint"
)


UNSAVED = "a disk that cannot be written"  # why a run ended if it could not be saved
_LOOK_SECONDS = 1.0  # while training is paused, between two looks at the clock and at what stops the run
_SAVED_AT_LAST = "a disk that could not be written until the end"  # several processes had agreed to stop


class Loop:
    """Trains a session's state from its step to the last one. `run` returns why it ended; `state` is the state."""

    def __init__(
        self,
        session: Session,
        process: Process,
        state,
        compiled,
        evaluations: Evaluations,
        *,
        metrics: MetricsLog,
        voice: Voice,
        progress: Progress,
        throughput: Throughput,
        memory_bytes: Callable[[], int],
    ):
        self.session, self.state, self._compiled, self.evaluations = session, state, compiled, evaluations
        self._stop, self._watchdog, self._process = process.stop, process.watchdog, process
        self._energy = process.energy
        self._metrics, self._voice, self._progress = metrics, voice, progress
        self._throughput, self._memory_bytes, self._config = throughput, memory_bytes, session.config
        self.step = int(jax.device_get(state.step))  # how many steps the state has taken
        self._first = self._recorded = self.step
        self._lag = int(jax.device_get(state.data_step)) - self.step
        self._streak = Streak(self._config.train.rewind_after, self._lag)
        self._late: deque = deque()  # metrics of steps that may still be running
        self._timed = False  # the first step of a process includes work left by the compiler
        # In a fresh run the newest saved step is 0: nothing is saved yet.
        self._saver = Saver(session, process, metrics, voice, progress, last=self.step)
        self._pace = Pace()
        self._guard = guard_of(session, saving=lambda: self._saver.under_way)
        process.set_deadline(self._config)

    def run(self) -> str | None:
        """Train to the last step.

        Returns None at the run's end (the last step, or when `evaluate.patience` runs out), else the name of what
        requested a stop; the state is saved either way, unless the name is UNSAVED. Raises OutOfMemory if a step was
        refused memory (the state is lost then, and only `release` may be called), and BadNumbers if too many steps in a
        row were skipped.
        """
        last = self._config.train.steps
        if not self.session.evaluates:
            self._voice("nothing is held out for validation: its loss is not measured")
        self._energy.begin(self._voice, self.step)
        with noticed(self._failing, self.finished_steps), self._stop.held(), self._guard:
            while True:
                interrupted = not self._train(last)
                self._settle()
                if not self._saver.settle(self.state, self.step, lambda: self._stop.name or self._guard.why):
                    return UNSAVED
                if interrupted or self.has_ended() or self._asked():
                    break
                # The stop was for an overdue save, which has succeeded since: keep training.
        self.evaluations.await_compiler(self._voice)
        if self.has_ended() and self.step < last:
            self._voice(
                f"ended at step {self.step} of {last}: {self._config.evaluate.patience} evaluations in a row "
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
            data_step = self.step + self._lag
            with open_feed(self.session, data_step, last + self._lag) as feed:
                while not self.has_ended() and not self._asked() and self._may_go_on():
                    with self._watchdog.during(STEP):
                        batch = self._timed_batch(feed)
                        self.state, metrics = self._compiled(self.state, batch)
                        self.step += 1
                        self._late.append((self.step, metrics))
                        while len(self._late) > 1:
                            self._record(*self._late.popleft())
                    if self._pace.due():
                        self._settle()
                        self._aside(lambda step: self._pace.report(self._voice, step), self.step)
                    self.evaluations.compile_early(self.state, self._voice)
                    self._save_if_due(self.step)
                    if self.evaluations.due(self.step):
                        self._settle()
                        self._aside(self._evaluate, self.step)
        except Stopped:
            return False
        except UserError:
            self._saver.finish()  # so that the error names the newest checkpoint correctly
            raise
        return True

    def has_ended(self) -> bool:
        """Whether the run is at its end: its last step, or the end of `evaluate.patience`."""
        return self.evaluations.has_ended(self.step)

    def _timed_batch(self, feed):
        """The next batch. The wait counts only if every earlier step is done; otherwise a running step hides it."""
        asked_at = time.perf_counter()
        batch = feed(self.step + self._lag, self.state)
        if self._idle():
            self._throughput.waited(time.perf_counter() - asked_at)
        self._pace.waited(time.perf_counter() - asked_at)
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
        self.evaluations.await_compiler(self._voice)
        self.state = self._compiled = self.evaluations = None
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
            self._aside(lambda at: self._saver.save(self.state, at), step)
        else:
            self._saver.finish(wait=False)

    def _aside(self, work, step: int) -> None:
        """Do work that is not training; its time does not count in rates or in the time left."""
        with self._throughput.excluding():
            work(step)
        self._progress.skip()
        self._energy.disturbed()

    def _may_go_on(self) -> bool:
        """Outside of `energy.hours`: save, and wait with everything in place. False if a stop ended the wait."""
        if not self._energy.rest_seconds():
            return True
        self._settle()
        self._aside(self._rest, self.step)
        return not self._asked()

    def _rest(self, step: int) -> None:
        if step != self._saver.last and not self._streak.length:
            self._saver.save(self.state, step)
        self._saver.finish()
        self._voice.record("pause", step, hours=self._energy.hours)
        self._progress.status(f"step {step}: saved and paused, to go on at {self._energy.hours} (energy.hours)")
        while (left := self._energy.rest_seconds()) and not self._asked():
            time.sleep(min(left, _LOOK_SECONDS))
        self._voice(f"step {step}: going on", "go_on", step)

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
        self._energy.step(values["tokens"], self._voice, step)
        if step % self._config.log.every == 0 or step == self._config.train.steps:
            record |= {**self._throughput.measure(), "memory_bytes": self._memory_bytes(), "time": time.time()}
            record |= self._energy.measure(record["tokens_per_s"])
        self._metrics.write(record)
        self._recorded = self._watchdog.step = step
        self._progress.step(record)
        if record["skipped"]:
            finite = math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
            what = "is an outlier" if finite else "is not finite"
            self._voice(
                f"step {step}: loss or gradient {what}; the update was not applied",
                "skip", step, loss=values["loss"], grad_norm=values["grad_norm"],
            )  # fmt: skip
        self._streak.count(step, bool(record["skipped"]))

    def _settle(self) -> None:
        """Log every outstanding record."""
        while self._late:
            with self._watchdog.during(STEP):
                self._record(*self._late.popleft())

    # ---- saving and evaluating

    def _save_due(self, step: int) -> bool:
        return step == self._config.train.steps or step % self._config.checkpoint.every == 0

    def _evaluate_if_missed(self) -> None:
        """Make an evaluation that is missing because the run was killed between a save and its evaluation."""
        if self.step > 0 and self.evaluations.due(self.step) and self.step not in self.evaluations.results:
            self._evaluate(self.step)

    def _evaluate(self, step: int) -> None:
        watched = self._watchdog.during("an evaluation")
        # One of several processes must not leave a collective in which the others are waiting.
        allowed = self._stop.allowed() if processes.count() == 1 else contextlib.nullcontext()
        with refused(f"evaluating step {step}", _EVALUATING), allowed, watched:
            result = self.evaluations.measure(self.state, step, self._stop.heed)
            self._stop.heed()
        judged = self.evaluations.judged(result)
        # Nothing is saved among bad steps. The record comes last: it says that nothing is left to do for this step.
        if judged is not None and step != self._saver.last and not self._streak.length:
            if self.evaluations.is_among_best(judged):
                self._saver.save(self.state, step)
        self.evaluations.results[step] = result
        if judged is not None:
            self._saver.attach_score(step, judged)
        self._metrics.write({"step": step, "evaluation": result})
        scored = "" if judged is None or judged.name == "loss" else f", {judged.name} {decimal(judged.value)}"
        self._voice(f"step {step}: validation loss {decimal(result['loss'])}{scored}")

    def _asked(self) -> str | None:
        mine = self._stop.name
        if mine is None and self._process.deadline_passed():
            mine = "train.stop_after_minutes"
        if mine is None and self._saver.overdue():
            mine = UNSAVED
        mine = mine or self._energy.asked() or self._guard.asked(self.step, self._settle)
        return processes.stop_asked(self.step, mine)


def state_hash(state) -> str:
    """sha256 hex over every leaf of a state by canonical name: equal hashes mean equal bits. All processes call it."""
    import hashlib

    hasher = hashlib.sha256()
    for name, leaf in layout.each_whole(state):
        hasher.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        hasher.update(leaf.tobytes())
    return hasher.hexdigest()
