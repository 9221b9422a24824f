"""Makes a plan from a config and a machine. `aurora plan` shows it, and a run is pinned to it."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax

from aurora_train import facts as kept_facts
from aurora_train import files
from aurora_train import mesh as meshes
from aurora_train import run as runs
from aurora_train.boxes import choice
from aurora_train.boxes.cost import priced, with_links
from aurora_train.config import dump, parse_bytes, removed
from aurora_train.errors import UserError
from aurora_train.machine import processes
from aurora_train.machine.links import Links, links_of
from aurora_train.machine.memory import budget_bytes
from aurora_train.machine.profile import choose_devices, this_machine
from aurora_train.machine.rates import rates_for
from aurora_train.machine.targets import find_machine
from aurora_train.plan import cache
from aurora_train.plan.plan import Plan
from aurora_train.plan.planner import Planner
from aurora_train.plan.verify import can_compile_for_gpu
from aurora_train.train.rehearsal import Rehearsal, rehearse
from aurora_train.units import size


def plan_config(
    config, recipe, *, machine: str | None = None, devices: int | None = None, budget: int | None = None,
    verify: bool = True, progress=None,
) -> Plan:
    """The fastest plan that fits `machine` (a name of `machine.targets`), or this machine if None.

    Args:
        devices: how many of a `machine` there are, over all boxes; by default as many as the axes of the mesh take.
        budget: bytes on one device; by default the config's `memory.budget`, else what the machine allows.
        verify: compile the chosen plan. For an absent GPU that needs the extra `[plan]`; without it the plan is only
            estimated and says so.

    Raises:
        UserError: nothing fits, or the machine is not known.
    """
    progress = progress or (lambda *_: None)
    if machine is None:
        planner = planner_here(config, recipe, budget=budget, verify=verify, progress=progress)
        return priced_here(planner.run(), planner.program)
    target = find_machine(machine)
    if not can_compile_for_gpu():
        verify = False
    rates = rates_for(target)
    key = cache.key_of({
        "config": dump(config), "recipe": config.recipe_sha256, "code": runs.code_hash(), "versions": runs.versions(),
        "target": target.config_text, "budget": (budget, target.budget_bytes), "rates": rates, "verify": verify,
        "devices": devices,
    })  # fmt: skip
    plan = cache.load(key)
    if plan is None:

        def on(shape) -> Rehearsal:
            return rehearse(config, recipe, target=target, sizes=shape, progress=progress)

        def planned(program: Rehearsal, verify: bool = False) -> Plan:
            limit, saves = _limits(config, budget, program, functools.partial(_budget_of, target))
            links = links_of(target.row, program.mesh.devices.size)
            within = with_links(rates, program, links)
            planner = Planner(program, *limit, target.slug, within, verify, progress=progress, **saves)
            return priced(planner.run(), program, links, rates)

        program = _on_so_many(config, on, planned, target, devices)
        try:
            plan = planned(program, verify)
        except jax.errors.JaxRuntimeError as fault:  # a fault of the compiler, which says nothing of the memory
            plan = _uncompiled(planned(program), target.slug, fault)
        cache.store(key, plan)
    return plan


def _on_so_many(config, on, planned, target, devices: int | None) -> Rehearsal:
    """The rehearsal on so many devices of a target, in the mesh that is chosen where the config says `auto`."""
    if devices is None:
        if choice.is_auto(config.mesh):
            raise UserError("for how many devices shall the mesh be chosen?", where="mesh",
                            hint=f"--machine {target.slug} --devices N counts those of all boxes")  # fmt: skip
        return on(None)
    shapes = choice.shapes_of(config.mesh, devices)
    shape, weighed = choice.choose(shapes, on, planned, links_of(target.row, devices))
    program = on(shape)
    program.weighed = weighed
    return program


def in_mesh(config, on, run=None, budget=None) -> Rehearsal:
    """The rehearsal on the devices of all processes: in the config's mesh or, where that says `auto`, in the one with
    which `run` was begun, or that is chosen now. `on(shape)` makes it for a mesh."""
    section = config.mesh
    if not choice.is_auto(section):
        return on((section.data, section.fsdp, section.tensor))
    devices, _ = choose_devices(jax.devices())
    shapes = choice.shapes_of(section, len(devices))

    def decide():
        known = run and files.read_json(run.plan)
        before = choice.kept(section, known, len(devices), devices[0].device_kind) if known else None
        return (before, []) if before else choice.choose(shapes, on, planned, links_here())

    def planned(program: Rehearsal) -> Plan:
        planner = planner_here(config, program.recipe, program=program, budget=budget, verify=False)
        return priced_here(planner.run(), program)

    shape, weighed = processes.agreed(decide)
    program = on(tuple(shape))
    program.weighed = weighed
    return program


def links_here() -> Links:
    """The links between the devices of this run, over all of its processes."""
    devices, machine = len(choose_devices(jax.devices())[0]), this_machine()
    return links_of(machine.known, devices, max(devices // processes.boxes(), 1), machine.device_count)


def priced_here(plan: Plan, program: Rehearsal) -> Plan:
    """A plan for this machine, with what its mesh communicates."""
    if program.mesh.devices.size == 1:
        return plan
    return priced(plan, program, links_here(), rates_for(this_machine()))


def _uncompiled(plan: Plan, machine: str, fault: Exception) -> Plan:
    """The estimated plan of a step that the compiler for `machine` could not compile, which says so."""
    said = " ".join(str(fault).split())[:120]
    why = f"compiling for {machine}: XLA failed ({said}); on the device, autotuning may choose other kernels"
    return replace(plan, details=plan.details | {"not_verified": [why, *plan.details.get("not_verified", [])]})


def plan_here(config, recipe, program: Rehearsal, progress) -> Plan:
    """The plan for a run on this machine, whose step is compiled later. One that free memory cannot change is kept for
    the next start: making it takes a third of the time that a warm start needs."""
    planner = planner_here(config, recipe, program=program, progress=progress, compiled_later=True)
    key = cache.key_of({
        "config": dump(config), "recipe": config.recipe_sha256, "code": runs.code_hash(), "versions": runs.versions(),
        "device": device_kind(program.mesh), "mesh": dict(program.mesh.shape), "rates": planner.rates,
        "shapes": {name: (shape.shape, str(shape.dtype)) for name, shape in program.shapes.items()},
        "facts": kept_facts.sha256(recipe.known),
    })  # fmt: skip
    earlier = cache.load(key)
    plan = earlier and planner.unchanged(earlier)
    if plan is None:
        plan = planner.run()
        if planner.unchanged(plan) is not None:
            cache.store(key, plan)
    return priced_here(plan, program)


def planner_here(
    config, recipe, *, program: Rehearsal | None = None, budget=None, verify=True, progress=None, compiled_later=False
) -> Planner:
    """The planner for this machine's own devices."""
    if program is None:
        program = in_mesh(
            config, lambda shape: rehearse(config, recipe, mesh=meshes.make_mesh(*shape), progress=progress),
            budget=budget,
        )  # fmt: skip
    machine = this_machine()
    (limit, reason), saves = _limits(config, budget, program, _budget_here)
    rates = rates_for(machine)
    if program.mesh.devices.size > 1:
        rates = with_links(rates, program, links_here())
    return Planner(program, limit, reason, machine.device_kind, rates, verify, progress, compiled_later, **saves)


