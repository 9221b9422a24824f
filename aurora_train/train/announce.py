"""The lines that a run prints before its first step and after its last, and their events. Every line is for the user.

Details for the trainer's authors (the form of each operation, the attention kernel) are in the plan: `aurora plan`,
plan.json and the report show them.
"""

from __future__ import annotations

from dataclasses import replace

import jax

from aurora_train import mesh as meshes
from aurora_train.boxes.choice import lines_of
from aurora_train.check.remarks import remarks_on_config, remarks_on_data
from aurora_train.machine import processes, profile
from aurora_train.nn import fp8
from aurora_train.nn.param import parameter_count
from aurora_train.origin.parents import record_of
from aurora_train.plan.report import one_line, says_something, side_by_side
from aurora_train.recipe import makes_experience
from aurora_train.record.voice import Voice
from aurora_train.train.session import Session, device_kind, moved, pin, pin_plan
from aurora_train.units import counted, size

_SMALL_BYTES = 1 << 20  # a smaller state is not mentioned


def say_damage(damaged, start: int, voice: Voice) -> None:
    """Report the checkpoints that were damaged, and the step to which the run goes back for that."""
    for damage in damaged:
        moved_to = damage.moved_to and str(damage.moved_to)
        record = {"faults": damage.faults, "moved_to": moved_to, "restored": start}
        voice(str(damage), "walk_back", damage.step or start, **record)
    if any(damage.step is not None for damage in damaged):
        voice(f"going back to step {start}; the steps after it are trained again")


def say_replan(session: Session, start: int, voice: Voice) -> None:
    """Record that a plan was abandoned, and why, and pin the run to the new one before it is tried."""
    if session.given_up is None:
        return
    before, fault = session.given_up, session.fault
    why = {"doing": fault.doing, "cause": fault.cause, "live": fault.live} if fault else {}
    then = "the same plan as before" if before.work == session.plan.work else _from_here(session)
    voice(
        f"a new plan ({session.reason}), going on from step {start}: {then}", "replan", start, what="plan",
        reason=session.reason, before=before.work, after=session.plan.work, restored=start, **why,
    )  # fmt: skip
    pin_plan(session)


def say_measured(session: Session, finished_steps: int, peak_bytes: int | None, voice: Voice) -> None:
    """Record the measured memory beside the plan's estimate."""
    if finished_steps == 0:
        return
    session.plan = replace(session.plan, measured_bytes=peak_bytes)
    pin(session)
    if says_something(session.plan):
        voice(side_by_side(session.plan))


def announce(session: Session, state, start: int | None, num_recorded: int, voice: Voice) -> None:
    """Report what is about to be trained, from step `start`, of which metrics.jsonl has `num_recorded` steps."""
    count, still, mesh = parameter_count(state.params), parameter_count(state.frozen), session.mesh
    if start:
        voice(f"resuming {session.run.folder} from step {start}", "resume", start)
        if num_recorded != start:
            text = f"metrics.jsonl has {num_recorded} of the {start} steps before this one"
            voice(text, "log_gap", start, recorded=num_recorded)
    else:
        held = sum(meshes.bytes_per_device(state).values())
        voice.record("start", 0, parameters=count, **({"frozen": still} if still else {}), state_bytes_here=held)
        if session.parents:
            voice.record("init", 0, **record_of(session.parents))
        for parent in session.parents:
            part = f"the parameters under `{parent.prefix}` start" if parent.prefix else "starting"
            voice(f"{part} from {parent}")
        for line in (*remarks_on_config(session.config), *remarks_on_data(session.config, session.source)):
            voice(line, "remark", 0, text=line)
    for line in lines_of(session.program.weighed):
        voice(line)
    if session.program.weighed:
        voice.record("mesh", start or 0, weighed=session.program.weighed)
    for what, before, after in moved(session):
        name = "replan" if what in ("plan", "mesh", "device", "processes") else "versions"
        now = "are not what this run had" if what == "processes" else "is not what this run had"
        text = f"{what} {now} before: {_from_here(session)}"
        voice(text, name, start or 0, what=what, before=before, after=after)
    pin(session)
    model = session.blueprint.merge(state.params, state.rest, state.frozen)
    for remark in (*session.recipe.remarks(model), *remarks(session)):
        voice(remark)
    held = max(meshes.bytes_per_device(state).values())
    beside = f" trained beside {still:,} frozen ones" if still else ""
    on = f"{mesh.devices.size} x {device_kind(mesh)}{_in_processes()}"
    room = f", {size(held)} of state per device" if held >= _SMALL_BYTES else ""
    voice(f"{count:,} parameters{beside}, {session.config.train.precision}, {on}{room}")
    voice(data_line(session))


def _from_here(session: Session) -> str:
    """How a run compares to the undisturbed one once its sums are computed in another order."""
    if makes_experience(session.recipe):
        return "WARNING: from here the model makes different data, so the run departs from the undisturbed one"
    return "equal to tolerance from here, no longer to the bit"


def data_line(session: Session) -> str:
    """The number of examples, the number of epochs, and what is held out."""
    train, examples = session.config.train, len(session.source)
    epochs = _times(train.steps * train.batch / examples)
    return (
        f"{counted(examples, 'training example')}: {epochs} in {counted(train.steps, 'step')} of {train.batch:,}; "
        f"held out: {_held_out(session)}"
    )


def _times(epochs: float) -> str:
    return counted(epochs, "epoch") if epochs >= 9.95 or epochs == 1 else f"{epochs:.2g} epochs"


def _held_out(session: Session) -> str:
    """Documents and bytes by split if the source's record has them, else the number of validation examples."""
    splits = session.source.describe().get("splits")
    splits = splits if isinstance(splits, dict) else {}
    held_out = {name: splits[name] for name in ("validation", "test") if isinstance(splits.get(name), dict)}
    known = [(name, held) for name, held in held_out.items() if "documents" in held]
    if known:
        return ", ".join(f"{_documents(held)} for {name}" for name, held in known)
    if not session.evaluates:
        return "nothing for validation"
    return f"{counted(len(session.recipe.data('validation')), 'example')} for validation"


def _documents(held: dict) -> str:
    number = held["documents"]
    return f"{counted(number, 'document')} ({size(held.get('bytes'))})" if number else "nothing"


def _in_processes() -> str:
    return f" in {processes.count()} processes" if processes.count() > 1 else ""


def remarks(session: Session) -> list[str]:
    """Notices about the machine and the plan: idle devices, unsharded weights, kernels."""
    mesh, lines = session.mesh, []
    idle = jax.device_count() - mesh.devices.size
    if idle:
        lines.append(f"{idle} of {jax.device_count()} devices are not in the mesh")
    for axis, whole in meshes.kept_whole(session.blueprint.variables, mesh).items():
        lines.append(f"{axis} {mesh.shape[axis]} does not divide {len(whole)} matrices, kept whole: {whole[0]}, ...")
    if session.config.train.forms == "plain":
        lines.append("operations in their plain forms, as train.forms asks")
    if session.config.train.precision == "fp8":
        lines.append(fp8.one_line(session.config.train.bf16_ends, profile.this_machine()))
    return [*lines, one_line(session.plan)] if says_something(session.plan) else lines
