"""HTML parts of the report and of `aurora watch`. All outside text passes through `escape`: it may contain markup."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

from aurora_train.record import PICTURES
from aurora_train.tools import chart
from aurora_train.tools.markup import escape
from aurora_train.units import count, size

CSS = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1b1f24; --soft: #5b6470; --line: #dfe3e8;
  --main: #0b6bcb; --second: #c2410c; --faint: #b9c6d4; --series-3: #2e8b57; --series-4: #7c4dbe;
  --series-5: #0f8b8d; --series-6: #c2255c; --series-7: #8a7a00; --series-8: #6b4f3a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1d2125; --ink: #e6e8ea; --soft: #9aa3ad;
  --line: #343a41; --main: #5aa9f5; --second: #f2945a; --faint: #4a5663; --series-3: #6bcf8f; --series-4: #b794f6;
  --series-5: #4fd1c5; --series-6: #f783ac; --series-7: #d4c13c; --series-8: #c9a58b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.card.first { background: var(--main); color: var(--paper); }
.card.first span { color: inherit; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1.25rem; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
svg, img { width: 100%; height: auto; display: block; }
img { max-width: 28rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
td.number, th.number { text-align: right; }
tr.ours td { font-weight: 600; color: var(--main); }
.facts td:first-child { color: var(--soft); white-space: nowrap; }
.facts td:last-child { overflow-wrap: anywhere; }
pre { background: var(--card); border-radius: .5rem; padding: .9rem 1rem; margin: .5rem 0; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre .prompt { color: var(--main); font-weight: 600; }
pre ins { color: var(--series-3); font-weight: 600; text-decoration: underline dotted; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
.bars { display: grid; grid-template-columns: auto 1fr; gap: .45rem .9rem; align-items: center;
  font-variant-numeric: tabular-nums; }
.bars div { display: flex; align-items: center; gap: .6rem; }
.bars div::before { content: ""; width: calc(var(--share) * .85); height: 1.3rem; border-radius: .2rem;
  background: var(--faint); }
.bars .ours::before { background: var(--main); }
@media (max-width: 40rem) { body { padding: 1.25rem 1rem 3rem; } .facts td:first-child { white-space: normal; } }
""" + chart.CSS

PICTURE_BYTES = 4_000_000  # of one file
NOT_RECORDED = '<p class="soft">not recorded</p>'


def page(title: str, body: str, *, style: str = "", script: str = "", head: str = "") -> str:
    """A whole page; `style`, `script` and `head` are CSS, a script and elements of the head beyond the report's."""
    script = script and f"<script>{script}</script>\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{head}'
        f"<title>{escape(title)}</title>\n<style>{CSS}{style}</style>\n</head>\n<body>\n{body}\n{script}</body>\n</html>\n"
    )


def picture(path: Path, description: str) -> str:
    """An image file as part of the page, which has no other files; words instead if it is missing or too large."""
    if not path.is_file():
        return NOT_RECORDED
    if (bytes_ := path.stat().st_size) > PICTURE_BYTES:
        said = f"{path.name} has {size(bytes_)} and is not shown; the limit is {size(PICTURE_BYTES)}"
        return f'<p class="soft">{escape(said)}</p>'
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(description)}" src="data:{PICTURES[path.suffix]};base64,{data}">'


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{''.join(parts) or NOT_RECORDED}\n</section>\n"


def cards(facts: list[tuple[str, str]]) -> str:
    """Cards from (what, value) pairs; the first is highlighted as the headline."""
    cells = (
        f'<div class="card{" first" if i == 0 else ""}"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
        for i, (what, value) in enumerate(facts)
    )
    return f'<div class="cards">{"".join(cells)}</div>\n'


def table(columns: list, rows: list[list], ours: int | None = None) -> str:
    """A table; numbers are right-aligned. `ours` is the index of the row to highlight."""
    numeric = [bool(rows) and all(_is_number(row[i : i + 1]) for row in rows) for i in range(len(columns))]
    kinds = [' class="number"' if flag else "" for flag in numeric]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, columns, strict=True))
    shows = [_column(rows, i) if flag else number for i, flag in enumerate(numeric)]
    body = ""
    for index, row in enumerate(rows):
        cells = "".join(
            f"<td{kind}>{escape(show(cell))}</td>" for kind, show, cell in zip(kinds, shows, row, strict=False)
        )
        body += f'<tr{" class=ours" if index == ours else ""}>{cells}</tr>\n'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


def _is_number(cell: list) -> bool:
    return bool(cell) and isinstance(cell[0], (int, float))


def _column(rows: list[list], index: int):
    """The format of a numeric column: fractions of similar size get the same number of decimals."""
    values = [row[index] for row in rows]
    if not any(isinstance(value, float) for value in values) or not all(1e-3 < abs(v) < 1e6 for v in values if v):
        return number
    digits = decimals(values)
    return lambda value: f"{value:,.{digits}f}"


def facts(tree: dict) -> str:
    """A two-column table of a nested record, names joined by dots."""
    cells = (f"<tr><td>{escape(name)}</td><td>{escape(number(value))}</td></tr>\n" for name, value in flatten(tree))
    return f'<div class="scroll"><table class="facts"><tbody>\n{"".join(cells)}</tbody></table></div>\n'


def flatten(tree: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """[("a.b", value)] of a nested dict; lists stay whole."""
    flat = []
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat += flatten(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat


def number(value: Any) -> str:
    """A cell as text: numbers with four or five digits, large whole numbers with their magnitude as well."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" + (f" ({count(value)})" if abs(value) >= 1_000_000 else "")
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not finite"
        if 1e3 <= abs(value) < 1e6:
            return f"{value:,.0f}"
        return f"{value:.4g}" if 1e-4 <= abs(value) < 1e3 or value == 0 else f"{value:.3g}"
    if isinstance(value, (list, dict)):
        if all(isinstance(item, str) for item in value) and isinstance(value, list):
            return " ".join(value)
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"


def bars(rows: list[tuple[str, float, bool]]) -> str:
    """Horizontal bars from zero for (name, value, whether it is this run's), top to bottom, with their values."""
    values = [value for _, value, _ in rows]
    digits, longest = decimals(values), max(map(abs, values)) or 1.0
    return '<div class="bars">' + "".join(
        f'<span>{escape(name)}</span><div{" class=ours" if ours else ""} '
        f'style="--share:{100 * abs(value) / longest:.1f}%">{value:.{digits}f}</div>' for name, value, ours in rows
    ) + "</div>\n"  # fmt: skip


def decimals(values: list[float]) -> int:
    """Decimals that give the largest of `values` four figures, so that a column of them lines up."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return min(max(3 - math.floor(math.log10(largest)), 0), 8) if largest else 3