def most_here(config, program: Rehearsal) -> tuple[int, str]:
    """(the most bytes that a step may take on one device of this machine, why)."""
    given, saves = _limits(config, None, program, _budget_here)
    return saves["budget_in_place"] or given


def _budget_here(setting: str) -> tuple[int, str]:
    return budget_bytes(setting, this_machine())


def _budget_of(target, setting: str) -> tuple[int, str]:
    if setting == "auto":
        return target.budget_bytes, target.budget_reason
    return parse_bytes(setting), f"memory.budget: {setting}"


def _limits(config, budget: int | None, program: Rehearsal, limit_of) -> tuple[tuple[int, str], dict]:
    """((bytes that a step may take on one device, why), the Planner's arguments that concern saves).

    The bytes are the budget asked for, else the machine's memory beside a save. A save copies the state to the
    processor's memory while training continues. If that is also the device's memory, the plan leaves room for the copy
    or, if nothing fits beside it, for the piece that a save in place holds. An evaluation needs no room: it runs
    between steps and keeps nothing for a backward pass.
    """
    copy, piece = (program.taken_by_a_save(in_place=in_place) for in_place in (False, True))
    setting = config.memory.budget
    if program.apart:
        saves = {"offload_beside_copy": _offload_beside(copy, program), "budget_in_place": None}
        return (budget, f"--budget {size(budget)}") if budget is not None else limit_of(setting), saves
    limit, reason = limit_of("auto")
    if budget is not None or setting != "auto":
        given = (budget, f"--budget {size(budget)}") if budget is not None else limit_of(setting)
        return given, {"beside_copy": limit - copy, "budget_in_place": None}
    if piece >= limit:
        raise UserError(
            f"the largest piece of a save takes {size(piece)} of the {size(limit)} that a device may use",
            where="memory.budget", why=reason,
            hint="optimizer.moments=int8, optimizer.master=bfloat16, model.lora.rank=16, or a smaller model",
        )  # fmt: skip
    beside = (
        limit - piece,
        f"{reason}, less {size(piece)} for a save in place: a copy of the state, {size(copy)}, does not fit as well",
    )
    if copy >= limit:
        return beside, {"beside_copy": 0, "budget_in_place": None}
    given = limit - copy, f"{reason}, less {size(copy)} for the copy that a save makes"
    return given, {"beside_copy": limit - copy, "budget_in_place": beside if piece < copy else None}


