"""Checks the format of what a recipe returns for people to read: scores, tables, notes, plots, samples."""

from __future__ import annotations

import math
from numbers import Number
from pathlib import Path

import numpy as np

from aurora_train.check.blame import place_of
from aurora_train.errors import UserError
from aurora_train.record import PICTURES

TABLE = ("title", "columns", "rows")


def checked_result(recipe, result, method: str = "score") -> dict:
    """The result of `score` or `baselines` with plain Python numbers; UserError for anything that cannot be shown.

    The first key of a score is the headline, a number. "tables" is a list of {"title", "columns", "rows"}, "notes" and
    "remarks" are lists of text, "plots" a list of {"title", "x_label", "y_label", "series"} or of {"title", "file"}.
    """
    where = place_of(getattr(type(recipe), method))
    if not isinstance(result, dict) or not (result or method == "baselines"):
        raise UserError(f"`{method}` returned {_named(result)}", where=where, hint='a dict: {"accuracy": 0.98, ...}')
    clean = {name: _plain(value) for name, value in result.items()}
    headline = next(iter(clean), None)
    if method == "score" and (not isinstance(clean[headline], Number) or isinstance(clean[headline], bool)):
        raise UserError(
            f"the headline of the score, `{headline}`, is {_named(clean[headline])}", where=where,
            hint="the first key of the dict is the number that you would quote",
        )  # fmt: skip
    for name, (wanted, sound) in _FORMATS.items():
        _refuse(clean.get(name, []), where, f"`{name}` of {method}", wanted, sound)
    return clean


def checked_samples(recipe, samples) -> list[dict]:
    """The result of `samples`; UserError if it is not a list of {"prompt", "text"}."""
    wanted = 'a list of {"prompt": ..., "text": ...}, and any checks as True or False'
    _refuse(samples, place_of(type(recipe).samples), "what `samples` returned", wanted, _is_sample)
    return samples


def _is_text(one) -> bool:
    return isinstance(one, str)


def _is_plot(one) -> bool:
    if isinstance(one, dict) and "file" in one:
        path = Path(str(one["file"]))
        return "title" in one and path.name == one["file"] and path.suffix in PICTURES
    if not isinstance(one, dict) or not {"title", "series"} <= one.keys() or not isinstance(one["series"], dict):
        return False
    return all(isinstance(line, list | tuple) and len(line) == 2 and len(line[0]) == len(line[1])
               for line in one["series"].values())  # fmt: skip


def _is_sample(one) -> bool:
    return isinstance(one, dict) and isinstance(one.get("text"), str)


def _is_table(one) -> bool:
    if not isinstance(one, dict) or not all(name in one for name in TABLE):
        return False
    columns, rows = one["columns"], one["rows"]
    if not isinstance(columns, list | tuple) or not isinstance(rows, list | tuple):
        return False
    return all(isinstance(row, list | tuple) and len(row) == len(columns) for row in rows)


_FORMATS = {
    "notes": ("a list of sentences", _is_text), "remarks": ("a list of sentences", _is_text),
    "tables": ('a list of {"title", "columns", "rows"}', _is_table),
    "plots": ('a list of {"title", "series", ...} or {"title", "file"}, the name of an SVG, PNG or GIF', _is_plot),
}  # fmt: skip


def _refuse(value, where: str, what: str, wanted: str, sound) -> None:
    if isinstance(value, list | tuple) and all(map(sound, value)):
        return
    wrong = _named(value)
    if isinstance(value, list | tuple):
        wrong = f"holds {_named(next(one for one in value if not sound(one)))}"
        raise UserError(f"{what} {wrong}", where=where, hint=wanted)
    raise UserError(f"{what} is {wrong}", where=where, hint=wanted)


def _plain(value):
    """NumPy's numbers and arrays as Python's, because JSON would store their text."""
    if isinstance(value, np.generic) or (hasattr(value, "tolist") and getattr(value, "ndim", None) is not None):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _named(value) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return f"a {type(value).__name__}" + (f", {str(value)[:40]!r}" if isinstance(value, str) else "")
