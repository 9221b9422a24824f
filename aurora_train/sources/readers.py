"""Reads the rows of JSON, CSV, Parquet and Arrow files, compressed or not: `rows` the text of the wanted columns,
`objects` all that they hold.

A cell of `rows` is the bytes of the column's text, or the reason why there are none. Only these columns are read, so
the contents of the others and changes of their type never matter; text is text whatever it looks like. Therefore JSON
and CSV are read with the standard library: readers that infer types take dates for timestamps and refuse a file whose
columns change. All readers stream. Compression is detected by a file's first bytes, not by its name.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aurora_train.sources.arrow_json import plain_rows

_BLOCK = 1 << 20
_ROWS_PER_BATCH = 1024
_DELIMITERS = {"csv": ",;\t", "tsv": "\t,;"}  # the usual one first
_LONGEST_FIELD = 1 << 28  # characters of a CSV field: an unclosed quote would read the rest of the file into memory
_LONGEST_VALUE = 1 << 30  # characters of a value in a JSON array, for the same reason


class LeftOut(str):
    """Stands in place of a document's bytes: the reason why it has none."""


@dataclass(frozen=True)
class Mistake:
    """A cell without the wanted text. If every row of a table is one, the user has to fix the table or the config.

    `holds`: the type found instead, None if there is nothing; `texts`: the columns that do hold text; `value`: the
    number or truth value found instead.
    """

    fields: list[str]
    holds: str | None = None
    texts: tuple[str, ...] = ()
    value: bool | int | float | None = None

    @classmethod
    def of(cls, value: object, fields: list[str], holds: str | None, texts: tuple[str, ...] = ()) -> Mistake:
        """The mistake of a cell that holds `value`."""
        return cls(fields, holds, texts, value if isinstance(value, bool | int | float) else None)


Cell = bytes | LeftOut | Mistake


def rows(path: Path, kind: str, fields: tuple[str, ...]) -> Iterator[tuple[int | None, tuple[Cell, ...]]]:
    """(line, a cell for each of the `fields`) of every row of a file of this kind: json, csv, tsv, parquet or arrow.

    `line` is where a row begins in the decompressed file, counted from 1; Parquet and Arrow have none. A row that
    cannot be read at all is a LeftOut in every cell. Raises the types in `faults`.
    """
    if kind in _BATCHES:
        for batch, schema in _batches(path, kind, fields):
            for cells in zip(*(arrow_cells(batch, field, schema) for field in fields), strict=True):
                yield None, cells
        return
    # In CSV they stand for bytes that are not UTF-8, which pass unchanged; in JSON, half of a pair is rejected later.
    surrogates = "surrogatepass" if kind == "json" else "surrogateescape"
    for line, row in _parsed(path, kind, fields):
        yield line, tuple(_cell(row, field, surrogates) for field in fields)


def objects(path: Path, kind: str, fields: tuple[str, ...]) -> Iterator[tuple[int | None, object]]:
    """(line, row) of every row, as `rows`; the row is a dict of plain JSON values with at least those `fields` that
    the file has.

    A row that is not UTF-8, or cannot be read at all, is a LeftOut; a value of a JSON file that is no object comes as
    it is. `arrow_json` has the rules for Parquet and Arrow.
    """
    if kind in _BATCHES:
        for batch, _ in _batches(path, kind, fields):
            yield from zip(itertools.repeat(None), arrow_objects(batch, fields))
    else:
        yield from _parsed(path, kind, fields)


def columns(path: Path, kind: str) -> list[str]:
    """The names of all columns of a Parquet or Arrow file; [] for other kinds, and for a file without rows."""
    return next((schema.names for _, schema in _batches(path, kind, ())), []) if kind in _BATCHES else []


def _parsed(path: Path, kind: str, fields: tuple[str, ...]) -> Iterator[tuple[int, object]]:
    if path.stat().st_size:
        yield from _json_rows(path) if kind == "json" else _csv_rows(path, _DELIMITERS[kind], fields)


def _cell(row: object, field: str, surrogates: str) -> Cell:
    """The cell of a row as JSON has it: an object. `surrogates`: how halves of surrogate pairs are encoded."""
    if isinstance(row, LeftOut):
        return row
    if not isinstance(row, dict):
        return Mistake([])
    value = row.get(field, row)
    if isinstance(value, str):
        return value.encode(errors=surrogates)
    if value is None:
        return b""
    texts = sorted((name for name in row if isinstance(row[name], str)), key=lambda name: -len(row[name]))
    return Mistake.of(value, list(row), None if value is row else _TYPES[type(value)], tuple(texts))


