"""Plans a step that the planner cannot read: everything is recomputed, and the compiler decides whether it fits.

The planner reads from a jaxpr what the backward pass keeps. A model may contain an equation that it has no rule for,
or a new release of jax may describe one differently. Such a run is slower, but it runs.
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path

from aurora_train.plan import account
from aurora_train.plan.plan import Plan


def plan_unreadable(planner, pairs: list[tuple[int, int]], error: Exception) -> Plan:
    """The plan with the largest microbatches that fits when compiled; the smallest if nothing may be compiled.

    Args:
        pairs: (microbatch, accumulation), largest first.
        error: what ended the search. An error that the model itself raises is raised here again, unchanged.

    Raises:
        UserError: not even the smallest plan fits.
    """
    program, asked = planner.program, planner.program.asked_plan()
    cuts = asked.stacks if planner.is_fixed else {path: _recomputed(cut) for path, cut in asked.stacks.items()}
    plans = [Plan(microbatch, parts, cuts) for microbatch, parts in pairs]
    needed = None
    if planner.verify:
        plan, needed = _compiled(planner, plans)
    else:
        plan = plans[-1]
        program.trace(plan)
    return replace(
        plan, machine=planner.machine, platform=program.platform, budget_bytes=planner.budget, compiled_bytes=needed,
        reason=f"planned without an estimate; {planner.budget_reason}",
        details=account.standing(planner, plan) | {"unread": _named(error)},
    )  # fmt: skip


def _recomputed(cut) -> list:
    return [segment._replace(save=(), unroll=False) for segment in cut]


def _compiled(planner, plans: list[Plan]) -> tuple[Plan, int]:
    """(the plan, its bytes): compiles at most three, the last of which is the smallest."""
    held = sum(account.arguments(planner.program, planner.program.blueprint(plans[-1])).values())
    place = 0
    for turn in range(3):
        plan = plans[place]
        needed = planner.compile(plan)
        if needed <= planner.budget:
            return plan, needed
        # Everything but the arguments shrinks roughly in proportion to the microbatch.
        room = max(planner.budget - held, 0) / max(needed - held, 1) * plan.microbatch
        smaller = [i for i, p in enumerate(plans) if i > place and p.microbatch <= room]
        place = smaller[0] if smaller and turn == 0 else len(plans) - 1
        if plan is plans[place]:
            break
    planner.refuse_misfit(None, needed)


def _named(error: Exception) -> str:
    """What could not be read, and where: `scan` (KeyError: 'num_consts', program.py:70)."""
    equation, place = None, ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        equation, file = frame.f_locals.get("equation", equation), Path(frame.f_code.co_filename)
        place = f", {file.name}:{line}" if file.parent == Path(__file__).parent else place
    where = " ".join(f"{type(error).__name__}: {error}".split())[:120] + place
    return f"`{equation.primitive.name}` ({where})" if hasattr(equation, "primitive") else f"this step ({where})"
