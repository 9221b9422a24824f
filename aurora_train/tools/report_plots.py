"""The report's figures: matplotlib drawings as inline SVG that take their colours from the page, light or dark.

They are drawn in placeholder colours, which CSS variables then replace, so that one drawing serves both themes.
"""

from __future__ import annotations

import io
import math
import re
from html import escape

import numpy as np

from aurora_train.units import count

INK, GRID, MAIN, SECOND, FAINT = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = (MAIN, SECOND, "#060606", "#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b")
_CSS = {INK: "var(--ink)", GRID: "var(--line)", FAINT: "var(--faint)", MAIN: "var(--main)", SECOND: "var(--second)"}
_CSS |= {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES[2:], 3)}
_ON_PAPER = {INK: "#1b1f24", GRID: "#dfe3e8", FAINT: "#b9c6d4", MAIN: "#0b6bcb", SECOND: "#c2410c"}
_POINTS = 500  # a curve of more points is drawn as means over equal spans of steps


def curve(
    name: str,
    series: list[tuple[str, np.ndarray, np.ndarray]],
    ylabel: str,
    *,
    xlabel: str = "step",
    smooth: bool = False,
    wide: bool = False,
    from_zero: bool = False,
) -> str:
    """Lines over steps: `series` has (label, steps, values). `smooth` draws the first one faintly under its average."""
    width, height = (10.0, 3.6) if wide else (5.6, 2.8)
    figure, axes = drawing(width, height, fitted=False)
    # Room for ticks of seven characters and for both labels. To fit it to them would draw everything twice.
    figure.subplots_adjust(left=0.9 / width, right=1 - 0.15 / width, bottom=0.55 / height, top=1 - 0.12 / height)
    for index, (label, steps, values) in enumerate(series):
        steps, values = thin(steps, values)
        if index == 0 and smooth and len(values) > 20:
            axes.plot(steps, values, color=FAINT, linewidth=1)
            values = running_mean(values, max(len(values) // 40, 2))
        style = {"color": SERIES[index % len(SERIES)], "linestyle": "-" if index < len(SERIES) else "--"}
        marker = "o" if len(steps) <= 40 and (index or not smooth) else None
        axes.plot(steps, values, linewidth=1.6, marker=marker, markersize=4, label=label, **style)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=INK)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.yaxis.set_major_formatter(_tick)
    axes.margins(x=0.01)
    if from_zero:
        axes.set_ylim(bottom=0)
    return inline_svg(figure, name, f"{ylabel} by {xlabel}")


def bars(name: str, rows: list[tuple[str, float, bool]], label: str) -> str:
    """Horizontal bars for (name, value, whether it is this run's), top to bottom, labelled with their values."""
    figure, axes = drawing(5.6, 0.6 + 0.36 * len(rows))
    values = [value for _, value, _ in rows]
    places, digits = range(len(rows)), decimals(values)
    axes.barh(places, values, color=[MAIN if ours else FAINT for *_, ours in rows], height=0.68)
    low, high = min([0.0, *values]), max([0.0, *values])
    for place, value in enumerate(values):
        axes.text(max(value, 0.0) + 0.01 * (high - low), place, f"{value:.{digits}f}", va="center", color=INK)
    axes.set_yticks(places, [text for text, *_ in rows])
    axes.invert_yaxis()
    axes.set_xlim(low * 1.05, high + 0.14 * (high - low) or 1.0)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="both", length=0)
    axes.set_xticks([])
    axes.set_title(label, loc="left", color=INK, fontsize=10)
    return inline_svg(figure, name, label)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_POINTS` points: means of the finite values over equal runs of records. The last point is kept."""
    if len(steps) <= _POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), _POINTS, dtype=int)
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


def decimals(values: list[float]) -> int:
    """Decimals that give the largest of `values` four figures, so that a column of them lines up."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return min(max(3 - math.floor(math.log10(largest)), 0), 8) if largest else 3


def _tick(value: float, _position) -> str:
    return count(value) if abs(value) >= 1e4 else f"{value:.4g}"


def drawing(width: float, height: float, *, fitted: bool = True):
    """(figure, axes) of the report's style; inches at 72 dots. `fitted`: its margins follow what is written in them."""
    # Figure without pyplot: no window system, no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10, "font.family": "sans-serif"}):
        figure = Figure(figsize=(width, height), layout="constrained" if fitted else None)
        axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, color=GRID)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def inline_svg(figure, name: str, description: str) -> str:
    """The figure as an <svg> element of a page: ids are prefixed with `name`, metadata and fixed size removed."""
    svg = _drawn(figure, name, description)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#([^")]+)', rf"\1#{name}-\2", svg)
    svg = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", svg, count=1)
    svg = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", svg, count=1)
    for stand_in, variable in _CSS.items():
        svg = svg.replace(stand_in, variable)
    return svg


def svg_file(figure, name: str, description: str) -> str:
    """The figure as a separate file, dark on white: most viewers support neither CSS variables nor themes."""
    figure.set_facecolor("white")
    svg = _drawn(figure, name, description, transparent=False)
    for stand_in, colour in _ON_PAPER.items():
        svg = svg.replace(stand_in, colour)
    return svg


def _drawn(figure, name: str, description: str, *, transparent: bool = True) -> str:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
