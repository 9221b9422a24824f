"""`train`: from a checked config to a finished run, or to one that can be resumed. A run's story, top to bottom."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from aurora_train import facts, files
from aurora_train import mesh as meshes
from aurora_train import run as runs
from aurora_train.config import dump
from aurora_train.errors import UserError
from aurora_train.machine import processes, profile
from aurora_train.machine.memory import give_back_freed
from aurora_train.nn.param import parameter_count
from aurora_train.record import metrics as logs
from aurora_train.record.energy import EnergyMeter
from aurora_train.record.progress import Progress, preparation, stderr_console
from aurora_train.record.throughput import Throughput
from aurora_train.train import preflight
from aurora_train.train.announce import announce, say_damage, say_measured, say_replan
from aurora_train.train.bad_numbers import BadNumbers, data_step_of, go_back, where_it_begins
from aurora_train.train.evaluate import Evaluator
from aurora_train.train.guard import EXIT_LOW_MEMORY, LOW_MEMORY, refuse_full
from aurora_train.train.lineage import record_of
from aurora_train.train.loop import UNSAVED, Loop, state_hash
from aurora_train.train.oom import Gauge, OutOfMemory, noticed, refused, replanned
from aurora_train.train.precision import settled
from aurora_train.train.saving import EXIT_UNSAVED
from aurora_train.train.score import score_run
from aurora_train.train.session import Session, open_session
from aurora_train.train.signals import EXIT_STOPPED, Stopped, StopRequest
from aurora_train.train.watchdog import Watchdog

_STATE = (
    "parameters and optimizer take the same room under every plan: `aurora plan CONFIG` shows how much, and the "
    "settings that would make it less"
)
_SCORE = "every step is saved: run the same command again with more memory free, or with evaluate.final=false"


@dataclass
class Outcome:
    """How a call of `train` ended: `status` is the process's exit status, `stopped_by` None for a finished run."""

    run: runs.Run
    status: int
    step: int
    stopped_by: str | None = None
    state_sha256: str | None = None
    remarks: dict = field(default_factory=dict)  # what else the event of the end says


@dataclass
class Process:
    """What a process has whatever plan its run is on. `deadline`: of time.monotonic(), None is never."""

    run: runs.Run
    stop: StopRequest
    energy: EnergyMeter
    console: Any
    quiet: bool
    watchdog: Watchdog
    deadline: float | None = None


def train(
    config, run: runs.Run, *, quiet: bool = False, changes: list | None = None, replan: bool = False
) -> Outcome:
    """Start or resume a run and take it to its last step and its score.

    To follow it to a step: `train` opens the session, `_attempt` brings the state to where the run is, `Loop.run` and
    `Loop._train` (`train/loop.py`) take the steps. An attempt that runs out of memory, or whose numbers stay bad, is
    followed by another one: under a smaller plan, or past the bad data.

    `changes` are the (key, old, new, class) that a resume was asked for; they are recorded as an event. `replan`
    drops the plan that the run is pinned to.
    """
    console, energy = stderr_console(), EnergyMeter()
    with _own(run) as own, own.lock(), StopRequest() as stop, _watchdog(config, own) as watchdog:
        process = Process(own, stop, energy, console, quiet or own.follows, watchdog)
        with _ends_noted(process) as ended:
            config = settled(config, run)
            _refuse_unlike(config, run, replan)
            session = _opened(config, process, replan)
            with logs.EventLog(_recorded(session)) as events:
                _record_changes(own, changes or [], events)
                ooms_in_a_row = 0
                while True:
                    try:
                        ended.outcome = _attempt(session, process, events)
                        break
                    except BadNumbers as error:
                        _rewind(session, error, process, events)
                        continue
                    except OutOfMemory as error:
                        fault = error.fault  # not the error itself: its traceback keeps the dead state alive
                        if processes.count() > 1:
                            raise _no_replan(fault) from None
                    ooms_in_a_row = 1 if fault.finished_steps else ooms_in_a_row + 1
                    session = _smaller(session, fault, ooms_in_a_row, process)
        outcome = ended.outcome
        if own.config.is_file() and not own.follows:  # otherwise it was stopped before there was anything to keep
            with _unrecorded_if_unsaved(outcome.status):
                _close(outcome, energy)
        return outcome