def _offload_beside(copy: int, program: Rehearsal) -> int | None:
    """Bytes of each device that may wait in the processor's memory beside the copy of a save; None if unknown.

    One process copies the whole state, and the memory is that of the whole machine. Negative if not even the copy fits.
    """
    if program.host_bytes is None:
        return None
    room = program.host_bytes * max(this_machine().device_count, 1)
    return (room - copy * program.mesh.devices.size) // program.mesh.local_mesh.devices.size


def pinned_plan(run, config, mesh) -> Plan | None:
    """The plan to which a run was pinned; None for a new run, or if the device, mesh or `memory` section changed."""
    known = files.read_json(run.plan)
    if not known or whole_shape(known["mesh"]) != dict(mesh.shape) or known["device"] != device_kind(mesh):
        return None
    return Plan.from_json(known["plan"]) if _asked_alike(known.get("asked"), config) else None


def _asked_alike(before: dict | None, config) -> bool:
    """Whether a plan was made for the `memory` section of a config. A run of another version may record other keys: one
    that is new had its default, and one that is gone decides nothing unless it asked for something."""
    if before is None:
        return False
    now, fields = asked(config), type(config.memory).model_fields
    same = all(before.get(key, fields[key].default) == value for key, value in now.items())
    return same and all(removed.is_idle(("memory", key), before[key]) for key in before.keys() - now.keys())


def asked(config) -> dict:
    """The keys of a config that decide the plan and may change within a run."""
    return config.memory.model_dump(mode="json", exclude={"on_oom", "guard"})


def whole_shape(recorded: dict) -> dict:
    """The shape of a mesh as a run recorded it, perhaps when there was no tensor axis."""
    return {"tensor": 1, **recorded}


def device_kind(mesh) -> str:
    """JAX's name for the devices of a mesh."""
    return mesh.devices.flat[0].device_kind

