"""Rows of Arrow tables as plain JSON values, such as a line of a JSON file would hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

_ROWS_AT_ONCE = 1024


def plain_rows(batch, fields: tuple[str, ...]) -> Iterator[dict | None]:
    """Each row of a pyarrow RecordBatch or Table, with those of the `fields` that there are; None if it is not UTF-8.

    A field of a struct that is null is absent, because every struct of a column has the fields of all. JSON text
    (Arrow's extension type) is parsed. A type that JSON lacks (a timestamp) gives the Python object.
    """
    batch = batch.select([name for name in batch.schema.names if name in fields])
    plain = {field.name: _plain(field.type) for field in batch.schema}
    for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
        part = batch.slice(start, _ROWS_AT_ONCE)
        for row in _converted(part):
            try:
                yield row and {name: value if value is None else plain[name](value) for name, value in row.items()}
            except UnicodeDecodeError:
                yield None


def _converted(part) -> Iterator[dict | None]:
    """The rows as pyarrow converts them; one by one where text that is not UTF-8 is among them."""
    try:
        yield from part.to_pylist()
    except UnicodeDecodeError:
        if part.num_rows == 1:
            yield None
        else:
            for number in range(part.num_rows):
                yield from _converted(part.slice(number, 1))


def _plain(kind) -> Callable[[object], object]:
    """The function that makes a plain JSON value of what pyarrow gives for a value of this type, except for None."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        inner = {kind.field(n).name: _plain(kind.field(n).type) for n in range(kind.num_fields)}
        return lambda value: {name: inner[name](one) for name, one in value.items() if one is not None}
    if pyarrow.types.is_map(kind):
        item = _plain(kind.item_type)
        return lambda value: {str(name): None if one is None else item(one) for name, one in value}
    if pyarrow.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if hasattr(kind, "value_type"):  # lists of all sorts
        item = _plain(kind.value_type)
        return lambda value: [None if one is None else item(one) for one in value]
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads
    return lambda value: value.decode() if isinstance(value, bytes) else value
