"""matplotlib drawings as SVG files of their own, dark on white: most viewers know neither CSS variables nor themes.

The curves of a page are drawn by `chart`.
"""

from __future__ import annotations

import io
import re
from html import escape

INK, GRID, MAIN, SECOND = "#1b1f24", "#dfe3e8", "#0b6bcb", "#c2410c"


def drawing(width: float, height: float):
    """(figure, axes) of one style; inches at 72 dots. Its margins follow what is written in them."""
    # Figure without pyplot: no window system, no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10, "font.family": "sans-serif"}):
        figure = Figure(figsize=(width, height), layout="constrained")
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


def svg_file(figure, name: str, description: str) -> str:
    """The figure as the text of a file; `name` makes its ids its own."""
    from matplotlib import rc_context

    figure.set_facecolor("white")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=False, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
