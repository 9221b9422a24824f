"""Handles an out-of-memory error in a run: what was live beside the plan, and a smaller plan to continue with.

A step that is refused memory leaves no state: its buffers were donated before it failed, and with asynchronous
execution the error appears only when a later step's numbers are read. So nothing is repaired in place: the state is
released, and the run continues from its newest checkpoint, as a resume does, under a plan that needs less memory.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax

from aurora_train.errors import UserError
from aurora_train.machine.gauge import live_bytes
from aurora_train.plan.plan import Plan
from aurora_train.plan.report import by_cause
from aurora_train.train.planning import planner_here
from aurora_train.units import size

REPLANS = 3  # in a row without a finished step; after that, the plan is not the cause
_SIGNS = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")  # XLA's own status, and CUDA's if XLA passes it on
_SHOWN = 4  # causes in a message


@dataclass(frozen=True)
class Fault:
    """An out-of-memory error as plain data: the activity, the allocator's message, and the bytes live at that moment.

    `live`: {"in_use", "peak", "limit"} of the fullest device, or {"anonymous"} of the process if devices do not report
    theirs. `finished_steps`: steps that this process had logged.
    """

    doing: str
    cause: str
    live: dict[str, int]
    finished_steps: int = 0


class OutOfMemory(Exception):
    """Memory ran out and a smaller plan may help. Keep only `fault`: the traceback keeps the lost state alive."""

    def __init__(self, fault: Fault):
        super().__init__(f"out of memory in {fault.doing}: {fault.cause}")
        self.fault = fault


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports a refused allocation, on the host or on a device."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextlib.contextmanager
def noticed(doing: Callable[[], str], finished_steps: Callable[[], int] = lambda: 0):
    """In this context, an out-of-memory error becomes `OutOfMemory`; every other error passes."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cause = str(error).strip().splitlines() or ["an allocation in Python was refused"]
        raise OutOfMemory(Fault(doing(), cause[0], live_bytes(), finished_steps())) from None


@contextlib.contextmanager
def refused(doing: str, hint: str):
    """In this context, an out-of-memory error becomes a UserError, because no other plan would help."""
    try:
        with noticed(lambda: doing):
            yield
    except OutOfMemory as error:
        raise UserError(
            f"out of memory while {doing}", where="memory", why="\n  ".join(fault_lines(error.fault, None)), hint=hint
        ) from None


def fault_lines(fault: Fault, plan: Plan | None) -> list[str]:
    """What was live beside the plan's estimate, one fact per line."""
    lines = [fault.cause]
    if plan is not None:
        known = (("compiled", plan.compiled_bytes), ("predicted", plan.predicted_bytes), ("budget", plan.budget_bytes))
        lines.append("the plan: " + ", ".join(f"{name} {size(held)}" for name, held in known if held))
    if "anonymous" in fault.live:
        lines.append(f"live: {size(fault.live['anonymous'])} of this process's own, Python and data included")
    else:
        lines.append("live on the fullest device: " + ", ".join(f"{_name(k)} {size(v)}" for k, v in fault.live.items()))
    causes = by_cause(plan.details.get("by_cause") or {}) if plan is not None else []
    biggest = sorted(causes, key=lambda cause: -cause[2])[:_SHOWN]
    if biggest:
        lines.append("most of the plan: " + ", ".join(f"{name} {size(held)}" for _, name, held in biggest))
    return lines


def _name(key: str) -> str:
    return key.replace("_", " ")


# ---- the next attempt


def replanned(session, fault: Fault, in_a_row: int, progress):
    """The session of the next attempt: the same run, data and maths under a plan that needs clearly less memory.

    Args:
        in_a_row: out-of-memory errors without a finished step between them, including this one.
        progress: a `record.progress.preparation`, which reports the error and each compilation.

    Raises:
        UserError: `memory.on_oom: stop`, three replans in a row did not help, or no smaller plan is left.
    """
    plan, memory, folder = session.plan, session.config.memory, session.run.folder
    if memory.on_oom == "stop":
        hint = f"aurora resume {folder} memory.on_oom=replan continues with a smaller plan"
        raise _refusal(session, fault, "memory.on_oom is stop", f"{hint}{_or_levers(plan)}")
    if in_a_row > REPLANS:
        hint = f"free memory that other programs hold, then: aurora resume {folder} --replan{_or_levers(plan)}"
        raise _refusal(session, fault, f"{REPLANS} smaller plans in a row did not finish one step", hint)
    if memory.save != "auto" or memory.unroll != "auto":
        hint = f"aurora resume {folder} memory.save=auto memory.unroll=auto{_or_levers(plan)}"
        raise _refusal(session, fault, "memory.save or memory.unroll is set, and a setting is never overridden", hint)
    progress.event(f"out of memory in {fault.doing}\n  " + "\n  ".join(fault_lines(fault, plan)))
    smaller = _smaller(session, progress)
    if smaller is None:
        hint = f"free memory that other programs hold, then: aurora resume {folder} --replan{_or_levers(plan)}"
        raise _refusal(session, fault, "no plan needs clearly less than this one", hint)
    return session.under(smaller, reason="out of memory", fault=fault)


def _smaller(session, progress) -> Plan | None:
    plan = session.plan
    session.program.forget()  # compiled programs hold memory themselves
    gc.collect()
    hint = "free memory that other programs hold, then run the same command again"
    with refused("a smaller plan was searched for", hint):
        planner = planner_here(session.config, session.recipe, program=session.program, progress=progress)
        if not (plan.compiled_bytes or plan.predicted_bytes):
            plan = replace(plan, predicted_bytes=planner.estimated(plan).bytes)
        return planner.smaller(plan)


def _refusal(session, fault: Fault, rule: str, hint: str) -> UserError:
    why = "\n  ".join([*fault_lines(fault, session.plan), rule])
    return UserError(f"out of memory in {fault.doing}", where=str(session.run.folder), why=why, hint=hint)


def _or_levers(plan: Plan) -> str:
    """The settings that would save the most. They change what is trained, so they need another run."""
    levers = [f"{one['setting']} saves {size(one['saves_bytes'])}" for one in (plan.details.get("levers") or [])[:2]]
    return f"\n  or start a new run that needs less: {'; '.join(levers)}" if levers else ""
