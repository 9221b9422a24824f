"""A plan in two pictures: what holds the memory through one step, and what less memory would cost in recomputation.

Drawn from `Plan.details` alone, in the style of the run report, which shows the first of them. Bytes are per device.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from aurora_train.errors import UserError
from aurora_train.files import write_atomically
from aurora_train.memory.report import CAUSES, amount, machine_name
from aurora_train.tools.report_plots import FAINT, INK, MAIN, SECOND, drawing, svg_file
from aurora_train.units import count

if TYPE_CHECKING:
    from aurora_train.memory.plan import Plan

# Paul Tol's bright scheme with orange and dark blue: safe for colour-blind readers, and on light and dark paper.
_COLOURS = dict(
    zip(
        CAUSES, ("#4477aa", "#225588", "#aa3377", "#ee8866", "#66ccee", "#ccbb44", "#ee6677", "#bbbbbb"), strict=True
    )
)
_LINES = (MAIN, "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#bbbbbb")
_FAR = 2.5  # a budget beyond this multiple of the peak is stated in words: drawn, it would flatten the bars
_UPRIGHT = 9  # more phases than this do not fit under their bars as written; they are turned


def timeline_svg(plan: Plan, path: str | Path) -> Path:
    """Draw the bytes by cause over the phases of one step; UserError where the plan does not hold them."""
    figure = timeline_figure(plan.details, plan.budget_bytes, plan.machine)
    return _write(figure, path, "timeline", "memory over one step by cause", "--timeline")


def pareto_svg(plan: Plan, path: str | Path) -> Path:
    """Draw memory against recomputation, a curve for each microbatch; UserError where nothing was compared."""
    figure = pareto_figure(plan.details, plan.budget_bytes, plan.machine)
    return _write(figure, path, "pareto", "memory against recomputation", "--pareto")


def _write(figure, path, name: str, description: str, option: str) -> Path:
    if figure is None:
        raise UserError(
            f"this plan has nothing to draw as {description}",
            where=option,
            why="it holds what the config asked for, or its model has no stack of layers to choose for",
        )
    path = Path(path)
    write_atomically(path, svg_file(figure, name, description))
    return path


def timeline_figure(details: dict, budget_bytes: int | None, machine: str = ""):
    """A matplotlib Figure of stacked bars, one for each phase in order; None where there is no timeline."""
    phases = [phase for phase in details.get("timeline") or [] if phase.get("bytes")]
    if not phases:
        return None
    sums = [sum(phase["bytes"].values()) for phase in phases]
    peak, places = max(sums), range(len(phases))
    figure, axes = drawing(10.0, 4.2)
    below = [0.0] * len(phases)
    extra = [name for name in dict.fromkeys(n for p in phases for n in p["bytes"]) if name not in CAUSES]
    for name in (*CAUSES, *extra):
        heights = [phase["bytes"].get(name) or 0 for phase in phases]
        if any(heights):
            colour = _COLOURS.get(name, FAINT)
            axes.bar(places, heights, bottom=below, color=colour, width=0.82, label=CAUSES.get(name, name))
            below = [a + b for a, b in zip(below, heights, strict=True)]
    highest = sums.index(peak)
    axes.annotate(
        amount(peak), (highest, peak), xytext=(0, 3), textcoords="offset points", ha="center", color=INK,
        fontweight="bold",
    )
    names = [phase.get("phase", "") for phase in phases]
    if len(names) > _UPRIGHT:
        axes.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor")
    else:
        width = max(96 // len(names), 8)
        axes.set_xticks(places, ["\n".join(textwrap.wrap(name, width)) for name in names])
    axes.tick_params(axis="x", length=0)
    _budget(axes, budget_bytes, peak, machine, "One step")
    _bytes_axis(axes, "bytes")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return figure


def pareto_figure(details: dict, budget_bytes: int | None, machine: str = ""):
    """A matplotlib Figure: bytes over seconds a step where known, else over recomputed FLOPs; None without points."""
    points = [p for p in details.get("pareto") or [] if p.get("bytes") is not None]
    known = "seconds" if all(p.get("seconds") is not None for p in points) else "recompute_flops"
    points = [p for p in points if p.get(known) is not None]
    if not points:
        return None
    figure, axes = drawing(7.6, 4.2)
    microbatches = sorted({p["microbatch"] for p in points})
    for number, microbatch in enumerate(microbatches):
        curve = sorted((p[known], p["bytes"]) for p in points if p["microbatch"] == microbatch)
        x, y = zip(*curve, strict=True)
        axes.plot(
            x, y, color=_LINES[number % len(_LINES)], linewidth=1.4, marker="o", markersize=3.5,
            linestyle=("-", "--", ":")[number // len(_LINES) % 3], label=f"microbatch {microbatch}",
        )
    chosen = [p for p in points if p.get("chosen")]
    if chosen:
        axes.plot(
            [p[known] for p in chosen], [p["bytes"] for p in chosen], linestyle="none", marker="o", markersize=11,
            markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.8, label="this plan",
        )
    _budget(axes, budget_bytes, max(p["bytes"] for p in points), machine, "What could be had")
    _bytes_axis(axes, "bytes at the peak")
    axes.set_xlabel("seconds a step" if known == "seconds" else "FLOPs recomputed a step")
    if known == "recompute_flops":
        axes.xaxis.set_major_formatter(lambda value, _position: count(value))
    axes.margins(x=0.06)
    axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _budget(axes, budget_bytes: int | None, highest: float, machine: str, title: str) -> None:
    """The budget as a line with its figure; the vertical axis from zero to a little above what is drawn."""
    on = f" on {machine_name(machine)}" if machine else ""
    if budget_bytes and budget_bytes <= _FAR * highest:
        axes.axhline(budget_bytes, color=SECOND, linewidth=1.4, linestyle="--", label=f"budget {amount(budget_bytes)}")
        highest = max(highest, budget_bytes)
    elif budget_bytes:
        on += f"; the budget, {amount(budget_bytes)}, lies far above"
    axes.set_title(title + on, loc="left", color=INK, fontsize=10)
    axes.set_ylim(0, 1.1 * highest)


def _bytes_axis(axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(lambda value, _position: "0" if value == 0 else _round_amount(value))


def _round_amount(value: float) -> str:
    """20e9 -> "20 GB": a tick of few figures needs none after the point."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= divisor:
            return f"{value / divisor:.4g} {unit}"
    return f"{value:.4g} B"
