"""Prints the tables of `aurora plan --capacity`: which models fit on a machine. Bytes are decimal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aurora_train.plan.report import amount, words
from aurora_train.tools.report_plan import plain_console, table_of
from aurora_train.units import count, percent

if TYPE_CHECKING:
    from rich.console import Console


def show_capacity(figures: dict, console: Console | None = None) -> None:
    """Print the result of `tools.capacity.capacity`: plain values as lines, `cells` as a table of trainings by
    contexts, and every other list of records as a table of its own.

    A key that ends in `_bytes` is shown as bytes, one in `_share` as a percentage. Nothing else is assumed about the
    records, so that new keys need no change here.
    """
    console = console or plain_console()
    tables = {name: value for name, value in figures.items() if _is_records(value)}
    for name, value in figures.items():
        if name not in tables and value not in (None, [], {}):
            console.print(f"{_title(name)}: {_cell(name, value)}", soft_wrap=True)
    _show_cells(tables.pop("cells", []), console)
    for rows in tables.values():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        numeric = [all(isinstance(row.get(name), (int, float, type(None))) for row in rows) for name in columns]
        left = tuple(i for i, flag in enumerate(numeric) if not flag)
        table = table_of(*(_title(name) for name in columns), left=left)
        for row in rows:
            table.add_row(*(_cell(name, row.get(name)) for name in columns))
        console.print()
        console.print(table)


def _show_cells(cells: list[dict], console) -> None:
    """One row per training, one column per context; each cell has the largest size and the bytes it leaves free."""
    if not cells:
        return
    contexts = list(dict.fromkeys(cell["context"] for cell in cells))
    at = {(cell["training"], cell["context"]): cell for cell in cells}
    titles = ("largest model", *(f"context {_binary(c)}" for c in contexts))
    table = table_of(*titles, left=tuple(range(len(titles))))
    for training in dict.fromkeys(cell["training"] for cell in cells):
        table.add_row(training, *(_largest(at[training, context]) for context in contexts))
    console.print()
    console.print(table)


def _largest(cell: dict) -> str:
    """Lines: the size, its peak and share of the budget, the bytes left, and the bytes of the next size."""
    after = f"{cell['next_size']} would take {amount(cell['next_bytes'])}" if cell.get("next_size") else ""
    if cell["size"] is None:
        return f"none\n{after}\n"
    if after and cell["next_bytes"] <= cell["peak_bytes"] + cell["left_bytes"]:
        after = f"{cell['next_size']}: {amount(cell['next_bytes'])}, too close"
    mark = ", compiled" if cell["how"] == "compiled" else ""
    lines = [cell["size"], f"{amount(cell['peak_bytes'])} ({percent(cell['share'])}{mark})"]
    return "\n".join([*lines, f"{amount(cell['left_bytes'])} left", *([after] if after else []), ""])


def _binary(tokens: int) -> str:
    """The usual name of a context: 4096 -> "4k"."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _title(name: str) -> str:
    return words(name.removesuffix("_bytes").removesuffix("_share"))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return amount(value)
    if name.endswith("_share"):
        return percent(value)
    if isinstance(value, (int, float)):
        return count(value) if abs(value) >= 1e6 else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