@contextlib.contextmanager
def _ends_noted(process: Process):
    """Within, what ends a run from outside (a signal, another process that left) becomes its `outcome`.

    A collective that lost another process becomes one message.
    """
    run, ended = process.run, SimpleNamespace(outcome=None)
    try:
        with process.stop.allowed():
            yield ended
    except Stopped:
        ended.outcome = Outcome(run, EXIT_STOPPED, run.step(), process.stop.name)
        processes.leave(f"stopped by {process.stop.name}", EXIT_STOPPED)
    except processes.Ended as fault:
        if fault.status != EXIT_STOPPED:
            raise
        ended.outcome = Outcome(run, EXIT_STOPPED, run.step(), str(fault))
    except jax.errors.JaxRuntimeError as error:
        fault = processes.lost(error)
        if fault is None:
            raise
        raise fault from None


@contextlib.contextmanager
def _own(run: runs.Run):
    """The run as this process writes it: itself, or where another process leads, a copy to be thrown away."""
    if processes.leads():
        yield run
        return
    with tempfile.TemporaryDirectory(prefix=f"aurora-process-{processes.index()}-") as folder:
        yield runs.FollowedRun(run, folder)


def _refuse_unlike(config, run: runs.Run, replan: bool) -> None:
    """What processes that train together have to have alike, and the run folder, which has to be one and the same."""
    if processes.count() == 1:
        return
    processes.refuse_unlike("config", dump(config))
    processes.refuse_unlike("recipe file", str(config.recipe_sha256))
    processes.refuse_unlike("code", runs.code_hash())
    processes.refuse_unlike("set of versions", str(runs.versions()))
    processes.refuse_unlike("--replan", str(replan))
    processes.refuse_unlike("run folder (it has to be on a disk that all of them see)", run.holder())


def _watchdog(config, run: runs.Run) -> Watchdog:
    """A process that follows has none: it may wait in a step for as long as the leader saves."""
    wish = config.train.watchdog
    fixed = 60 * wish if isinstance(wish, int | float) else None
    return Watchdog(run.folder, run.events, fixed=fixed, enabled=wish != "off" and not run.follows)


def _unrecorded_if_unsaved(status: int):
    """A disk that takes no checkpoint may take no record of that either: then the exit status alone reports it."""
    return contextlib.suppress(UserError) if status == EXIT_UNSAVED else contextlib.nullcontext()


def _close(outcome: Outcome, energy: EnergyMeter) -> None:
    """Say how it ended. The report is drawn by the caller: it is a tool, and what trains knows no tools."""
    with logs.EventLog(outcome.run.events) as events:
        ending = {"by": outcome.stopped_by} if outcome.stopped_by else {"state_sha256": outcome.state_sha256}
        name = "stop" if outcome.stopped_by else "finish"
        events.event(name, outcome.step, **ending, **outcome.remarks, energy_joules=energy.total_joules())


def _opened(config, process: Process, replan: bool) -> Session:
    """Everything that may refuse the run, before anything of it is written."""
    with preparation(process.console, quiet=process.quiet) as prepared:
        preflight.refuse_unwritable(process.run)
        session = open_session(config, process.run, prepared, replan=replan)
        processes.refuse_unlike("training data", session.source.fingerprint)
        preflight.refuse_no_room(session)
    return session


def _record_changes(run: runs.Run, changes: list, events) -> None:
    if changes:
        events.event("override", run.step(), changes=[list(change) for change in changes])
        runs.record_allowed(run, [change for change in changes if change[3] == "allowed"])


def _rewind(session: Session, error: BadNumbers, process: Process, events) -> None:
    """Record that the next attempt goes on past the data that the numbers were bad with."""
    with preparation(process.console, quiet=process.quiet) as shown:
        shown.event(go_back(session, error, events))