def faults() -> tuple[type[Exception], ...]:
    """The exceptions that reading a damaged file may raise."""
    pyarrow = sys.modules.get("pyarrow")  # only a module in use can have failed
    arrow = (pyarrow.ArrowException,) if pyarrow else ()
    return (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError, csv.Error, *arrow)


# ---- compression


def opened(path: Path) -> io.BufferedIOBase:
    """A file as a stream of its decompressed bytes."""
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if magic.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(path)
    if magic.startswith(b"BZh"):
        return bz2.open(path)
    if magic[:4] == b"\x28\xb5\x2f\xfd" or magic[1:4] == b"\x2a\x4d\x18":  # a frame, or a skippable one
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), _BLOCK)
    if magic[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("it is in UTF-16: convert it to UTF-8")
    return path.open("rb")


# ---- JSON: lines, an array, or objects one after the other


def _number(text: str) -> int | float:
    """An integer with all its digits; int() refuses thousands of them, which another column may have."""
    return int(text) if len(text) < 40 else float(text)


_decoder = json.JSONDecoder(parse_int=_number)
_BLANK = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")
_TYPES = {int: "a number", float: "a number", bool: "true or false", list: "list", dict: "object"}


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    with opened(path) as stream:
        start = stream.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"[") or not _is_lines(path):
        yield from _json_values(path, start.startswith(b"["))
        return
    with opened(path) as stream:
        for number, line in enumerate(stream, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            for value in _json_line(line.strip()) if not line.isspace() else ():
                yield number, value


def _is_lines(path: Path) -> bool:
    """Whether one of the first two lines is a complete value; otherwise values span several lines."""
    with opened(path) as stream:
        lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in stream)
        first = list(itertools.islice((line for line in lines if line), 2))
    return not first or any(not isinstance(row, LeftOut) for line in first for row in _json_line(line))


def _json_line(line: bytes) -> list:
    """The values of a line, usually one."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return [LeftOut("not UTF-8")]
    rows, position = [], 0
    try:
        while position < len(text):
            value, position = _decoder.raw_decode(text, _BLANK.match(text, position).end())
            rows.append(value)
    except (ValueError, RecursionError):
        return [LeftOut("not JSON")]
    return rows


def _json_values(path: Path, array: bool) -> Iterator[tuple[int, object]]:
    """The elements of an array, or consecutive values. Memory holds one of them and a block."""
    with opened(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape") as file:
        buffer, want, ended, between = file.read(_BLOCK), _BLOCK, False, _BLANK
        position = buffer.find("[") + 1 if array else 0
        line, counted = 1, 0  # the line of the place `counted` in the buffer
        while True:
            gap = between.match(buffer, position)
            position, between = gap.end(), _BLANK if "," in gap[0] else between
            line, counted = line + buffer.count("\n", counted, position), position
            if array and buffer.startswith("]", position):
                if (buffer[position + 1 :] + file.read(_BLOCK)).strip():
                    raise ValueError("something follows the array")
                return
            value, end = _decoded(buffer, position)
            if end is not None and (end < len(buffer) or ended):  # a number at the end of the buffer may continue
                yield line, value
                position, want, between = end, _BLOCK, _BETWEEN if array else _BLANK
            elif not ended:
                more = file.read(want)
                buffer, position, counted, want, ended = buffer[position:] + more, 0, 0, 2 * want, not more
            elif array or position < len(buffer):
                raise ValueError(f"it is not JSON, or cut short, at `{buffer[position : position + 40]}`")
            else:
                return


def _decoded(buffer: str, position: int) -> tuple[object, int | None]:
    """(value, its end), or (None, None) if the buffer may hold only part of it. ValueError if more cannot help."""
    try:
        return _decoder.raw_decode(buffer, position)
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(buffer) - 16 or error.msg.startswith("Unterminated")
        if not is_cut or len(buffer) - position > _LONGEST_VALUE:
            raise
        return None, None


# ---- CSV


class _Lines:
    """Lines of a file. `taken` holds those since it was last emptied; all but the first of them can be given back.

    `number` is the number of lines before the next one.
    """

    def __init__(self, file: Iterable[str]):
        self._file, self._back, self.taken, self.number = iter(file), [], [], 0

    def __iter__(self):
        return self

    def __next__(self) -> str:
        self.taken.append(self._back.pop() if self._back else next(self._file))
        self.number += 1
        return self.taken[-1]

    def give_back(self) -> None:
        self._back += reversed(self.taken[1:])
        self.number -= len(self.taken) - 1


def _csv_rows(path: Path, delimiters: str, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str] | LeftOut]]:
    csv.field_size_limit(_LONGEST_FIELD)
    with opened(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as file:
        lines = _Lines(file)
        first = next((line for line in lines if not line.isspace()), "")
        headers = {mark: [name.strip() for name in _split(first, mark)] for mark in delimiters}
        delimiter = max(delimiters, key=lambda mark: sum(field in headers[mark] for field in fields))
        columns = {name: headers[delimiter].index(name) for name in headers[delimiter]}
        for line, row in _csv_lists(lines, delimiter, len(headers[delimiter])):
            yield line, row if isinstance(row, LeftOut) else {name: row[at] for name, at in columns.items()}


def _split(line: str, delimiter: str) -> list[str]:
    """The fields of a line; a line that is not CSV is one field."""
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return [line]


def _csv_lists(lines: _Lines, delimiter: str, width: int) -> Iterator[tuple[int, list[str] | LeftOut]]:
    """(first line, fields) of the rows; a row without as many fields as the header is left out."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.taken, line = [], lines.number + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            row = _not_csv(lines, delimiter, width)
            if row is None:
                raise ValueError(f"a quote that opens in line {line} does not close as CSV: {error}") from error
        if row is None:
            return
        if row:
            is_whole = isinstance(row, LeftOut) or len(row) == width
            yield line, row if is_whole else LeftOut("other fields than the header's")


