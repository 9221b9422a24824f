"""Curves as HTML: an SVG whose lines are stretched over whatever width there is, and ticks as texts beside it.

No text is scaled with the drawing, so that a chart is readable on a telephone and on a wall; its colours are the page's
variables, light or dark. A point has a place of one in ten thousand of the width and of the height. matplotlib would
take 45 ms for what takes one or two here, which a page that is drawn anew every two seconds cannot wait for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from aurora_train.tools.markup import escape
from aurora_train.units import count

COLOURS = ("--main", "--second", *(f"--series-{number}" for number in range(3, 9)))  # variables of the page
POINTS = 500  # a curve of more points is drawn as means over equal spans of steps
_SIDE = 1000  # of the drawing, in its own units
_LARGEST = 1e100  # whatever is larger is not drawn, nor what is smaller than its inverse on a logarithmic axis
_MARKED = 40  # a line of at most this many points shows each of them

CSS = """
.chart { position: relative; height: 12.5rem; margin: .4rem .6rem 1.5rem 3.6rem; border-bottom: 1px solid var(--line); }
.wide > .chart { height: 17rem; }
.chart svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.chart path { fill: none; stroke-width: 1.6; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .band { stroke: none; opacity: .16; }
.chart .raw { stroke: var(--faint); stroke-width: 1; }
.chart .points { stroke-width: 6; stroke-linecap: round; }
.chart .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
.chart i { position: absolute; font-style: normal; font-size: .75rem; line-height: 1; color: var(--soft);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.chart .y { right: 100%; margin-right: .45rem; transform: translateY(-50%); }
.chart .x { top: 100%; margin-top: .4rem; transform: translateX(-50%); }
.chart .x.last { transform: translateX(-100%); }
figcaption { font-size: .88rem; font-weight: 600; display: flex; flex-wrap: wrap; gap: 0 .9rem; align-items: baseline; }
figcaption small { font-weight: 400; color: var(--soft); overflow-wrap: anywhere; }
figcaption .key::before { content: ""; display: inline-block; width: 1rem; height: 0; margin: 0 .35rem .25rem 0;
  border-top: .18rem var(--dash, solid) var(--colour); }
"""


@dataclass(frozen=True)
class Line:
    """A line of a chart: x ascending and y, float64[N] each; values that are not finite leave a gap.

    Attributes:
        label: what it is called below the title; "" for a line that has no name of its own.
        band: (lowest, highest), float64[N] each: drawn faintly around the line.
        raw: y before it was smoothed, drawn faintly under the line.
        colour: its place in `COLOURS`; None: its place among the lines. Past the last one, lines are dashed.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None = None
    raw: np.ndarray | None = None
    colour: int | None = None


@dataclass(frozen=True)
class Axes:
    """How the axes of a chart are drawn. `form` writes a value of y, such as bytes."""

    xlabel: str = "step"
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    form: Callable[[float], str] | None = None
    form_x: Callable[[float], str] | None = None


def chart(
    title: str, lines: Sequence[Line], axes: Axes = Axes(), marks: Sequence[tuple[float, str]] = (), *,
    named: bool = True,
) -> str:  # fmt: skip
    """The inside of a <figure>: a caption, with the lines' names if `named`, and the chart. `marks` are (x, what was
    there)."""
    across = _Scale.of([line.x for line in lines], axes.log_x)
    up = _Scale.of([values for line in lines for values in (line.y, line.raw) if values is not None],
                   axes.log_y, from_zero=axes.from_zero, room=0.04)  # fmt: skip
    labels = [line.label for line in lines if line.label]
    keys = "".join(_key(line, place) for place, line in enumerate(lines)) if named and len(lines) > 1 else ""
    caption = f"<figcaption>{escape(title)} <small>{keys}</small></figcaption>"
    if across is None or up is None:
        return caption + '<div class="chart"><i class="x" style="left:50%;top:45%">nothing to draw yet</i></div>\n'
    grid = "".join(f"M0,{_SIDE - up.at(tick):.0f}h{_SIDE}" for tick in up.ticks)
    drawn = "".join(_drawn(line, place, across, up) for place, line in enumerate(lines))
    drawn += "".join(f'<path class="mark" d="M{across.at(x):.1f},0v{_SIDE}"><title>{escape(said)}</title></path>'
                     for x, said in marks if across.low <= x <= across.high)  # fmt: skip
    said = escape(f"{title} by {axes.xlabel}" + (f": {', '.join(labels)}" if labels else ""))
    data = (f'data-x="{across.low!r} {across.high!r} {int(across.log)}" data-y="{up.low!r} {up.high!r} {int(up.log)}" '
            f'data-unit="{escape(axes.xlabel)}"')  # fmt: skip
    drawn = f'<path class="grid" d="{grid}"/>{drawn}'
    return (f'{caption}<div class="chart" role="img" aria-label="{said}" {data}>'
            f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none">{drawn}</svg>'
            f'{_texts(across, up, axes)}</div>\n')  # fmt: skip


def curve(
    series: list[tuple[str, np.ndarray, np.ndarray]], ylabel: str, *, xlabel: str = "step", smooth: bool = False,
    from_zero: bool = False,
) -> str:  # fmt: skip
    """`chart` of (label, x, y): at most `POINTS` points a line; `smooth` draws the first one under its average."""
    lines = []
    for index, (label, x, y) in enumerate(series):
        x, y = thin(x, y)
        if index == 0 and smooth and len(y) > 20:
            lines.append(Line(label, x, running_mean(y, max(len(y) // 40, 2)), raw=y))
        else:
            lines.append(Line(label, x, y))
    return chart(ylabel, lines, Axes(xlabel, from_zero=from_zero))


def spark(values: np.ndarray, description: str) -> str:
    """A line of the size of a word, without axes. float64[N]."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return ""
    scale = _Scale.of([values], False, room=0.08)
    points = " ".join(f"{x:.1f},{24 - up * 24 / _SIDE:.1f}"
                      for x, up in zip(np.linspace(0, 100, len(values)), scale.at(values), strict=True))  # fmt: skip
    return (f'<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(description)}"><polyline points="{points}"/></svg>')  # fmt: skip


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` points: means of the finite values over equal runs of records. The last point is kept."""
    if len(steps) <= POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), POINTS, dtype=int)
    pairs = list(zip(edges[:-1], edges[1:], strict=True))
    x = np.array([steps[a:b].mean() for a, b in pairs])
    finite = [values[a:b][np.isfinite(values[a:b])] for a, b in pairs]
    y = np.array([part.mean() if len(part) else np.nan for part in finite])
    return np.append(x, steps[-1]), np.append(y, values[-1])


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the finite values within `width` / 2 records on either side; NaN where there is none."""
    finite, window = np.isfinite(values), np.ones(2 * (width // 2) + 1)
    number = np.convolve(finite, window, "same")
    return np.convolve(np.where(finite, values, 0.0), window, "same") / np.where(number > 0, number, np.nan)


# ---- scales


@dataclass(frozen=True)
class _Scale:
    """From values to places in the drawing: 0 at `low`, `_SIDE` at `high`."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[np.ndarray], log: bool, *, from_zero: bool = False, room: float = 0.0):
        """The scale with a place for all finite values, or all above zero on a logarithmic one; None without any."""
        known = np.concatenate([np.asarray(one, float) for one in values]) if values else np.empty(0)
        known = known[(known > 1 / _LARGEST if log else known > -_LARGEST) & (known < _LARGEST)]
        if not len(known):
            return None
        low, high = float(known.min()), float(known.max())
        if log:
            room = 10 ** (room * math.log10(high / low)) if high > low else 1.25
            return cls(low / room, high * room, True, _ticks_of_log(low / room, high * room))
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        span = (high - low) or abs(high) * 0.1 or 1.0
        low = low if from_zero and low == 0 else low - room * span
        high = high + room * span
        if not low < high:
            low, high = low - span / 2, high + span / 2
        return cls(low, high, False, _ticks(low, high))

    def at(self, values):
        """Places of values, a number or float64[N]; NaN for those without one."""
        if not self.log:
            return (values - self.low) / (self.high - self.low) * _SIDE
        with np.errstate(invalid="ignore", divide="ignore"):
            places = np.log(np.asarray(values, float) / self.low) / math.log(self.high / self.low) * _SIDE
        return np.where(np.isfinite(places), places, np.nan)


def _ticks(low: float, high: float) -> tuple[float, ...]:
    """Four to eight round numbers within bounds."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    size *= next(step for step in (1, 2, 2.5, 5, 10) if step * size >= rough)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return tuple(number * size for number in range(first, last + 1))


def _ticks_of_log(low: float, high: float) -> tuple[float, ...]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 8:
        every = math.ceil((last - first) / 6)
        return tuple(10.0**power for power in range(first, last + 1, every) if low <= 10.0**power <= high)
    found = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
    found = [tick for tick in found if low <= tick <= high]
    if len(found) > 9:
        found = [tick for tick in found if round(math.log10(tick), 9).is_integer()]
    return tuple(found) if len(found) > 2 else _ticks(low, high)


def _written(scale: _Scale, form: Callable[[float], str] | None) -> list[str]:
    ticks = scale.ticks
    if form is not None or not ticks:
        return [form(tick) for tick in ticks]
    if scale.log and ticks[-1] >= 5 * ticks[0]:
        return [count(tick) if tick >= 1e4 else f"{tick:.3g}" for tick in ticks]
    largest, apart = max(map(abs, ticks)), min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=1.0)
    if largest >= 1e4:
        return [count(float(f"{tick:.10g}")) for tick in ticks]
    if largest < 1e-4 or any(tick and abs(tick) < 1e-4 * largest for tick in ticks):
        return [f"{tick:.3g}" for tick in ticks]
    decimals = min(max(0, -math.floor(math.log10(apart) + 1e-9)), 6)
    if any(round(tick, decimals) != round(tick, 9) for tick in ticks):  # steps of 2.5
        decimals += 1
    return [f"{tick:.{decimals}f}" for tick in ticks]


def _texts(across: _Scale, up: _Scale, axes: Axes) -> str:
    parts = [f'<i class="y" style="top:{100 - up.at(tick) * 100 / _SIDE:.2f}%">{escape(text)}</i>'
             for tick, text in zip(up.ticks, _written(up, axes.form), strict=True)]  # fmt: skip
    shown = [(float(across.at(tick)) * 100 / _SIDE, text)
             for tick, text in zip(across.ticks, _written(across, axes.form_x), strict=True)]  # fmt: skip
    parts += [f'<i class="x" style="left:{place:.2f}%">{escape(text)}</i>' for place, text in shown if place < 88]
    parts.append(f'<i class="x last" style="left:100%">{escape(axes.xlabel)}</i>')
    return "".join(parts)


# ---- lines


def _look(line: Line, place: int) -> tuple[str, bool]:
    """(its colour, whether it is dashed)."""
    number = place if line.colour is None else line.colour
    return f"var({COLOURS[number % len(COLOURS)]})", number // len(COLOURS) % 2 == 1


def _key(line: Line, place: int) -> str:
    colour, dashed = _look(line, place)
    style = f"--colour:{colour}" + (";--dash:dashed" if dashed else "")
    return f'<span class="key" style="{style}">{escape(line.label)}</span> '


def _drawn(line: Line, place: int, across: _Scale, up: _Scale) -> str:
    colour, dashed = _look(line, place)
    x, parts = across.at(line.x), []
    if line.band is not None:
        low, high = (np.clip(_SIDE - up.at(values), 0, _SIDE) for values in line.band)
        parts.append(f'<path class="band" style="fill:{colour}" d="{_area(x, low, high)}"/>')
    if line.raw is not None:
        parts.append(f'<path class="raw" d="{_path(x, _SIDE - up.at(line.raw))}"/>')
    y = _SIDE - up.at(line.y)
    style = f"stroke:{colour}" + (";stroke-dasharray:6 4" if dashed else "")
    parts.append(f'<path class="line" data-name="{escape(line.label)}" style="{style}" d="{_path(x, y)}"/>')
    if len(x) <= _MARKED and line.raw is None:
        dots = "".join(f"M{a:.1f},{b:.1f}h0" for a, b in zip(x, y, strict=True) if np.isfinite(b))
        parts.append(f'<path class="points" style="stroke:{colour}" d="{dots}"/>')
    return "".join(parts)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """The points that have a place, joined where they are neighbours."""
    parts, joined = [], False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        sound = math.isfinite(a) and math.isfinite(b)
        if sound:
            parts.append(f"{'L' if joined else 'M'}{a:.1f},{b:.1f}")
        joined = sound
    return "".join(parts)


def _area(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    sound = np.isfinite(low) & np.isfinite(high) & np.isfinite(x)
    x, low, high = x[sound], low[sound], high[sound]
    if not len(x):
        return ""
    points = [*zip(x.tolist(), high.tolist(), strict=True), *zip(x[::-1].tolist(), low[::-1].tolist(), strict=True)]
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in points) + "Z"