def _smaller(session: Session, fault, in_a_row: int, process: Process) -> Session:
    """The session of the next attempt after an out-of-memory."""
    if process.stop.name is not None:
        raise Stopped(process.stop.name)
    session.store.close()
    with preparation(process.console, quiet=process.quiet) as prepared:
        return replanned(session, fault, in_a_row, prepared)


def _no_replan(fault) -> UserError:
    return UserError(
        f"out of memory in {fault.doing}, in process {processes.index()}", why=fault.cause,
        hint="several processes are not replanned by themselves: start all again with memory.budget or "
        "memory.accumulation set for less",
    )  # fmt: skip


def _attempt(session: Session, process: Process, events) -> Outcome:
    """From the newest checkpoint, or from the start where there is none, to the last step and the score."""
    config, run = session.config, session.run
    damaged: list = []  # the leader's to report
    start = processes.agreed(lambda: claim(session, damaged))
    logs.set_aside(run.metrics, start or 0, run.metrics_set_aside)
    known = logs.read(run.metrics)
    behind = preflight.clock_behind([*logs.read(run.events), *known])
    evaluations = [(record["step"], record["evaluation"]) for record in known if "evaluation" in record]
    evaluated = dict(processes.agreed(lambda: evaluations))
    with Progress(
        config.train.steps, process.console, quiet=process.quiet, unit=session.recipe.unit
    ) as progress:
        say_damage(damaged, start or 0, events, progress)
        say_replan(session, start or 0, events, progress)
        compiled = _compiled(session, progress, fresh=not start)
        process.stop.heed()
        processes.meet()  # the first collective gives up after 30 s, and one may compile for longer than another
        gauge = Gauge()
        with refused("the state is put in place", _STATE):
            state = _in_place(session, start)
            announce(session, state, start, len(known) - len(evaluated), events, progress)
            preflight.say_clock(behind, start or 0, events, progress)
        with logs.MetricsLog(run.metrics, sinks(config, run, start or 0)) as metrics:
            loop = Loop(
                session, state, compiled, stop=process.stop, metrics=metrics, events=events, progress=progress,
                throughput=throughput(session, state), memory_bytes=gauge, energy=process.energy,
                watchdog=process.watchdog, deadline=process.deadline,
            )
            del state, compiled
            process.deadline = loop.deadline
            with _released(loop):
                ended = loop.run(evaluated)
            stopped_by = processes.agreed(lambda: ended)
        with _unrecorded_if_unsaved(EXIT_UNSAVED if stopped_by == UNSAVED else 0):
            say_measured(session, loop.finished_steps(), gauge.peak(), progress)
    if stopped_by:
        session.store.close()
        return Outcome(run, _status(stopped_by), run.step(), stopped_by)
    return _scored(session, loop, process)


def _status(stopped_by: str) -> int:
    """The exit status of a run that was stopped."""
    if stopped_by == UNSAVED:
        return EXIT_UNSAVED
    return EXIT_LOW_MEMORY if stopped_by.startswith(LOW_MEMORY) else EXIT_STOPPED


def _in_place(session: Session, start: int | None):
    """The state to go on with: the one saved at `start`, or the initial one; the same in every process."""
    refuse_full(session)
    state = _past_bad_data(session.restore(start) if start else session.fresh(), session.run, start or 0)
    if processes.count() > 1:
        processes.refuse_unlike("state", meshes.checksum(meshes.local_view(state)))
    return state


def _compiled(session: Session, progress, *, fresh: bool):
    progress.status("compiling")
    with noticed(lambda: "compiling"):
        compiled, seconds = session.compile(fresh=fresh)
    give_back_freed()
    progress.status("compiling", seconds)
    return compiled


@contextlib.contextmanager
def _released(loop: Loop):
    """Let go of a loop's arrays where it fails in a way that another attempt may follow."""
    try:
        yield
    except OutOfMemory:
        loop.release()
        raise
    except BadNumbers as error:
        error.fault = where_it_begins(loop.session, meshes.local_view(loop.state), error.window)
        loop.release()
        raise


