"""Data that a model makes itself: the actor that `Recipe.experience` receives, and the journal of outside answers.

Such a batch is a function of (state, seed, data step), so a resumed run makes it again and nothing of it is saved. An
outside source (a reward function, a simulator, a person) need not give the same answer twice. Therefore an answer is
appended to the run's journal and synced before it is returned, and so before the update that uses it; a resumed run
reads it there and does not ask again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aurora_train.errors import UserError
from aurora_train.record import metrics as logs

log = logging.getLogger("aurora_train")


class Programs:
    """The compiled programs of a recipe's `experience`: one for each function with which it runs the model."""

    def __init__(self, session):
        self._blueprint, self._here, self._jitted = session.blueprint, session.program.here, {}

    def __call__(self, function: Callable, weights: tuple, arguments: tuple) -> Any:
        if function not in self._jitted:

            def program(weights, arguments):
                model = self._blueprint.merge(*weights)
                model.eval()
                return function(model, *arguments)

            self._jitted[function] = jax.jit(program)
        with self._here():
            return jax.device_get(self._jitted[function](weights, arguments))


class Actor:
    """Gives access to the model before data step `step` and to outside sources. Made for one batch."""

    def __init__(self, programs: Programs, state, step: int, journal: Journal):
        self._programs, self._journal, self.step = programs, journal, step
        self._weights = (state.params, state.rest, state.frozen)
        self._asked = 0

    def run(self, function: Callable, *arguments) -> Any:
        """Run `function(model, *arguments)` compiled, with the model in evaluation mode. Returns NumPy arrays.

        `arguments` are pytrees of arrays. The program is cached by the function: pass a method or a module-level
        function, not a new lambda each time.
        """
        return self._programs(function, self._weights, arguments)

    def ask(self, name: str, function: Callable, *arguments) -> Any:
        """The result of `function(*arguments)`, read from the journal if this run has asked for it before.

        Arguments and answer are arrays or plain JSON: numbers, text, lists and dicts of them. `name` describes the
        question to a reader of the journal.
        """
        number, self._asked = self._asked, self._asked + 1
        question = _digest(name, arguments)
        known = self._journal.find(self.step, number, name, question)
        if known is None:
            known = self._journal.keep(self.step, number, name, question, _packed(name, function(*arguments)))
        return _unpacked(known["answer"])


class Journal:
    """Answers from outside, one per line, in a file of the run. `start`: the first data step that is still to come.

    UserError if the file cannot be written: an answer that might be lost is not used.
    """

    def __init__(self, path: Path, start: int):
        self._path, self._file, self._warned = path, None, False
        self._known = {(one["step"], one["number"]): one for one in logs.read(path) if one["step"] >= start}

    def find(self, step: int, number: int, name: str, question: str) -> dict | None:
        """The record of the `number`-th question of a data step; None if it was not asked."""
        known = self._known.pop((step, number), None)  # it is asked for once
        if known is None:
            return None
        if (known["name"], known["question"]) == (name, question):
            return known
        if not self._warned:
            self._warned = True
            log.warning(
                "the question of data step %d to `%s` differs from the one in the journal, so it is asked again: "
                "the plan, the mesh or a version has changed", step, name,
            )  # fmt: skip
        return None

    def keep(self, step: int, number: int, name: str, question: str, answer: Any) -> dict:
        """Append an answer and sync it to disk. Returns its record as it would be read back."""
        if self._file is None:
            self._file = logs.JsonLines(self._path)
        record = {"step": step, "number": number, "name": name, "question": question, "answer": answer}
        self._file.write(record)
        self._file.sync()
        return logs.decode(logs.encode(record))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _digest(name: str, arguments: tuple) -> str:
    return hashlib.sha256(json.dumps(_packed(name, list(arguments)), sort_keys=True).encode()).hexdigest()


def _packed(name: str, value: Any) -> Any:
    """The value as JSON, with the dtype and the shape of each array beside its numbers."""

    def plain(value):
        if hasattr(value, "tolist"):
            value = np.asarray(value)
            return {"array": value.tolist(), "dtype": str(value.dtype), "shape": list(value.shape)}
        raise TypeError(f"a {type(value).__name__}")

    try:
        return json.loads(json.dumps(value, default=plain))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"a question to `{name}` or its answer cannot be written to the journal: {error}", where="Actor.ask",
            hint="use arrays, numbers, text, and lists and dicts of them",
        ) from error  # fmt: skip


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"array", "dtype", "shape"}:
        return np.asarray(value["array"], value["dtype"]).reshape(value["shape"])
    if isinstance(value, dict):
        return {name: _unpacked(one) for name, one in value.items()}
    return [_unpacked(one) for one in value] if isinstance(value, list) else value
