"""The plan of a step that the planner cannot read: all is recomputed, and the compiler says whether it fits.

The planner counts what the backward pass keeps from a jaxpr, and a model may hold an equation that it has no rule for,
or jax may describe one in another way from one release to the next. That costs speed, never a run.
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path

from aurora_train.memory import account
from aurora_train.memory.plan import Plan


def plan_unread(planner, pairs: list[tuple[int, int]], error: Exception) -> Plan:
    """The plan of largest microbatches that fits, once compiled; the smallest where nothing is to be compiled.

    Args:
        pairs: (microbatch, accumulation), largest first.
        error: what ended the search. One that the model itself raises comes up here again, as it is.

    Raises:
        UserError: not even the smallest fits.
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
    """(the plan, its bytes): at most three are compiled, the last of them the smallest."""
    held = sum(account.arguments(planner.program, planner.program.blueprint(plans[-1])).values())
    place = 0
    for turn in range(3):
        plan = plans[place]
        needed = planner.compile(plan)
        if needed <= planner.budget:
            return plan, needed
        # What is not an argument shrinks about as the microbatch does.
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
