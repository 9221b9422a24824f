"""A config and a machine -> a plan: what `aurora plan` shows, and what a run is pinned to."""

from __future__ import annotations

from aurora_train import files
from aurora_train import run as runs
from aurora_train.config import dump
from aurora_train.machine.memory import budget_bytes
from aurora_train.machine.profile import this_machine
from aurora_train.machine.rates import rates_for
from aurora_train.machine.targets import find_machine
from aurora_train.memory import cache
from aurora_train.memory.plan import Plan
from aurora_train.memory.planner import Planner
from aurora_train.memory.verify import can_compile_for_gpu
from aurora_train.train.rehearsal import Rehearsal, rehearse
from aurora_train.units import size


def plan_config(
    config, recipe, *, machine: str | None = None, budget: int | None = None, verify: bool = True, progress=None
) -> Plan:
    """The fastest plan that fits `machine` (a name of `machine.targets`), or this machine where None.

    Args:
        budget: bytes on one device; else `memory.budget` of the config, else what the machine allows.
        verify: compile what is chosen. For an absent GPU that needs the extra `[plan]`; without it the plan is
            simulated and says so.

    Raises:
        UserError: nothing fits, or the machine is not known.
    """
    progress = progress or (lambda *_: None)
    if machine is None:
        return planner_here(config, recipe, budget=budget, verify=verify, progress=progress).run()
    target = find_machine(machine)
    limit, reason = _limit(config, budget, target)
    if not can_compile_for_gpu():
        verify = False
    rates = rates_for(target)
    key = cache.key_of({
        "config": dump(config), "recipe": config.recipe_sha256, "code": runs.code_hash(), "versions": runs.versions(),
        "target": target.config_text, "budget": limit, "rates": rates, "verify": verify,
    })  # fmt: skip
    plan = cache.load(key)
    if plan is None:
        program = rehearse(config, recipe, target=target, progress=progress)
        plan = Planner(program, limit, reason, target.slug, rates, verify, progress=progress).run()
        cache.store(key, plan)
    return plan


def planner_here(
    config, recipe, *, program: Rehearsal | None = None, budget=None, verify=True, progress=None, compiled_later=False
) -> Planner:
    """The planner for this machine's own devices."""
    program = program or rehearse(config, recipe, progress=progress)
    machine = this_machine()
    limit, reason = budget_bytes(config.memory.budget, machine)
    if budget is not None:
        limit, reason = budget, f"--budget {size(budget)}"
    return Planner(
        program, limit, reason, machine.device_kind, rates_for(machine), verify, progress, compiled_later
    )


def _limit(config, budget: int | None, target) -> tuple[int, str]:
    if budget is not None:
        return budget, f"--budget {size(budget)}"
    if config.memory.budget != "auto":
        from aurora_train.config import parse_bytes

        return parse_bytes(config.memory.budget), f"memory.budget: {config.memory.budget}"
    return target.budget_bytes, target.budget_reason


def pinned_plan(run, config, mesh) -> Plan | None:
    """The plan that a run was pinned to; None for a new run, or where the device, mesh or `memory` section changed."""
    known = files.read_json(run.plan)
    if not known or known["mesh"] != dict(mesh.shape) or known["device"] != device_kind(mesh):
        return None
    return Plan.from_json(known["plan"]) if known.get("asked") == asked(config) else None


def asked(config) -> dict:
    """What of a config decides the plan and may change within a run."""
    return config.memory.model_dump(mode="json", exclude={"on_oom", "guard"})


def device_kind(mesh) -> str:
    """What JAX calls the devices of a mesh."""
    return mesh.devices.flat[0].device_kind