def _past_bad_data(state, run: runs.Run, step: int):
    """The state of a checkpoint that the run went back to, with the data after what it went back for."""
    data_step = processes.agreed(lambda: data_step_of(logs.read(run.events), step))
    if data_step is None:
        return state
    return state._replace(data_step=meshes.put(np.int32(data_step), state.data_step.sharding))


def _scored(session: Session, loop: Loop, process: Process) -> Outcome:
    config, run = session.config, session.run

    def scored() -> str:
        state, evaluator = meshes.local_view(loop.state), loop.evaluator
        if processes.count() > 1:  # a score may do anything, so the leader does it, with what is in its own devices
            evaluator = Evaluator(session.recipe, session.blueprint, meshes.local_mesh(session.mesh))
        if config.evaluate.final:
            with preparation(process.console, quiet=process.quiet) as shown:
                score_run(
                    session.recipe, config, run, evaluator, state, loop.step, _heeding(process.stop, shown),
                    baselines=config.evaluate.baselines,
                )
        return state_hash(state)

    with refused("the finished run is scored", _SCORE):
        digest = processes.agreed(scored)
    session.store.close()
    early = {"early": runs.early_end(config)} if loop.step < config.train.steps else {}
    return Outcome(run, 0, loop.step, state_sha256=digest, remarks=early)


def _heeding(stop: StopRequest, progress):
    """A progress callback that lets a signal through which came while nothing could be raised."""

    def told(*arguments):
        stop.heed()
        progress(*arguments)

    return told


def claim(session: Session, damaged: list) -> int | None:
    """Clear what a crash left and find the newest intact checkpoint: its step or None; what was damaged is appended.

    UserError where the log says that there were checkpoints, and there is none.
    """
    session.store.sweep()
    start, found = session.store.newest_intact()
    damaged += found
    saved = [event["step"] for event in logs.read(session.run.events) if event["event"] == "save"]
    if start is None and saved:
        raise UserError(
            "every checkpoint of this run is gone",
            where=str(session.run.checkpoints),
            why=f"events.jsonl says that step {max(saved)} was saved",
            hint="bring a copy of one back, or start over with `aurora train CONFIG --fresh` (this run is kept)",
        )
    return start


def _recorded(session: Session) -> Path:
    """Write down where the run comes from, now that nothing refuses it; returns where its events go.

    The recipe's code comes before the config, which makes a folder a run: a run without its code could not be read.
    """
    run, config = session.run, session.config
    runs.copy_code(run, config.recipe_code)
    # A run of before there were facts, whose recipe names none, goes on being read with its data.
    if not run.provenance.exists() or (session.recipe.known and facts.read(run.facts) is None):
        facts.write(run.facts, session.recipe.known)
    files.write_atomically(run.config, dump(config))
    if not run.provenance.exists():
        machine = profile.this_machine().describe()
        files.write_json(run.provenance, runs.provenance(config, session, machine, record_of(session.parents)))
    return run.events


def sinks(config, run, after_step: int) -> list:
    """The viewers that the config asks for besides metrics.jsonl; one process tells them."""
    made: list = []
    if run.follows:
        return made
    if "tensorboard" in config.log.sinks:
        made.append(logs.TensorBoardSink(run.folder / "tensorboard", after_step))
    if "wandb" in config.log.sinks:
        known = config.model_dump(mode="json")
        made.append(logs.WandbSink(run.folder, run.wandb_id, config.name, known, config.log.online))
    return made


def throughput(session: Session, state) -> Throughput:
    """Rates for this run: MFU where both the recipe's FLOPs and the machine's peak are known, HFU where the peak is."""
    peak = profile.peak_flops(profile.this_machine(), session.config.train.precision)
    per_target = session.recipe.flops(parameter_count(state.params), parameter_count(state.frozen))
    as_run = session.program.product_flops(session.plan)
    return Throughput(per_target, peak and peak * session.mesh.devices.size, as_run)
