"""Labelled texts: read from a table or from the interpreter's own library, and split class by class.

Free of jax. Rows count from 1, without the header. What a user has to fix (a missing or unknown label) is refused with
file and row; a row without text, or with the text of an earlier one, is left out and counted.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import logging
import math
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from aurora_train.data import find, tables
from aurora_train.data.readers import LeftOut, Mistake
from aurora_train.errors import UserError

STDLIB = "python-stdlib"
log = logging.getLogger("aurora_train")
# Packages of every Python that is supported; those that this one lacks are left out.
PACKAGES = ("asyncio", "email", "encodings", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib",
            "xml")  # fmt: skip
_SHORTEST = 100  # characters of a function; shorter ones are skipped
SPLITS = ("train", "test", "validation")


class Labelled(NamedTuple):
    text: str
    label: str
    place: str  # "row 12 of reviews.csv", for messages


def read(
    source: str, text_field: str, label_field: str, classes: list[str], *, one_will_do: bool = False
) -> tuple[list[Labelled], Counter]:
    """(the rows in order, the number left out by reason). `classes`: the permitted labels; [] allows all.

    Raises UserError for a source that is not a table, for a row whose label is missing or not among `classes`, and if
    all rows are of one class, unless `one_will_do`.
    """
    source_rows = _functions() if source == STDLIB else _of_tables(source, text_field, label_field)
    rows, seen, left_out = [], {}, Counter()
    for row in source_rows:
        if isinstance(row, LeftOut):
            left_out[str(row)] += 1
        elif row.text in seen:
            same = row.label == seen[row.text]
            left_out["repeats an earlier text" + ("" if same else " under another label")] += 1
        else:
            seen[row.text] = row.label
            rows.append(row)
            _check_class(row, classes)
    if not rows:
        raise UserError(f"{source} holds no row with a text and a label", where="data.source")
    if len({row.label for row in rows}) == 1 and not one_will_do:
        raise UserError(
            f"all {len(rows):,} rows of {source} are labelled `{rows[0].label}`, from {rows[0].place} on",
            where="data.label_field", why="there is nothing to distinguish",
            hint="data.label_field=COLUMN selects another column",
        )  # fmt: skip
    if left_out:
        reasons = "; ".join(f"{number:,} {why}" for why, number in sorted(left_out.items()))
        log.warning("%d of %d rows left out: %s", left_out.total(), left_out.total() + len(rows), reasons)
    return rows, left_out


def split(rows: list[Labelled], test: float, validation: float) -> dict[str, list[int]]:
    """Indices of the rows by split. The same share of every class is held out, and at least one row.

    Within a class the hash of the text decides, not the order of the rows. UserError for a class that is too small.
    """
    by_class: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_class.setdefault(row.label, []).append(number)
    chosen: dict[str, list[int]] = {name: [] for name in SPLITS}
    for label, numbers in by_class.items():
        tests, validations = (max(1, round(share * len(numbers))) for share in (test, validation))
        if len(numbers) < tests + validations + 1:
            raise UserError(
                f"the class `{label}` has {len(numbers)} row{'' if len(numbers) == 1 else 's'}, the first of them "
                f"{rows[numbers[0]].place}", where="data.source",
                why="each class must be in the training, the validation and the test rows",
                hint="add rows of this class, or remove it from the table",
            )  # fmt: skip
        numbers = sorted(numbers, key=lambda n: hashlib.sha256(rows[n].text.encode()).digest())
        chosen["test"] += numbers[:tests]
        chosen["validation"] += numbers[tests : tests + validations]
        chosen["train"] += numbers[tests + validations :]
    return {name: sorted(numbers) for name, numbers in chosen.items()}


def _check_class(row: Labelled, classes: list[str]) -> None:
    if classes and row.label not in classes:
        near = difflib.get_close_matches(row.label, classes, 1)
        raise UserError(
            f"{row.place} is labelled `{row.label}`, which is none of the {len(classes)} classes",
            where="data.label_field", why=f"they are {', '.join(classes)}",
            hint=f"did you mean `{near[0]}`?" if near else None,
        )  # fmt: skip


# ---- tables


def tables_of(source: str) -> list[tuple[str, Path]]:
    """(name, path) of the tables of a source: a file, a folder or a glob. UserError if there is none."""
    path = Path(source).expanduser()
    if not path.exists() and not any(mark in source for mark in "*?["):
        why = f"looked for {path.absolute()}"
        raise UserError(f"there is no file or folder {source}", where="data.source", why=why)
    _, files = find.find(path, "**/*", [])
    files = [(name, file) for name, file in files if tables.kind(name)]
    if not files:
        raise UserError(
            f"{source} holds no table", where="data.source",
            why=f"labels are a column of a table; supported are {' '.join(tables.KINDS)}, also compressed",
        )  # fmt: skip
    return files


def _of_tables(source: str, text_field: str, label_field: str) -> Iterator[Labelled | LeftOut]:
    for name, file in tables_of(source):
        labels = tables.column(file, label_field, "data")
        texts = tables.documents(name, file, text_field, "data")
        for number, ((_, text), label) in enumerate(zip(texts, labels, strict=True), 1):
            place, text = f"row {number} of {name}", _text(text)
            if isinstance(text, LeftOut) or isinstance(label, LeftOut):
                yield text if isinstance(text, LeftOut) else label
            else:
                yield Labelled(text, _label(label, place, label_field), place)


def _text(cell: bytes | LeftOut) -> str | LeftOut:
    if isinstance(cell, LeftOut):
        return cell
    try:
        return cell.decode() if cell.strip() else LeftOut("no text")
    except UnicodeDecodeError:
        return LeftOut("not UTF-8")


def _label(cell: bytes | Mistake, place: str, field: str) -> str:
    """The label in a cell: text, or a number or truth value as JSON writes it."""
    if isinstance(cell, bytes):
        label = cell.decode(errors="replace").strip()
        if label:
            return label
        raise UserError(f"{place} has no label", where=f"data.label_field ({field})",
                        hint="add a label, or remove the row")  # fmt: skip
    if isinstance(cell.value, bool):
        return str(cell.value).lower()
    if isinstance(cell.value, int | float) and math.isfinite(cell.value):
        return str(int(cell.value)) if cell.value == int(cell.value) else str(cell.value)
    if cell.holds is not None:
        raise UserError(f"the label of {place} is {cell.holds}", where=f"data.label_field ({field})",
                        hint="a label is text, a number, true or false")  # fmt: skip
    near = difflib.get_close_matches(field, cell.fields, 1)
    raise UserError(
        f"{place} has no field `{field}`", where="data.label_field", why=f"its fields are {', '.join(cell.fields)}",
        hint=f"data.label_field={near[0]}" if near else None,
    )  # fmt: skip


# ---- the interpreter's own library


def _functions() -> Iterator[Labelled]:
    """The source text of functions of some packages, each labelled by its package."""
    root = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        for name, path in find.below(root / package, "**/*.py", skip=("__pycache__", "test", "tests")):
            source = path.read_text(encoding="utf-8", errors="replace")
            lines = source.splitlines()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                    if len(text) >= _SHORTEST:
                        yield Labelled(text, package, f"line {node.lineno} of {package}/{name}")
