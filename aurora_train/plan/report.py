"""Presents a plan in a line, for the log and for messages; tools/report_plan.py makes the page of `aurora plan`.

Any part of `Plan.details` may be missing, as in a plan that only states what the config asked for. Missing figures are
left out, never guessed. Bytes are per device and decimal (1 GB = 1e9 bytes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aurora_train.machine.table import lookup
from aurora_train.units import count, percent, size, words

if TYPE_CHECKING:
    from aurora_train.plan.plan import Plan

CAUSES = {  # in the order they are shown and stacked
    "parameters": "parameters",
    "frozen": "frozen parameters",
    "optimizer": "optimizer state",
    "average": "moving average",
    "gradients": "gradients",
    "batch": "batch",
    "saved": "saved activations",
    "workspace": "workspace",
}
WORTH_TELLING = 1_000_000_000  # bytes on a CPU


def one_line(plan: Plan) -> str:
    """The line that `aurora train` prints before it compiles."""
    return f"plan: {verdict(plan)}"


def says_something(plan: Plan) -> bool:
    """Whether the plan is worth a line: a small run on a CPU mostly holds the bytes of Python and the compiler."""
    if plan.details.get("unread"):
        return True
    held = [plan.predicted_bytes, plan.compiled_bytes, plan.measured_bytes]
    large = any(one is not None and one >= WORTH_TELLING for one in held)
    return plan.platform != "cpu" or plan.saves_in_place or large


def side_by_side(plan: Plan) -> str:
    """Predicted, compiled and measured bytes in one line, the last two with their difference from the prediction."""
    parts = [f"predicted {amount(plan.predicted_bytes)}" if plan.predicted_bytes else "not predicted"]
    for name, held in (("compiled", plan.compiled_bytes), ("measured", plan.measured_bytes)):
        if name == "measured" and plan.platform == "cpu" and (held or 0) < WORTH_TELLING:
            continue  # this is mostly Python and its libraries
        deviation = difference(held, plan.predicted_bytes)
        parts.append(f"{name} {amount(held)}{f' ({deviation})' if deviation else ''}" if held else f"not {name}")
    exceeded = plan.measured_bytes and plan.compiled_bytes and plan.measured_bytes > plan.compiled_bytes
    if exceeded and plan.platform == "cpu":
        parts[-1] += ", which on a CPU includes saves, evaluations and compiling"
    return f"memory: {', '.join(parts)}"


def verdict(plan: Plan) -> str:
    """Whether the plan fits and what it does, in one sentence without a full stop."""
    held = plan.compiled_bytes or plan.predicted_bytes
    how = "compiled" if plan.compiled_bytes else "predicted, not compiled"
    on = f" on {machine_name(plan.machine)}" if plan.machine else ""
    if held is None:
        start = f"{plan.reason or 'as configured'}; its memory was not predicted"
    elif plan.budget_bytes is None:
        start = f"needs {amount(held)}{on} ({how}); there is no budget to compare it with"
    else:
        fits = "fits" if held <= plan.budget_bytes else "does not fit"
        start = f"{fits}: {amount(held)} of {amount(plan.budget_bytes)}{on} ({how})"
    saves = "saves in place" if plan.saves_in_place else ""
    parts = [start, f"microbatch {plan.microbatch} x accumulation {plan.accumulation}", recomputed(plan), saves]
    return "; ".join(part for part in parts if part)


def recomputed(plan: Plan) -> str:
    """How much of the forward pass is computed twice, in words; "" if that is unknown."""
    if plan.details.get("unread"):
        return f"{_unsearched(plan)}: the planner cannot read {plan.details['unread']}"
    if plan.stacks and all(segment.save is None for cut in plan.stacks.values() for segment in cut):
        return "recomputes nothing"
    time = plan.details.get("time") or {}
    again, whole, steps = time.get("recompute_flops"), time.get("flops"), time.get("steps")
    if again is None:
        again = next((p.get("recompute_flops") for p in plan.details.get("pareto") or [] if p.get("chosen")), None)
    if again is None:
        return ""
    if again == 0:
        return "recomputes nothing"
    if not whole or not steps:
        return f"recomputes {count(again)}FLOP a step"
    # The backward pass of a matrix product is two products of its size, so the forward pass is a third of a step.
    return f"recomputes {percent(again / (whole / steps / 3))} of the forward pass"


def _unsearched(plan: Plan) -> str:
    saves = {segment.save for cut in plan.stacks.values() for segment in cut}
    if saves <= {None}:
        return "recomputes nothing"
    return "recomputes everything" if saves == {()} else "recomputes what memory.save leaves out"


def machine_name(kind: str) -> str:
    """The machine table's name for a device that jax calls `kind`, or `kind` itself if the table has none."""
    known = lookup(kind)
    return known.name if known else kind


def amount(held: float | None) -> str:
    """Bytes: gigabytes with one decimal, smaller amounts in their own unit."""
    return f"{held / 1e9:.1f} GB" if held is not None and held >= 1e9 else size(held)


def difference(held: float | None, predicted: float | None) -> str:
    """How much `held` exceeds the prediction, such as `+1.2 %`; "" if either is unknown."""
    return f"{100 * (held / predicted - 1):+.1f} %" if held and predicted else ""


def by_cause(bytes_of: dict[str, int]) -> list[tuple[str, str, int]]:
    """(cause, its name, bytes) in the order of CAUSES, unknown causes last. Causes without bytes are left out."""
    order = [*CAUSES, *(name for name in bytes_of if name not in CAUSES)]
    return [(name, CAUSES.get(name, words(name)), bytes_of[name]) for name in order if bytes_of.get(name)]
