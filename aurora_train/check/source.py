"""Checks a recipe's data: whether they are a Source, the arrays that it returns, and whether a run began with them."""

from __future__ import annotations

import numpy as np

from aurora_train import files
from aurora_train.check.blame import place_of, recipe_code
from aurora_train.errors import UserError
from aurora_train.run import Run

_OWED = {
    "fingerprint": "a sha256 over all that decides what `take` returns", "__len__": "the number of examples",
    "take": "take(indices) -> dict of arrays", "describe": "describe() -> dict, for provenance",
}  # fmt: skip


def source_of(recipe, split: str):
    """`recipe.data(split)`, checked to be a Source; None if there is no validation split."""
    with recipe_code(recipe, "data"):
        source = recipe.data(split)
    lacking = [name for name in _OWED if not hasattr(source, name)]
    if source is not None and lacking:
        raise UserError(
            f"data({split!r}) returned a {type(source).__name__} without `{lacking[0]}`",
            where=place_of(type(source)), hint=f"`{lacking[0]}`: {_OWED[lacking[0]]}",
        )  # fmt: skip
    return source


def taken(recipe, source, indices) -> dict[str, np.ndarray]:
    """`source.take(indices)`, checked: NumPy arrays by name, with examples as the leading axis."""
    with recipe_code(recipe, "take"):
        batch = source.take(indices)
    where = place_of(source.take)
    if not isinstance(batch, dict) or not batch:
        raise UserError(f"`take` returned a {type(batch).__name__}", where=where, hint="a dict of NumPy arrays by name")
    for name, array in batch.items():
        if not isinstance(array, np.ndarray) or array.dtype == object:
            kind = f"array of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
            raise UserError(f"`take` returned a {kind} as `{name}`", where=where, hint="a NumPy array of numbers")
        if array.shape[:1] != (len(indices),):
            raise UserError(
                f"`take` returned `{name}` of shape {list(array.shape)} for {len(indices)} examples", where=where,
                hint=f"its leading axis is the examples: [{len(indices)}, ...]",
            )  # fmt: skip
    return batch


def refuse_other_data(run: Run, source) -> None:
    """UserError unless a resumed run reads the data that it started with."""
    known = files.read_json(run.provenance)
    if known is None or "data" not in known:  # an imported run has had none
        return
    started_on = known["data"]["fingerprint"]
    if started_on != source.fingerprint:
        raise UserError(
            "the training data is not what this run started on",
            where=str(run.folder),
            why=f"its fingerprint was {started_on[:16]}, it is now {source.fingerprint[:16]}",
            hint="restore the old data, or start a new run: `aurora train CONFIG --fresh`; "
            "`aurora generate RUN` and `aurora evaluate RUN --on FILE` do not need it",
        )
