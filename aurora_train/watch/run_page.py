"""The page of one run in `aurora watch`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from aurora_train.files import read_json
from aurora_train.run import Run
from aurora_train.tools.markup import escape
from aurora_train.tools.report import events_section, plots_section, samples_section, score_section
from aurora_train.tools.report_page import cards, folded
from aurora_train.units import count, counted, energy, percent, size, words
from aurora_train.watch.catalog import Watched
from aurora_train.watch.figures import View, drawn_names, figure
from aurora_train.watch.layout import bar, inverse, left_words, link, loss, page, state_mark

_EVENTS_SHOWN = 300
# Events that are drawn into the loss: with them a curve may break.
_MARKED = {
    "resume": "resumed", "rewind": "went back past bad data", "skip": "update not applied", "replan": "replanned",
    "fail": "failed",
    "walk_back": "a checkpoint was damaged", "override": "settings changed", "pause": "paused", "power": "power set",
}  # fmt: skip


def run_page(one: Watched, query: Mapping[str, str], complete: bool) -> str:
    """The page of a run whose logs were read as far as they are; `complete`: to their ends."""
    view, name, run = View.of(query), escape(one.name), one.run
    row = one.row
    facts = [words(str(row.recipe or "")), f"step {row.step:,} of {row.steps:,}" if isinstance(row.steps, int) else "",
            left_words(one), row.why, *_mentioned(one.events)]  # fmt: skip
    reports = f'<a href="{link("report", one.name)}">report</a>' if run.report.is_file() else ""
    body = (f'<div class="head"><h1>{name}</h1>{state_mark(one)} <span class="note">'
            f'{escape(" · ".join(filter(None, facts)))}</span> {reports}{bar(one)}</div>\n'
            + cards(_glance(one)) + view.tools())  # fmt: skip
    if not complete:
        body += f'<p class="note">{percent(one.curves.share)} of the log is read; the curves grow.</p>\n'
    if one.unreadable:
        body += f'<p class="note">{counted(one.unreadable, "line")} of its logs cannot be read, and are left out.</p>\n'
    body += _safely(_figures, one, view)
    for part in (_scores, _plots, _samples, _events, _config):
        body += _safely(part, one)
    return page(one.name, body, way=f"/ {name}", soon=not complete)


def _safely(part: Callable[..., str], one: Watched, *more) -> str:
    """A part of the page; words instead if a file is not as ours are: one damaged file does not hide the others."""
    try:
        return part(one, *more)
    except Exception as error:
        said = str(error) or type(error).__name__
        return f'<p class="fault">{escape(words(part.__name__).strip())}: cannot be shown: {escape(said)}</p>\n'


def _glance(one: Watched) -> list[tuple[str, str]]:
    """(what, figure) for each card; what was not recorded has none."""
    last, best, row = one.glance.last, one.best, one.row
    score = row.score if row.score and isinstance(row.score["value"], (int, float)) else None

    def known(name: str, form: Callable[[float], str]) -> str:
        value = last.get(name)
        return form(value) if isinstance(value, (int, float)) and value == value else ""

    figures = [
        *([(words(score["name"]), loss(score["value"]))] if score else []),
        ("loss, last step", loss(last.get("loss"))),
        (f"best validation loss, step {best[0]:,}" if best else "", loss(best[1]) if best else ""),
        ("targets per second", known("tokens_per_s", count)), ("MFU", known("mfu", percent)),
        ("joules per target", known("tokens_per_joule", inverse)),
        ("energy so far", known("total_joules", energy)), ("memory", known("memory_bytes", size)),
        ("waiting for data", known("data_wait", percent)),
    ]  # fmt: skip
    return [(what, figure) for what, figure in figures if figure]


def _mentioned(events: list[dict]) -> list[str]:
    """What happened more than it should, in words."""
    number = Counter(event["event"] for event in events)
    kinds = (("resume", "resume"), ("rewind", "rewind"), ("skip", "skipped update"), ("save_failed", "failed save"))
    return [counted(number[event], noun) for event, noun in kinds if number[event]]


def _figures(one: Watched, view: View) -> str:
    marks = [(event["step"], f"{_MARKED[event['event']]} at step {event['step']:,}") for event in one.events
             if event["event"] in _MARKED and isinstance(event.get("step"), int)]  # fmt: skip
    runs = [(one.name, one.curves)]
    drawn = figure(["loss", "evaluation/loss"], runs, view, wide=True, marks=marks)
    drawn += "".join(figure([name], runs, view) for name in drawn_names([one.curves]))
    return f'<div class="figures">{drawn}</div>\n'


def _scores(one: Watched) -> str:
    scores = read_json(one.run.scores)
    return score_section(scores) if scores else ""


def _plots(one: Watched) -> str:
    def shown(file: str, title: str) -> str:
        if picture_file(one.run, file) is None:
            return '<p class="note">not there any more</p>'
        return f'<img loading="lazy" alt="{escape(title)}" src="{link("picture", one.name, file=file)}">'

    return plots_section(read_json(one.run.plots, []), shown)


def picture_file(run: Run, file: str):
    """The path of a picture that a run's score lists; None if it lists none of this name, or if that is a link."""
    plots = read_json(run.plots, [])
    path = run.workdir / file
    listed = any(isinstance(plot, dict) and plot.get("file") == file == path.name for plot in plots)
    return path if listed and path.is_file() and not path.is_symlink() else None


def _samples(one: Watched) -> str:
    return samples_section(one.run.samples)


def _events(one: Watched) -> str:
    return f'<div class="events">{events_section(one.events[::-1][:_EVENTS_SHOWN])}</div>' if one.events else ""


def _config(one: Watched) -> str:
    text = one.run.config.read_text() if one.run.config.is_file() else ""
    return folded("config", f"<pre>{escape(text)}</pre>") if text else ""
