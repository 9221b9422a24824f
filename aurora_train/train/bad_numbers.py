"""If numbers stay bad, the run returns to its newest checkpoint, skips the data, and finally stops with a report.

A step whose loss or gradient is not finite, or is an outlier (`train.spike`), changes nothing but the step number. One
such step is a bad batch; several in a row are a bad stretch of data or a bad state. The run then continues from its
newest checkpoint, which is older than the bad steps because nothing is saved meanwhile, with the batch after the last
bad one. That choice is recorded as an event, so that a run killed after it makes the same choice to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from aurora_train.check.inspection import inspect_batch, not_finite
from aurora_train.checkpoint import layout
from aurora_train.errors import UserError
from aurora_train.machine.processes import agreed
from aurora_train.nn.carried import training_loss
from aurora_train.nn.stack import named_stacks, watched
from aurora_train.nn.tracing import tracing
from aurora_train.random import example_keys, stream
from aurora_train.record import metrics as logs
from aurora_train.record.voice import Voice
from aurora_train.train.feed import batch_at

_NAMED = 6  # documents in a message


@dataclass(frozen=True)
class Window:
    """Steps `first` to `last` (inclusive), all skipped; `data_first` is the data step of the first."""

    first: int
    last: int
    data_first: int

    @property
    def data_after(self) -> int:
        """The data step after the window's last."""
        return self.data_first + self.last - self.first + 1


class BadNumbers(Exception):
    """Too many steps in a row were skipped. `fault`: a description of the first value that is not finite."""

    def __init__(self, window: Window):
        super().__init__(f"steps {window.first} to {window.last} were skipped")
        self.window, self.fault = window, ""


class Streak:
    """Counts skipped steps in a row. `limit` None is no limit; `lag`: data step minus the number of steps before it."""

    def __init__(self, limit: int | None, lag: int):
        self._limit, self._lag, self.length = limit, lag, 0

    def count(self, step: int, skipped: bool) -> None:
        """Count a step. Raises BadNumbers at the limit."""
        self.length = self.length + 1 if skipped else 0
        if self.length and self.length == self._limit:
            first = step - self.length + 1
            raise BadNumbers(Window(first, step, first - 1 + self._lag))


def data_step_of(events, restored: int) -> int | None:
    """The data step to continue with after a return to the checkpoint of step `restored`; None for its own."""
    steps = [e["data_step"] for e in events if e["event"] == "rewind" and e["step"] == restored]
    return max(steps, default=None)


def data_step_of_step(step: int, metrics, events, where: str) -> int:
    """The data step that a step of a run used; UserError for a step that the run has not taken."""
    for record in reversed(metrics):
        if record["step"] == step and "loss" in record:
            return record.get("data_step", step - 1)
    for event in reversed(events):
        if event["event"] == "rewind" and event["first"] <= step <= event["last"]:
            return event["data_first"] + step - event["first"]
    done = max((record["step"] for record in metrics), default=0)
    raise UserError(f"this run has not taken step {step}", where=where, hint=f"it is at step {done}")


def go_back(session, error: BadNumbers, voice: Voice) -> None:
    """Report and record that the run goes back. UserError if it has gone back too often already."""
    config, run, window = session.config, session.run, error.window
    restored = agreed(lambda: max(session.store.steps(), default=0))
    before = [e for e in logs.read(run.events) if e["event"] == "rewind" and e["step"] == restored]
    documents = _documents(session, window)
    batches = _span("data step", window.data_first, window.data_after - 1)
    steps = _span("step", window.first, window.last)
    verb = "were" if window.last > window.first else "was"
    if len(before) >= config.train.rewinds:
        command = f"aurora inspect-batch {run.folder} {window.first}"
        raise UserError(
            f"{steps} {verb} skipped, after {len(before)} returns to step {restored}",
            where=str(run.folder),
            why="\n  ".join([f"it begins with {error.fault}", f"batches: {batches}", *documents]),
            hint=f"{command} shows the first of them. Fix the data if they are bad; if the state becomes bad, "
            f"lower the learning rate: aurora resume {run.folder} optimizer.lr={config.optimizer.lr / 3:.1g}",
        )  # fmt: skip
    voice(
        f"{steps} {verb} skipped; it begins with {error.fault}. Going back to step {restored} and continuing after "
        f"that data ({batches} {verb} left out)",
        "rewind", restored, first=window.first, last=window.last, data_first=window.data_first,
        data_step=window.data_after, fault=error.fault, documents=documents,
    )  # fmt: skip


def _span(what: str, first: int, last: int) -> str:
    return f"{what} {first}" if first == last else f"{what}s {first} to {last}"


def _documents(session, window: Window) -> list[str]:
    """The source documents of the first batch of a window, or its example indices if the data has no documents."""
    config = session.config.train
    facts = inspect_batch(session.source, "train", config.seed, config.batch, window.data_first, config.batch)
    names = dict.fromkeys(s["document"] for row in facts.get("rows", ()) for s in row["segments"])
    if not names:
        return [f"examples {', '.join(map(str, facts['indices'][:_NAMED]))}"]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"documents of the first: {', '.join(list(names)[:_NAMED])}{more}"]


def where_it_begins(session, state, window: Window) -> str:
    """A description of what first is not finite in the first step of a window, under the current parameters.

    Checked in order: the batch, the parameters, the output of each unit of each stack, the loss; else the gradient.
    """
    config = session.config.train
    batch, chosen = batch_at(session, window.data_first, state)
    for name, examples in not_finite(batch, chosen).items():
        return f"the data: {name} of example {examples[0]}"
    for names, stacked, leaf in layout.entries(state.params):
        finite = np.atleast_1d(jnp.isfinite(leaf).all(tuple(range(int(stacked), leaf.ndim))))
        if not finite.all():
            return f"the parameter {names[int(finite.argmin())]}"
    model = session.blueprint.merge(state.params, state.rest, state.frozen)
    paths = {id(stack): path for path, stack in named_stacks(model).items()}
    keys = example_keys(stream(config.seed, "dropout"), jnp.int32(window.first - 1), jnp.asarray(batch["example"]))
    with session.program.here(), tracing(rows=None), watched() as calls:
        loss = training_loss(session.recipe, model, jax.tree.map(jnp.asarray, batch), keys)
    for stack, *given in calls:
        if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(given)):
            continue  # called within a transformation by the loss, from which no numbers come out
        with session.program.here(), tracing(rows=None):
            for unit, out in stack.outputs(*given):
                if not all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(out)):
                    return f"the output of unit {unit} of {paths.get(id(stack), 'a stack')}"
    if not bool(jnp.isfinite(loss.total)):
        return "the loss, after the last unit"
    mean = float(loss.total / loss.weight)
    return f"a loss of {mean:.4g} or its gradient: the output of every unit is finite"
