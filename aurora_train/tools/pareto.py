"""Draws what less memory would cost in recomputation, from `Plan.details` alone. Bytes are per device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aurora_train.errors import UserError
from aurora_train.files import write_atomically
from aurora_train.plan.report import amount, machine_name
from aurora_train.tools.report_plots import INK, MAIN, SECOND, drawing, svg_file
from aurora_train.units import count, size

if TYPE_CHECKING:
    from aurora_train.plan.plan import Plan

# Paul Tol's bright scheme with orange: colour-blind readers can distinguish it, on light and dark backgrounds.
_LINES = (MAIN, "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#bbbbbb")
_FAR = 2.5  # a budget beyond this multiple of the peak is given in words: as a line it would compress the curves


def pareto_svg(plan: Plan, path: str | Path) -> Path:
    """Draw memory against recomputation, one curve per microbatch. UserError if the plan has no alternatives."""
    figure = pareto_figure(plan.details, plan.budget_bytes, plan.machine)
    if figure is None:
        raise UserError(
            "this plan has nothing to draw as memory against recomputation",
            where="--pareto",
            why="it follows from the config without a search, or its model has no stack of layers",
        )
    path = Path(path)
    write_atomically(path, svg_file(figure, "pareto", "memory against recomputation"))
    return path


def pareto_figure(details: dict, budget_bytes: int | None, machine: str = ""):
    """A matplotlib Figure: bytes over seconds per step if known, else over recomputed FLOPs; None without points."""
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
    _budget(axes, budget_bytes, max(p["bytes"] for p in points), machine)
    axes.set_ylabel("bytes at the peak")
    axes.yaxis.set_major_formatter(lambda value, _position: size(value))
    axes.set_xlabel("seconds a step" if known == "seconds" else "FLOPs recomputed a step")
    if known == "recompute_flops":
        axes.xaxis.set_major_formatter(lambda value, _position: count(value))
    axes.margins(x=0.06)
    axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _budget(axes, budget_bytes: int | None, highest: float, machine: str) -> None:
    """Draw the budget as a labelled line, and scale the vertical axis from zero to a little above the highest point."""
    on = f" on {machine_name(machine)}" if machine else ""
    if budget_bytes and budget_bytes <= _FAR * highest:
        axes.axhline(budget_bytes, color=SECOND, linewidth=1.4, linestyle="--", label=f"budget {amount(budget_bytes)}")
        highest = max(highest, budget_bytes)
    elif budget_bytes:
        on += f"; the budget, {amount(budget_bytes)}, lies far above"
    axes.set_title("Possible plans" + on, loc="left", color=INK, fontsize=10)
    axes.set_ylim(0, 1.1 * highest)
