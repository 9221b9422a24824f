"""Labelled texts: read from a table or from the interpreter's own library, and split class by class.

Free of jax. What a user has to fix (a missing or unknown label, a row that cannot be read) is refused with file and
line, or with the number of the row in a file without lines; both count from 1. A row without text, or with the text of
an earlier one, is left out and counted.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import itertools
import json
import logging
import math
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from aurora_train.errors import UserError
from aurora_train.sources import find
from aurora_train.sources.readers import Cell, LeftOut, Mistake
from language import tables

STDLIB = "python-stdlib"
log = logging.getLogger("aurora_train")
# Packages of every Python that is supported; those that this one lacks are left out.
PACKAGES = ("asyncio", "email", "encodings", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib",
            "xml")  # fmt: skip
NOT_UTF8 = LeftOut("not UTF-8")
_SHORTEST = 100  # characters of a function; shorter ones are skipped
SPLITS = ("train", "test", "validation")


class Labelled(NamedTuple):
    text: str
    label: str
    place: str  # "line 12 of reviews.csv", for messages


class Table(NamedTuple):
    """A source of labelled texts: `source`, the names of its two columns, and whether damaged rows are refused."""

    source: str
    text_field: str
    label_field: str
    damaged: Literal["refuse", "leave_out"] = "refuse"


def read(
    table: Table, classes: list[str], *, needed: Collection[str] = (), one_will_do: bool = False
) -> tuple[list[Labelled], Counter]:
    """(the rows in order, the number left out by reason). `classes`: the permitted labels; [] allows all.

    Raises UserError for a source that is not a table, for a row whose label is missing or not among `classes`, for a
    class among `needed` that no row has, and if all rows are of one class, unless `one_will_do`.
    """
    source_rows = _functions() if table.source == STDLIB else _of_tables(table)
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
    if left_out:
        reasons = "; ".join(f"{number:,} {why}" for why, number in sorted(left_out.items()))
        log.warning("%d of %d rows left out: %s", left_out.total(), left_out.total() + len(rows), reasons)
    if not rows:
        raise UserError(f"{table.source} holds no row with a text and a label", where="data.source")
    _check_labels({row.label for row in rows}, needed, table.source)
    if len(set(seen.values())) == 1 and not one_will_do:
        raise UserError(
            f"all {len(rows):,} rows of {table.source} are labelled `{rows[0].label}`, from {rows[0].place} on",
            where="data.label_field", why="there is nothing to distinguish",
            hint="data.label_field=COLUMN selects another column",
        )  # fmt: skip
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


class Texts:
    """A `Source`: tokens and segments int32[B, T] (segment 1 is the text, 0 padding), label int32[B]."""

    def __init__(self, rows: list[Labelled], arrays: dict, labels: list[str], split: str, source: str, tokenizer):
        """`arrays`: the tokens and segments of the `rows`; `labels`: the classes in the order of their numbers."""
        number = {label: i for i, label in enumerate(labels)}
        self.arrays = arrays | {"label": np.array([number[row.label] for row in rows], np.int32)}
        self.rows, self.split, self.source, self.tokenizer = rows, split, source, tokenizer
        content = b"".join(self.arrays[name].tobytes() for name in sorted(self.arrays))
        self.fingerprint = hashlib.sha256(f"classify 1 {split} ".encode() + content).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices):
        return {name: array[indices] for name, array in self.arrays.items()}

    def reading(self, arrays: dict, indices: np.ndarray, rows: int) -> dict:
        """What a model reads of the first `rows` texts of a batch, with their places and labels."""
        full = int((self.arrays["segments"][:, -1] == 1).sum())
        length, padding = arrays["tokens"].shape[1], 1 - arrays["segments"].mean()
        shown = []
        for tokens, segments, index in zip(arrays["tokens"][:rows], arrays["segments"], indices, strict=False):
            read, row = tokens[segments == 1], self.rows[index]
            place = f"{row.place}, labelled `{row.label}`"
            text = self.tokenizer.decode(read[1:])  # without the separator, which begins every text
            shown.append({"index": int(index), "segments": [{"document": place, "tokens": len(read), "text": text}]})
        summary = [
            f"{self.source}; tokenizer of {self.tokenizer.vocab_size:,} entries; {padding:.2%} padding",
            f"{full:,} of {len(self):,} texts fill all {length} tokens: what follows in them is not read",
        ]
        return {"summary": summary, "rows": shown, "full": full, "padding": float(padding)}

    def describe(self) -> dict:
        return {"source": self.source, "split": self.split, "texts": len(self)}


def _check_class(row: Labelled, classes: list[str]) -> None:
    if classes and row.label not in classes:
        near = difflib.get_close_matches(row.label, classes, 1)
        raise UserError(
            f"{row.place} is labelled `{row.label}`, which is none of the {len(classes)} classes",
            where="data.label_field", why=f"they are {', '.join(classes)}",
            hint=f"did you mean `{near[0]}`?" if near else None,
        )  # fmt: skip


def _check_labels(found: set[str], needed: Collection[str], source: str) -> None:
    missing = sorted(set(needed) - found)
    if missing:
        raise UserError(
            f"no row of {source} is labelled `{missing[0]}`, which data.labels names", where="data.labels",
            why=f"the labels that occur are {', '.join(sorted(found))}; a class without rows is not learned",
            hint=f"leave `{missing[0]}` out of data.labels, or add rows",
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


def check_columns(table: Table) -> None:
    """Raise UserError if a table of the source lacks one of the two columns, as far as its first rows show."""
    for name, file in tables_of(table.source):
        tables.peek(file, table.text_field, "data")
        for line, (label,) in itertools.islice(tables.rows(file, (table.label_field,), "data"), 1):
            if isinstance(label, Mistake):
                _label(label, tables.place(name, line, 1), table.label_field)


def _of_tables(table: Table) -> Iterator[Labelled | LeftOut]:
    for name, file in tables_of(table.source):
        rows = list(tables.rows(file, (table.text_field, table.label_field), "data"))
        texts = tables.numbered(name, (text for _, (text, _) in rows), str(file), table.text_field, "data")
        for number, ((line, (read, label)), (_, text)) in enumerate(zip(rows, texts, strict=True), 1):
            place, text = tables.place(name, line, number), _text(text)
            is_damaged = isinstance(read, LeftOut) or text is NOT_UTF8
            if is_damaged and table.damaged == "refuse":
                raise UserError(
                    f"{place} cannot be read: {text}", where="data.source",
                    hint="correct it, or leave such rows out: data.damaged=leave_out",
                )  # fmt: skip
            yield text if isinstance(text, LeftOut) else Labelled(text, _label(label, place, table.label_field), place)


def _text(cell: bytes | LeftOut) -> str | LeftOut:
    if isinstance(cell, LeftOut):
        return cell
    try:
        return cell.decode() if cell.strip() else LeftOut("no text")
    except UnicodeDecodeError:
        return NOT_UTF8


def _label(cell: Cell, place: str, field: str) -> str:
    """The label in a cell: text, or a number or truth value as JSON writes it."""
    where = f"data.label_field ({field})"
    if isinstance(cell, bytes):
        label = cell.decode(errors="replace").strip()
        if label:
            return label
        raise UserError(f"{place} has no label", where=where, hint="add a label, or remove the row")
    if isinstance(cell.value, bool):
        return str(cell.value).lower()
    if isinstance(cell.value, int | float) and math.isfinite(cell.value):
        return str(int(cell.value)) if cell.value == int(cell.value) else str(cell.value)
    if cell.value is not None:
        raise UserError(
            f"{place} has no label: its number is {json.dumps(cell.value)}", where=where,
            why="NaN stands for a missing number" if math.isnan(cell.value) else None,
            hint="add a label, or remove the row",
        )  # fmt: skip
    if cell.holds is not None:
        raise UserError(f"the label of {place} is {cell.holds}", where=where,
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
