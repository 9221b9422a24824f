"""The first page of `aurora watch`: every run in one row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode

from aurora_train.tools.chart import spark
from aurora_train.tools.markup import escape
from aurora_train.tools.runs import DEFAULT, shown_differences
from aurora_train.units import count, counted, percent, size, words
from aurora_train.watch.catalog import Overview, Watched
from aurora_train.watch.figures import MOST
from aurora_train.watch.layout import age, bar, inverse, left_words, link, loss, page, state, state_mark

_NUMERIC = (("tokens_per_s", "targets/s", count), ("tokens_per_joule", "J/target", inverse),
            ("memory_bytes", "memory", size), ("data_wait", "data wait", percent))  # fmt: skip


def list_page(overview: Overview, folder: Path | None, query: Mapping[str, str]) -> str:
    """The page. `query` may have `q`, words that a row has to hold, and `sort`, a column."""
    wanted, sort = query.get("q", "").lower().split(), query.get("sort", "")
    shown = [one for one in overview.runs if all(word in _text(one) for word in wanted)]
    if sort in _SORTS:
        shown.sort(key=lambda one: _none_last(_SORTS[sort](one)))
    where = str(Path(folder or DEFAULT).absolute())
    number = Counter(state(one)[0] for one in overview.runs)
    states = ", ".join(f"{amount} {name}" for name, amount in number.most_common())
    body = f"<p class=note>{counted(len(overview.runs), 'run')}{': ' if states else ''}{escape(states)}</p>"
    if overview.fault:
        body = f'<p class="fault">{escape(overview.fault)}</p>'
    elif not overview.runs:
        body = "<p>There are no runs here yet: <code>aurora train quickstart</code> starts one, which appears here.</p>"
    else:
        body += _tools(shown, query.get("q", ""), sort) + _table(shown, query)
    title = f"{number['training']} training" if number["training"] else "aurora watch"
    return page(f"{title} · {Path(where).name}", body, way=escape(where), soon=overview.waiting > 0)


def _text(one: Watched) -> str:
    """What the words of a search are looked for in."""
    row = one.row
    return " ".join((one.name, state(one)[0], *(() if row is None else (
        str(row.recipe), shown_differences(row.differs))))).lower()  # fmt: skip


def _score(one: Watched) -> float | None:
    score = one.row.score if one.row else None
    value = score["value"] if score else None
    return value if isinstance(value, (int, float)) else None


def _ranked(one: Watched) -> float | None:
    """A score by which the best comes first."""
    value = _score(one)
    return None if value is None else -value if one.row.score.get("better") == "max" else value


_SORTS = {
    "name": lambda one: one.name, "state": lambda one: state(one)[0],
    "loss": lambda one: one.glance.last.get("loss"), "validation": lambda one: one.glance.best and one.glance.best[1],
    "score": _ranked, "targets/s": lambda one: -one.glance.last.get("tokens_per_s", 0) or None,
    "J/target": lambda one: -one.glance.last.get("tokens_per_joule", 0) or None,
}  # fmt: skip


def _none_last(value) -> tuple:
    return (value is None or value != value, 0 if value is None or value != value else value)


def _tools(shown: list[Watched], asked: str, sort: str) -> str:
    together = link("compare", run=[one.name for one in shown if one.row is not None][:MOST])
    said = f"Compare all {len(shown)}" if len(shown) <= MOST else f"Compare the first {MOST}"
    return (
        f'<form class="tools live" role="search"><input type="search" name="q" value="{escape(asked)}" '
        f'placeholder="Filter: name, state, recipe, setting" aria-label="Filter"><input type="hidden" name="sort" '
        f'value="{escape(sort)}"><button form="compare">Compare ticked</button> '
        f'<a href="{together}">{said}</a></form>\n' if shown else
        f'<form class="tools live" role="search"><input type="search" name="q" value="{escape(asked)}" '
        'aria-label="Filter"> <span class="note">no run has these words</span></form>\n'
    )  # fmt: skip


def _table(shown: list[Watched], query: Mapping[str, str]) -> str:
    if not shown:
        return ""
    there = [(name, title, form) for name, title, form in _NUMERIC if any(name in one.glance.last for one in shown)]
    titles = ["name", "state", "loss", "validation", "score", *(title for _, title, _ in there), "written"]
    heads = "".join(_head(title, query, number=title in ("validation", "score") or place > 4)
                    for place, title in enumerate(titles))  # fmt: skip
    rows = "".join(_row(one, there) for one in shown)
    return (f'<form id="compare" action="/compare"></form><table class="runs"><thead><tr><th></th>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table>\n")  # fmt: skip


def _head(title: str, query: Mapping[str, str], number: bool) -> str:
    kind = ' class="number"' if number else ""
    if title not in _SORTS:
        return f"<th{kind}>{title}</th>"
    is_sorted = query.get("sort") == title
    kept = {"q": query.get("q", ""), "sort": "" if is_sorted else title}
    asked = urlencode({name: value for name, value in kept.items() if value})
    sorted_by = ' aria-sort="ascending"' if is_sorted else ""
    return f'<th{kind}{sorted_by}><a href="{escape(f"/?{asked}")}">{title}</a></th>'


def _row(one: Watched, there: list[tuple]) -> str:
    row, last, name = one.row, one.glance.last, escape(one.name)
    pick = f'<input type="checkbox" form="compare" name="run" value="{name}" aria-label="compare {name}">'
    begin = f'<tr id="run {name}" class="{escape(state(one)[0])}"><td class="pick">{pick}</td>'
    named = f'<td class="name"><a href="{link("run", one.name)}">{name}</a>'
    if row is None:
        return f'{begin}{named}</td><td data-what="state" colspan="20">{state_mark(one)}</td></tr>\n'
    apart = shown_differences(row.differs) or words(str(row.recipe or ""))
    how_far = f"{row.step:,} of {row.steps:,}" if isinstance(row.steps, int) else f"{row.step:,}" if row.step else ""
    left = left_words(one)
    best, score = one.glance.best, _score(one)
    cells = [
        ("state", "how", f"{state_mark(one)}{bar(one)}<small>{escape(how_far)}{' · ' if left else ''}{left}</small>"),
        ("loss", "loss", spark(one.glance.sketch, f"loss of {one.name}") + f"<b>{loss(last.get('loss'))}</b>"),
        ("validation", "number", loss(best[1]) + f"<small>step {best[0]:,}</small>" if best else ""),
        ("score", "number", "" if score is None else f"{loss(score)}<small>{escape(words(row.score['name']))}</small>"),
        *((title, "number", form(last[key]) if _is_number(last.get(key)) else "") for key, title, form in there),
        ("written", "number", age(row.written) if row.written else ""),
    ]  # fmt: skip
    return begin + f"{named}<small>{escape(apart or row.why)}</small></td>" + "".join(
        f'<td data-what="{what}" class="{kind}">{content}</td>' for what, kind, content in cells
    ) + "</tr>\n"  # fmt: skip


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and value == value
