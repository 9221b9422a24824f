"""Consoles and tables for people: every verb prints in the same style."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def plain_console() -> Console:
    """A rich console that prints text literally: with colours on a terminal, without colours or cut lines in a pipe."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 200)


def table_of(*columns: str, left: tuple[int, ...] = (0,), rows: Iterable[Iterable] = ()) -> Table:
    """A table in the style of the verbs. Columns in `left` are left-aligned and may wrap, the others right-aligned."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, title in enumerate(columns):
        is_left = position in left
        table.add_column(title, justify="left" if is_left else "right", no_wrap=not is_left, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    return table


def show_table(table: dict) -> None:
    """Print a table of a score: {"title", "columns", "rows"}; a cell that is a list is an interval."""

    def shown(cell) -> str:
        if isinstance(cell, list | tuple):
            return f"[{', '.join(map(shown, cell))}]"
        return f"{cell:.4g}" if isinstance(cell, float) else str(cell)

    console = plain_console()
    console.print(table["title"])
    console.print(table_of(*table["columns"], rows=[map(shown, row) for row in table["rows"]]))
