"""Recognises tables and reads their documents: one per row, the text of the wanted column.

A row without such text is left out with a reason; a table without any such row is a UserError.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from aurora_train.errors import UserError
from aurora_train.sources import readers
from aurora_train.sources.readers import Cell, LeftOut, Mistake

KINDS = {
    ".jsonl": "json", ".ndjson": "json", ".jsonlines": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
PERHAPS = (".json", ".csv", ".tsv")  # also found among texts and code: a table only if it has the column
COMPRESSED = (".gz", ".zst", ".zstd", ".xz", ".bz2")
ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar")
UNREADABLE = (
    *ARCHIVES, ".lz4", ".lzma", ".xls", ".xlsx", ".ods", ".orc", ".avro", ".pdf", ".doc", ".docx", ".odt",
    ".epub", ".pkl", ".pickle", ".npy", ".npz", ".safetensors", ".h5", ".hdf5", ".db", ".sqlite",
    ".sqlite3", ".duckdb", ".msgpack", ".tfrecord",
)  # fmt: skip

_TELLING = 100  # first rows that decide whether a file is a table
_GIVEN_UP_AFTER = 10_000  # rows at the start of a table without the column, after which it is refused
_CHAT = ("messages", "conversations", "conversation", "turns", "dialog", "dialogue", "chat")
_TUNE = "conversations are learned by `recipe: language/tune`, which puts the loss on the answers alone"


def suffix(name: str) -> str:
    """The last suffix of a file's name in lower case, not counting that of a compression."""
    parts = name.lower().rpartition("/")[2].split(".")[1:]
    parts = parts[:-1] if parts and f".{parts[-1]}" in COMPRESSED else parts
    return f".{parts[-1]}" if parts else ""


def kind(name: str) -> str | None:
    """The reader for a table of this name; None if it is not a table's name."""
    return KINDS.get(suffix(name))


def is_compressed(name: str) -> bool:
    """Whether the name has the suffix of a supported compression."""
    return name.lower().endswith(COMPRESSED)


def read_text(path: Path) -> bytes | LeftOut:
    """The bytes of a text file, decompressed if its name says so. Raises OSError if it cannot be opened."""
    if not is_compressed(path.name):
        return path.read_bytes()
    path.open("rb").close()  # tells a file that cannot be opened from one that cannot be decompressed
    try:
        with readers.opened(path) as stream:
            return stream.read()
    except readers.faults():
        return LeftOut(f"damaged {path.suffix}")


def documents(name: str, path: Path, field: str, key: str) -> Iterator[tuple[str, bytes | LeftOut]]:
    """(`name#row`, text) of every row of a table. A null is empty; bytes that are not UTF-8 are passed on unchanged.

    `key` is the section of the config that names the table. Raises UserError for a file that cannot be read, and for
    one without any text in `field`.
    """
    yield from numbered(name, column(path, field, key), str(path), field, key)


def numbered(name: str, cells: Iterable, where: str, field: str, key: str) -> Iterator[tuple[str, bytes | LeftOut]]:
    """`documents` for cells that are already read, from a table called `where` in messages."""
    good, first = False, None
    for row, cell in enumerate(cells):
        if isinstance(cell, Mistake):
            first = first or cell
            if row == _GIVEN_UP_AFTER and not good:
                break
            cell = LeftOut(f"`{field}` holds {cell.holds}, not text" if cell.holds else f"no field `{field}`")
        else:
            good = good or not isinstance(cell, LeftOut)
        yield f"{name}#{row}", cell
    if first and not good:
        raise _no_text(first, where, field, key)


def is_table(name: str, path: Path, field: str) -> bool | None:
    """Whether a file is a table. If the suffix leaves it open, one of the first rows must have the column.

    None for such a file without rows.
    """
    if suffix(name) not in PERHAPS:
        return kind(name) is not None
    try:
        cells = list(itertools.islice(column(path, field, ""), _TELLING))
    except UserError:
        return False
    return any(not isinstance(cell, LeftOut | Mistake) for cell in cells) if cells else None


def peek(path: Path, field: str, key: str) -> None:
    """Raise the UserError that reading this table would raise, as far as its first rows show."""
    first = None
    for cell in itertools.islice(column(path, field, key), _GIVEN_UP_AFTER):
        if isinstance(cell, Mistake):
            first = first or cell
        elif not isinstance(cell, LeftOut):
            return
    if first:
        raise _no_text(first, str(path), field, key)


def column(path: Path, field: str, key: str) -> Iterator[Cell]:
    """The cells of one column of a table, as in `rows`."""
    return (cell for _, (cell,) in rows(path, (field,), key))


def place(name: str, line: int | None, row: int) -> str:
    """Where a row stands, in words: by its line where the table has lines, else by its number; both count from 1."""
    return f"row {row} of {name}" if line is None else f"line {line} of {name}"


def rows(
    path: Path, fields: tuple[str, ...], key: str, read: Callable[..., Iterator] = readers.rows
) -> Iterator[tuple[int | None, object]]:
    """`readers.rows` of a table, or what another function of `readers` reads. UserError for a file that cannot be
    read."""
    ending = suffix(path.name)
    try:
        yield from read(path, KINDS[ending], fields)
    except readers.faults() as error:
        words = str(error).splitlines()
        raise UserError(
            f"cannot read {path} as {ending[1:]}",
            where=f"{key}.source",
            why=f"{type(error).__name__}: {words[0] if words else 'the error has no message'}",
            hint="the file may not be read by this user; `chmod u+r` allows it" if isinstance(error, PermissionError)
            else "the file may be cut short or of another kind; data.pattern can exclude it",
        ) from error


def _no_text(mistake: Mistake, where: str, field: str, key: str) -> UserError:
    near = difflib.get_close_matches(field, mistake.fields, 1) if not mistake.holds else []
    others = [*near, *(name for name in mistake.texts if name != field)]
    hint = f"{key}.text_field={others[0]}" if others else None
    if field in _CHAT or not near and any(name in _CHAT for name in mistake.fields):
        hint = _TUNE
    return UserError(
        f"field `{field}` of {where} holds {mistake.holds}, not text" if mistake.holds
        else f"{where} has no field `{field}`",
        where=f"{key}.text_field",
        why=f"its fields are {', '.join(mistake.fields)}" if mistake.fields else "its rows are not objects with fields",
        hint=hint,
    )  # fmt: skip
