"""`train`: from a checked config to a finished run, or to one that can be resumed. A run's story, top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

from aurora_train import files
from aurora_train import mesh as meshes
from aurora_train import run as runs
from aurora_train.config import dump
from aurora_train.machine import memory as machine_memory
from aurora_train.machine import profile
from aurora_train.memory.report import one_line
from aurora_train.observe import metrics as logs
from aurora_train.observe.energy import EnergyMeter
from aurora_train.observe.progress import Progress, preparation, stderr_console
from aurora_train.observe.report import write_report
from aurora_train.observe.throughput import Throughput
from aurora_train.train.loop import Loop, state_hash
from aurora_train.train.score import score_run
from aurora_train.train.session import Session, device_kind, moved, open_session, pin
from aurora_train.train.signals import EXIT_STOPPED, Stopped, StopRequest
from aurora_train.train.state import parameter_count


@dataclass
class Outcome:
    """How a call of `train` ended: `status` is the process's exit status, `stopped_by` None for a finished run."""

    run: runs.Run
    status: int
    step: int
    stopped_by: str | None = None
    state_sha256: str | None = None


def train(config, run: runs.Run, *, quiet: bool = False, changes: list | None = None) -> Outcome:
    """Start or resume a run and take it to its last step, its score and its report.

    `changes` are the (key, old, new, class) that a resume was asked for; they are recorded as an event.
    """
    console, energy = stderr_console(), EnergyMeter()
    with run.lock(), StopRequest() as stop:
        try:
            with stop.allowed():
                outcome = _train(config, run, stop, energy, console, quiet, changes or [])
        except Stopped:
            outcome = Outcome(run, EXIT_STOPPED, run.step(), stop.name)
        if run.config.is_file():  # else it was stopped before there was anything to keep
            _close(outcome, energy)
        return outcome


def _close(outcome: Outcome, energy: EnergyMeter) -> None:
    """Say how it ended, and draw the report."""
    with logs.EventLog(outcome.run.events) as events:
        ending = {"by": outcome.stopped_by} if outcome.stopped_by else {"state_sha256": outcome.state_sha256}
        name = "stop" if outcome.stopped_by else "finish"
        events.event(name, outcome.step, **ending, energy_joules=energy.total_joules())
    write_report(outcome.run.folder)


def _train(config, run, stop, energy, console, quiet, changes) -> Outcome:
    with preparation(console, quiet=quiet) as prepared:
        session = open_session(config, run, prepared)
    with logs.EventLog(_recorded(session)) as events:
        return _go_on(session, stop, events, energy, console, quiet, changes)


def _go_on(session: Session, stop, events, energy, console, quiet, changes) -> Outcome:
    config, run = session.config, session.run
    if changes:
        events.event("override", run.step(), changes=[list(change) for change in changes])
    start, damaged = claim(session)
    resumed_from = start or 0
    logs.set_aside(run.metrics, resumed_from, run.metrics_set_aside)
    known = logs.read(run.metrics)
    evaluated = {record["step"] for record in known if "evaluation" in record}
    with Progress(config.train.steps, console, quiet=quiet) as progress:
        for damage in damaged:
            events.event("walk_back", damage.step, faults=damage.faults, moved_to=str(damage.moved_to))
            progress.event(f"checkpoint {damage.step} is damaged ({damage.faults[0]}); moved to {damage.moved_to}")
        progress.status("compiling")
        compiled, seconds = session.compile()
        progress.status("compiling", seconds)
        state = session.restore(start) if start else session.fresh()
        _announce(session, state, start, len(known) - len(evaluated), events, progress)
        with logs.MetricsLog(run.metrics, sinks(config, run, resumed_from)) as metrics:
            loop = Loop(
                session, state, compiled, stop=stop, metrics=metrics, events=events, progress=progress,
                throughput=throughput(session, state), memory_bytes=machine_memory.process_memory_bytes, energy=energy,
            )
            del state
            stopped_by = loop.run(evaluated)
    if stopped_by:
        session.store.close()
        return Outcome(run, EXIT_STOPPED, run.step(), stopped_by)
    if config.evaluate.final:
        with preparation(console, quiet=quiet) as shown:
            score_run(
                session.recipe, config, run, loop.evaluator, loop.state, config.train.steps, shown,
                baselines=config.evaluate.baselines,
            )
    digest = state_hash(loop.state)
    session.store.close()
    return Outcome(run, 0, config.train.steps, state_sha256=digest)


