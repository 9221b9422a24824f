"""`load(RUN)`: a trained model with its config and recipe, for Python, for `aurora generate` and `aurora evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aurora_train.run import Run


@dataclass
class Loaded:
    """A run's model at one step. `model` is an nnx module; `tokenizer` is None where the recipe has none."""

    config: Any
    recipe: Any
    model: Any
    tokenizer: Any
    step: int
    evaluator: Any
    state: Any


def load(run, step: int | None = None, *, progress=lambda done, total, what: None) -> Loaded:
    """The model of a run folder, from its newest checkpoint or the one of `step`, with averaged weights where kept.

    Raises UserError where there is no such run or checkpoint, or where its bytes are not those that were saved.
    """
    from aurora_train.config import load_resolved
    from aurora_train.machine.profile import prepare_environment

    found = Run.existing(run)
    config = load_resolved(found.folder)
    prepare_environment(config)
    from aurora_train.train.session import open_for_reading

    recipe, blueprint, mesh, state, step = open_for_reading(config, found, step, progress)
    from aurora_train.train.evaluate import Evaluator

    evaluator = Evaluator(recipe, blueprint, mesh)
    tokenizer = getattr(getattr(recipe, "store", None), "tokenizer", None)
    return Loaded(config, recipe, evaluator.model(state), tokenizer, step, evaluator, state)