def _not_csv(lines: _Lines, delimiter: str, width: int) -> list[str] | LeftOut | None:
    """The fields to use for a row with wrong quotes; None if the end of that row is unknown.

    An unclosed quote extends into the following rows, which are given back.
    """
    first, *others = lines.taken
    row = first.rstrip("\r\n").split(delimiter)
    is_plain = delimiter == "\t" and len(row) == width  # TSV is written without quoting, too
    if is_plain or not others or width > 1 and all(len(_split(line, delimiter)) == width for line in others):
        lines.give_back()
        return row if is_plain else LeftOut("not CSV")
    return None


# ---- Parquet and Arrow


def _parquet_batches(path: Path, fields: tuple[str, ...]) -> Iterator[tuple]:
    """(RecordBatch of those `fields` that there are, the schema of the whole file)."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(_seekable(path)) as file:
        columns = [field for field in fields if field in file.schema_arrow.names]
        for batch in file.iter_batches(_ROWS_PER_BATCH, columns=columns):
            yield batch, file.schema_arrow


def _arrow_batches(path: Path, fields: tuple[str, ...]) -> Iterator[tuple]:
    """(RecordBatch, its schema) of a file in Arrow's file or stream format; all columns are there."""
    import pyarrow

    with _seekable(path) as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        with (pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file)(file) as reader:
            batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
            for batch in batches:
                yield batch, batch.schema


_BATCHES = {"parquet": _parquet_batches, "arrow": _arrow_batches}


def _batches(path: Path, kind: str, fields: tuple[str, ...]) -> Iterator[tuple]:
    if path.stat().st_size:
        yield from _BATCHES[kind](path, fields)


def _seekable(path: Path):
    """A seekable file; in memory if it is compressed."""
    import pyarrow

    with opened(path) as stream:
        is_plain = isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO)
        return pyarrow.OSFile(str(path)) if is_plain else pyarrow.BufferReader(stream.read())


def arrow_cells(batch, field: str, schema=None) -> Iterator[Cell]:
    """The cells of a pyarrow RecordBatch or Table, a few rows at a time. `schema`: of the whole table."""
    import pyarrow

    names = (schema or batch.schema).names
    if field not in names:
        texts = tuple(one.name for one in schema or batch.schema if "string" in str(one.type))
        yield from itertools.repeat(Mistake(names, None, texts), batch.num_rows)
        return
    column = batch.column(batch.schema.names.index(field))
    for start in range(0, len(column), _ROWS_PER_BATCH):
        part = column.slice(start, _ROWS_PER_BATCH)
        try:  # the raw bytes, UTF-8 or not
            values = part.cast(pyarrow.large_binary()).to_pylist()
        except pyarrow.ArrowException:
            values = part.to_pylist()
        for value in values:
            if isinstance(value, str):
                value = value.encode(errors="surrogatepass")
            if value is None or isinstance(value, bytes):
                yield value or b""
            else:
                yield Mistake.of(value, names, type(value).__name__)


def arrow_objects(batch, fields: tuple[str, ...]) -> Iterator[dict | LeftOut]:
    """The rows of a pyarrow RecordBatch or Table, as in `objects`."""
    for row in plain_rows(batch, fields):
        yield LeftOut("not UTF-8") if row is None else row
