"""Several runs of `aurora watch` in the same figures. Those of different recipes never share one: their losses measure
different things."""

from __future__ import annotations

from collections.abc import Sequence

from aurora_train.tools import runs as listed
from aurora_train.tools.chart import COLOURS
from aurora_train.tools.markup import escape
from aurora_train.tools.report_page import number, section, table
from aurora_train.units import counted, words
from aurora_train.watch.catalog import Watched
from aurora_train.watch.figures import View, drawn_names, figure
from aurora_train.watch.layout import left_words, link, loss, page, state_mark


def compare_page(chosen: Sequence[Watched], missing: Sequence[str], query, complete: bool) -> str:
    """The page of some runs; `missing` are names that no run has; `complete`: their logs were read to the ends."""
    view = View.of(query)
    body = f"<h1>{counted(len(chosen), 'run')} compared</h1>\n"
    if not chosen:
        body += '<p>Tick runs in <a href="/">the list</a>, then compare them.</p>\n'
    else:
        body += view.tools([("run", one.name) for one in chosen])
    body += "".join(f'<p class="fault">there is no run {escape(name)}</p>\n' for name in missing)
    if not complete:
        behind = sum(one.curves.log.behind for one in chosen)
        body += f'<p class="note">{counted(behind, "log")} of {len(chosen)} are being read; the curves grow.</p>\n'
    recipes: dict[str, list[Watched]] = {}
    for one in chosen:
        recipes.setdefault(str(one.row.recipe), []).append(one)
    for recipe, alike in recipes.items():
        body += _recipe(recipe, alike, view)
    return page("compared", body, way="/ compared", soon=not complete)


def _recipe(recipe: str, runs: Sequence[Watched], view: View) -> str:
    rows = "".join(_row(one, place) for place, one in enumerate(runs))
    columns = ("run", "state", "step", "left", "loss", "validation", "score")
    head = "".join(f"<th>{name}</th>" for name in columns)
    whole = (f'<div class="scroll"><table class="compared"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
             "</div>\n")  # fmt: skip
    named = [(one.name, one.curves) for one in runs]
    drawn = figure(["loss"], named, view, wide=True)
    others = drawn_names(curves for _, curves in named)
    if any(curves.known("evaluation/loss") for _, curves in named):
        drawn += figure(["evaluation/loss"], named, view, wide=True)
    drawn += "".join(figure([name], named, view) for name in others)
    apart = listed.differences({one.name: one.settings for one in runs})
    keys = dict.fromkeys(key for known in apart.values() for key in known)
    cells = [[key, *(number(apart[one.name].get(key, "")) for one in runs)] for key in keys]
    settings = table(["key", *(one.name for one in runs)], cells) if cells else "<p>the configs are the same</p>\n"
    return (section(words(recipe), whole, f'<div class="figures">{drawn}</div>\n')
            + section("Config, where it differs", settings))  # fmt: skip


def _row(one: Watched, place: int) -> str:
    row, best = one.row, one.best
    dash = ";--dash:dashed" if place // len(COLOURS) % 2 else ""
    style = f"--colour:var({COLOURS[place % len(COLOURS)]}){dash}"
    score = f"{loss(row.score['value'])} {words(row.score['name'])}" if row.score else ""
    cells = [
        f'<a class="swatch" style="{style}" href="{link("run", one.name)}">{escape(one.name)}</a>', state_mark(one),
        f"{row.step:,}", left_words(one), loss(one.glance.last.get("loss")),
        f"{loss(best[1])} at step {best[0]:,}" if best else "", escape(score),
    ]  # fmt: skip
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