def claim(session: Session) -> tuple[int | None, list]:
    """Clear what a crash left and find the newest intact checkpoint: (its step or None, what was damaged)."""
    session.store.sweep()
    return session.store.newest_intact()


def _recorded(session: Session) -> Path:
    """Write down where the run comes from, now that nothing refuses it; returns where its events go.

    The recipe's code comes before the config, which makes a folder a run: a run without its code could not be read.
    """
    run, config = session.run, session.config
    runs.copy_code(run, config.recipe_file)
    files.write_atomically(run.config, dump(config))
    if not run.provenance.exists():
        machine = profile.this_machine().describe()
        files.write_json(run.provenance, runs.provenance(config, config.recipe_file, session.source, machine))
    return run.events


def _announce(session: Session, state, start, num_recorded: int, events, progress) -> None:
    count, still, mesh = parameter_count(state.params), parameter_count(state.frozen), session.mesh
    if start:
        events.event("resume", start)
        progress.event(f"resuming {session.run.folder} from step {start}")
        if num_recorded != start:
            events.event("log_gap", start, recorded=num_recorded)
            progress.event(f"metrics.jsonl has {num_recorded} of the {start} steps before this one")
    else:
        events.event("start", 0, parameters=count, **({"frozen": still} if still else {}))
    for what, before, after in moved(session):
        name = "replan" if what in ("plan", "mesh", "device") else "versions"
        events.event(name, start or 0, what=what, before=before, after=after)
        progress.event(f"{what} is not what this run had before: equal to tolerance from here, no longer to the bit")
    pin(session)
    model = session.blueprint.merge(state.params, state.rest, state.frozen)
    for remark in (*session.recipe.remarks(model), *remarks(session)):
        progress.event(remark)
    held = meshes.bytes_per_device(state)
    beside = f" trained beside {still / 1e6:.2f}M frozen ones" if still else ""
    progress.event(
        f"{count / 1e6:.2f}M parameters{beside}, {len(session.source):,} training examples, "
        f"{mesh.devices.size} x {device_kind(mesh)}, {max(held.values()) / 2**20:.0f} MiB of state per device"
    )


def remarks(session: Session) -> list[str]:
    """What would otherwise happen in silence."""
    mesh, lines = session.mesh, []
    idle = jax.device_count() - mesh.devices.size
    if idle:
        lines.append(f"{idle} of {jax.device_count()} devices are not in the mesh")
    shardings = session.blueprint.shardings
    whole = meshes.kept_whole((shardings.params, shardings.frozen))
    if mesh.shape["fsdp"] > 1 and whole:
        lines.append(f"fsdp {mesh.shape['fsdp']} does not divide {len(whole)} matrices, kept whole: {whole[0]}, ...")
    lines.append(one_line(session.plan))
    return lines


def sinks(config, run, after_step: int) -> list:
    """The viewers that the config asks for besides metrics.jsonl."""
    made = []
    if "tensorboard" in config.log.sinks:
        made.append(logs.TensorBoardSink(run.folder / "tensorboard", after_step))
    if "wandb" in config.log.sinks:
        made.append(logs.WandbSink(run.folder, config.name, config.model_dump(mode="json"), config.log.online))
    return made


def throughput(session: Session, state) -> Throughput:
    """Rates for this run: MFU only where both the recipe's FLOPs and the machine's peak are known."""
    peak = profile.peak_flops(profile.this_machine(), session.config.train.precision)
    # A frozen weight has no gradient: 4 FLOPs a target and not 6, of which a recipe knows nothing.
    still = parameter_count(state.frozen)
    per_target = session.recipe.flops_per_target(parameter_count(state.params) + still)
    per_target = per_target and per_target - 2 * still
    return Throughput(per_target, peak and peak * session.mesh.devices.size)
