"""Draws what the logs hold: one figure a quantity, of one run or of several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from aurora_train.tools.chart import COLOURS, Axes, Line, chart, running_mean
from aurora_train.tools.markup import escape
from aurora_train.units import count, counted, energy, percent, size, words
from aurora_train.watch.curves import Curves

MOST = 2 * len(COLOURS)  # runs that can be told apart in a figure, dashed lines included
_BY = {"step": "step", "hours": "hours", "targets": "targets"}
_SMOOTH = (0, 1, 2, 5, 10)  # percent of the points that are averaged
_MOST_MARKS = 200


@dataclass(frozen=True)
class View:
    """How curves are looked at, from the page's address: `smooth` in percent of the steps shown."""

    smooth: int = 0
    by: str = "step"
    log_x: bool = False
    log_y: bool = False

    @classmethod
    def of(cls, query: Mapping[str, str]) -> View:
        """The view of a page's address; what it does not know is as if it were not there."""
        smooth = query.get("smooth", "")
        return cls(int(smooth) if smooth in map(str, _SMOOTH) else 0, _BY.get(query.get("by", ""), "step"),
                   query.get("logx") == "1", query.get("logy") == "1")  # fmt: skip

    def tools(self, kept: Iterable[tuple[str, str]] = ()) -> str:
        """The form that changes the view; `kept` are further fields of the address."""
        hidden = "".join(f'<input type="hidden" name="{name}" value="{escape(value)}">' for name, value in kept)
        smooth = [(str(share), f"mean over {share} %" if share else "as recorded") for share in _SMOOTH]
        return (f'<form class="tools live">{hidden}<label>curves {_select("smooth", smooth, str(self.smooth))}</label>'
                f"<label>by {_select('by', _BY.items(), self.by)}</label>{_tick('logx', 'log x', self.log_x)}"
                f"{_tick('logy', 'log y', self.log_y)}<noscript><button>Show</button></noscript></form>\n")  # fmt: skip


def _select(name: str, choices: Iterable[tuple[str, str]], chosen: str) -> str:
    options = "".join(f'<option value="{value}"{" selected" if value == chosen else ""}>{text}</option>'
                      for value, text in choices)  # fmt: skip
    return f'<select name="{name}">{options}</select>'


def _tick(name: str, text: str, ticked: bool) -> str:
    return f'<label><input type="checkbox" name="{name}" value="1"{" checked" if ticked else ""}>{text}</label>'


@dataclass(frozen=True)
class _About:
    title: str
    form: Callable[[float], str] | None = None
    from_zero: bool = False
    noisy: bool = True  # else it is never smoothed
    unit: float = 1.0  # in which round numbers are sought for the axis


_ABOUT = {
    "loss": _About("loss"), "evaluation/loss": _About("validation loss", noisy=False),
    "grad_norm": _About("gradient norm"), "lr": _About("learning rate", noisy=False),
    "tokens_per_s": _About("targets per second", count, True),
    "data_wait": _About("waiting for data", percent, True), "memory_bytes": _About("memory", size, True, noisy=False),
    "mfu": _About("MFU", percent, True), "hfu": _About("HFU (recomputation counted)", percent, True),
    "watts": _About("power, watts", None, True), "joules_per_step": _About("joules per step", count, True),
    "tokens_per_joule": _About("targets per joule", count, True),
    "total_joules": _About("energy so far", energy, True, noisy=False, unit=3600.0),
}  # fmt: skip
_NO_FIGURE = ("loss", "evaluation/loss", "time", "tokens", "skipped", "cost", "co2_g")


def drawn_names(runs: Iterable[Curves]) -> list[str]:
    """The quantities of runs that have a figure of their own besides the loss: evaluations, the known ones, others."""
    order = {name: place for place, name in enumerate(_ABOUT)}
    names = {name for curves in runs for name in curves.series if name not in _NO_FIGURE and curves.known(name)}
    return sorted(names, key=lambda name: (not name.startswith("evaluation/"), order.get(name, len(order)), name))


def figure(
    names: Sequence[str], runs: Sequence[tuple[str, Curves]], view: View, *, wide: bool = False,
    marks: Iterable[tuple[int, str]] = (),
) -> str:  # fmt: skip
    """A <figure> of quantities by name: of one run all of them, each with the band of its extremes; of several runs
    one, with a line a run, which keeps its colour where others lack the quantity. `marks` are (step, what happened)."""
    about = _about(names[0])
    lines, not_finite, marked = [], 0, []
    for place, (label, curves) in enumerate(runs):
        for name in names:
            series = curves.known(name)
            not_finite += curves.series[name].not_finite if name in curves.series else 0
            if series is None:
                continue
            steps, *values = series.points()
            means, low, high = (one / about.unit for one in values)
            noisy = view.smooth and len(means) > 20 and _about(name).noisy
            smooth = max(round(len(means) * view.smooth / 100), 2) if noisy else 0
            alone = len(runs) == 1
            lines.append(Line(
                _label(name, len(names) > 1) if alone else label, curves.placed(steps, view.by),
                running_mean(means, smooth) if smooth else means, band=(low, high) if alone else None,
                raw=means if smooth and alone else None, colour=None if alone else place,
            ))  # fmt: skip
        if len(runs) == 1:
            marked = [(x, said) for step, said in [*marks][-_MOST_MARKS:] for x in curves.placed([step], view.by)]
    form = about.form and (lambda value: about.form(value * about.unit))
    axes = Axes(view.by, view.log_x, view.log_y, about.from_zero and not view.log_y, form)
    note = f'<p class="note">{counted(not_finite, "value")} not finite</p>' if not_finite else ""
    kind = ' class="wide"' if wide else ""
    drawn = chart(about.title, lines, axes, marked, named=wide)
    return f'<figure id="figure {escape(names[0])}"{kind}>{drawn}{note}</figure>\n'


def _about(name: str) -> _About:
    """How a quantity is drawn; one of a recipe's own by its name."""
    return _ABOUT.get(name) or _About(words(name.removeprefix("evaluation/")), noisy=not name.startswith("evaluation/"))


def _label(name: str, several: bool) -> str:
    if not several:
        return ""
    return "validation" if name.startswith("evaluation/") else "training"
