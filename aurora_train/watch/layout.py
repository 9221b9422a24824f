"""What the pages of `aurora watch` share: their frame, their links and how a run's state is shown."""

from __future__ import annotations

import time
from functools import cache
from importlib import resources
from urllib.parse import quote, urlencode

from aurora_train.tools import report_page
from aurora_train.tools.markup import escape
from aurora_train.units import decimal, duration
from aurora_train.watch.catalog import Watched

SOON_MS = 50  # until the next refresh while there is something left to read
_ICON = (
    "<link rel=\"icon\" href=\"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Cpath d='M1 13 6 6l4 4 5-8' fill='none' stroke='%230b6bcb' stroke-width='2.4'/%3E%3C/svg%3E\">"
)


@cache
def _part(name: str) -> str:
    return resources.files("aurora_train.watch").joinpath(name).read_text()


def script() -> str:
    """The script of every page."""
    return _part("watch.js")


def page(title: str, body: str, *, way: str = "", soon: bool = False, live: bool = True) -> str:
    """A whole page. `way` stands beside the link to the list; `soon`: something is left to read; `live`: it is
    refreshed."""
    again = f' data-again="{SOON_MS}"' if soon else ""
    frame = (f'<nav><a href="/"><b>aurora watch</b></a> <span>{way}</span> '
             f'<span id="lost" role="status"></span></nav>\n'
             f'<main{again}>\n{body}\n</main>\n<div id="readout" hidden></div>')  # fmt: skip
    return report_page.page(title, frame, style=_part("watch.css"), script=script() if live else "", head=_ICON)


def link(kind: str, name: str = "", **query: str) -> str:
    """The address of a page: "run", "compare", "report" or "picture"; as the value of an attribute."""
    asked = f"?{urlencode(query, doseq=True)}" if query else ""
    return escape(f"/{kind}/{quote(name, safe='/')}{asked}" if name else f"/{kind}{asked}")


def state(one: Watched) -> tuple[str, str]:
    """(the word for a run's state, what is known of it)."""
    if one.row is None:
        return "reading", "its files are still to be read"
    if one.row.state == "killed":
        return "killed", "neither a stop nor an error is on record: it was killed or lost power; aurora resume goes on"
    return one.row.state, one.row.why


def state_mark(one: Watched) -> str:
    word, known = state(one)
    return f'<span class="state {escape(word)}" title="{escape(known)}">{escape(word)}</span>'


def bar(one: Watched) -> str:
    """How far a run is, as a bar; "" if its length is not known."""
    row = one.row
    if row is None or not isinstance(row.steps, int) or row.steps < 1:
        return ""
    share = min(max(row.step / row.steps, 0), 1)
    return f'<div class="bar {escape(row.state)}"><div style="--share:{100 * share:.1f}%"></div></div>'


def age(then: float) -> str:
    """How long ago a time in seconds since 1970 was, in words that change once a minute at most."""
    seconds = max(time.time() - then, 0)
    return "now" if seconds < 60 else f"{duration(60 * (seconds // 60)).removesuffix(' 00 s')} ago"


def left_words(one: Watched) -> str:
    """The time left, in words: "" if it is not known."""
    seconds = one.seconds_left
    return "" if seconds is None else f"{duration(seconds)} left"


def loss(value) -> str:
    """A loss or a score as text; "" for what is no number."""
    return decimal(value) if isinstance(value, (int, float)) and value == value else ""


def inverse(rate: float) -> str:
    """Joules per target of targets per joule, as text."""
    return f"{1 / rate:.3g}" if rate > 0 else ""
