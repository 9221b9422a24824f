"""`train`: takes a checked config to a finished run, or to one that can be resumed. Read it from top to bottom."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import jax
import numpy as np

from aurora_train import facts, files
from aurora_train import mesh as meshes
from aurora_train import run as runs
from aurora_train.always_on.guard import EXIT_LOW_MEMORY, LOW_MEMORY, refuse_full
from aurora_train.always_on.watchdog import watchdog_of
from aurora_train.boxes import gather
from aurora_train.check import preflight
from aurora_train.config import dump
from aurora_train.energy.account import Energy
from aurora_train.errors import Stopped, UserError
from aurora_train.lineage.following import ChainedEvents
from aurora_train.machine import processes, profile
from aurora_train.machine.gauge import Gauge
from aurora_train.machine.memory import give_back_freed
from aurora_train.machine.precision import settled
from aurora_train.nn.param import parameter_count
from aurora_train.origin.parents import record_of
from aurora_train.record import metrics as logs
from aurora_train.record.progress import Progress, preparation, silent, stderr_console
from aurora_train.record.throughput import Throughput
from aurora_train.record.voice import Voice, failure_recorded
from aurora_train.score import score_before, score_run
from aurora_train.train.announce import announce, say_damage, say_measured, say_replan
from aurora_train.train.bad_numbers import BadNumbers, data_step_of, go_back, where_it_begins
from aurora_train.train.evaluations import Evaluations
from aurora_train.train.loop import UNSAVED, Loop, state_hash
from aurora_train.train.oom import OutOfMemory, noticed, refused, replanned
from aurora_train.train.saving import EXIT_UNSAVED
from aurora_train.train.session import Process, Session, open_session
from aurora_train.train.signals import EXIT_STOPPED, StopRequest

_STATE = (
    "parameters and optimizer need the same memory under every plan: `aurora plan CONFIG` shows how much, and the "
    "settings that would reduce it"
)
_SCORE = "every step is saved: run the same command again with more memory free, or with evaluate.final=false"
_COMPILED_SECONDS = 1.0  # less: the step came from the compile cache, and the compiler has left no memory behind


@dataclass
class Outcome:
    """How a call of `train` ended: `status` is the process's exit status, `stopped_by` None for a finished run."""

    run: runs.Run
    status: int
    step: int
    stopped_by: str | None = None
    state_sha256: str | None = None
    remarks: dict = field(default_factory=dict)  # further fields of the final event


def train(
    config, run: runs.Run, *, quiet: bool = False, changes: list | None = None, replan: bool = False
) -> Outcome:
    """Start or resume a run, and train it to its last step and its score.

    The way to a step: `train` opens the session, `_attempt` restores or draws the state, and `Loop.run` and
    `Loop._train` (`train/loop.py`) take the steps. If an attempt runs out of memory or its numbers stay bad, another
    one follows: under a smaller plan, or past the bad data.

    `changes` are the (key, old, new, class) requested for a resume; they are recorded as an event. `replan` drops the
    plan that the run is pinned to.
    """
    with (
        _own(run, config) as own, own.lock(), StopRequest() as stop, watchdog_of(config, run) as watchdog,
        Energy(config.energy, own) as energy,
    ):  # fmt: skip
        process = Process(own, stop, energy, stderr_console(), quiet or own.follows, watchdog)
        with _ends_noted(process) as ended:
            config = settled(config, own)
            _refuse_unlike(config, run)
            session = _opened(config, process, replan)
            with _recorded(session) as events, failure_recorded(events, own.step):
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
        if own.config.is_file() and not own.follows:  # without a config, nothing was begun
            with _unrecorded_if_unsaved(outcome.status):
                _close(outcome, energy)
        return outcome


@contextlib.contextmanager
def _ends_noted(process: Process):
    """In this context, a signal or another process that leaves ends the run with an `outcome`.

    The error of a collective that lost another process becomes one message.
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
def _own(run: runs.Run, config):
    """The run that this process writes: the run itself, or a temporary copy if another process leads."""
    gathers = config.checkpoint.gather and processes.count() > 1
    if processes.leads():
        with gather.leading(run) if gathers else contextlib.nullcontext(run) as own:
            yield own
        return
    with tempfile.TemporaryDirectory(prefix=f"aurora-process-{processes.index()}-") as folder:
        if gathers:
            with gather.following(run, folder) as own:
                yield own
        else:
            yield runs.FollowedRun(run, folder)


def _refuse_unlike(config, run: runs.Run) -> None:
    """Refuse processes of one run that differ in what only jax knows, or that do not share the run folder."""
    if processes.count() == 1:
        return
    devices, _ = profile.choose_devices(jax.local_devices())
    processes.refuse_unlike("set of devices", f"{len(devices)} x {devices[0].device_kind}")
    processes.refuse_unlike("config", dump(config))  # what is `auto` in it may have been settled by the machine
    if not config.checkpoint.gather:
        gather.refuse_unshared(run)


def _unrecorded_if_unsaved(status: int):
    """A disk that rejects a checkpoint may reject its record too: then only the exit status reports the failure."""
    return contextlib.suppress(UserError) if status == EXIT_UNSAVED else contextlib.nullcontext()


def _close(outcome: Outcome, energy: Energy) -> None:
    """Record how the run ended. The caller draws the report, because the trainer does not import tools."""
    with ChainedEvents(outcome.run) as events:
        ending = {"by": outcome.stopped_by} if outcome.stopped_by else {"state_sha256": outcome.state_sha256}
        name = "stop" if outcome.stopped_by else "finish"
        events.event(name, outcome.step, **ending, **outcome.remarks, energy=energy.summary())
        events.seal()


def _opened(config, process: Process, replan: bool) -> Session:
    """Open the session. Everything that may refuse the run happens here, before any of its files is written."""
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
    """Record that the next attempt continues after the data that gave bad numbers."""
    with preparation(process.console, quiet=process.quiet) as shown:
        go_back(session, error, Voice(events, shown))


def _smaller(session: Session, fault, in_a_row: int, process: Process) -> Session:
    """The session of the next attempt after running out of memory."""
    if process.stop.name is not None:
        raise Stopped(process.stop.name)
    session.store.close()
    with preparation(process.console, quiet=process.quiet) as prepared:
        return replanned(session, fault, in_a_row, prepared)


def _no_replan(fault) -> UserError:
    return UserError(
        f"out of memory in {fault.doing}, in process {processes.index()}", why=fault.cause,
        hint="a run of several processes is not replanned automatically: start all of them again with a smaller "
        "memory.budget or a larger memory.accumulation",
    )  # fmt: skip


def _attempt(session: Session, process: Process, events) -> Outcome:
    """Train from the newest checkpoint, or from the start if there is none, to the last step and the score."""
    config, run = session.config, session.run
    damaged: list = []  # filled and reported by the leader
    start = processes.agreed(lambda: claim(session, damaged))
    logs.set_aside(run.metrics, start or 0, run.metrics_set_aside)
    known = logs.read(run.metrics)
    behind = preflight.clock_behind([*logs.read(run.events), *known])
    recorded = [(record["step"], record["evaluation"]) for record in known if "evaluation" in record]
    evaluated = dict(processes.agreed(lambda: recorded))
    with Progress(
        config.train.steps, process.console, quiet=process.quiet, unit=session.recipe.unit
    ) as progress:
        voice = Voice(events, progress)
        say_damage(damaged, start or 0, voice)
        say_replan(session, start or 0, voice)
        compiled = _compiled(session, progress, fresh=not start)
        process.stop.heed()
        processes.meet()  # the first collective fails after 30 s, and compile times may differ by more
        gauge = Gauge()
        with refused("the state is put in place", _STATE):
            state = _placed_state(session, start)
            announce(session, state, start, len(known) - len(evaluated), voice)
            preflight.say_clock(behind, start or 0, voice)
        evaluations = Evaluations(session, evaluated)
        if config.evaluate.before and not start:
            _score_before(session, evaluations, state, process, progress)
        with logs.MetricsLog(run.metrics, sinks(config, run, start or 0)) as metrics:
            loop = Loop(
                session, process, state, compiled, evaluations, metrics=metrics, voice=voice,
                progress=progress, throughput=throughput(session, state), memory_bytes=gauge,
            )  # fmt: skip
            del state, compiled, evaluations
            with _released(loop):
                ended = loop.run()
            stopped_by = processes.agreed(lambda: ended)
        with _unrecorded_if_unsaved(EXIT_UNSAVED if stopped_by == UNSAVED else 0):
            say_measured(session, loop.finished_steps(), gauge.peak(), voice)
    if stopped_by:
        session.store.close()
        return Outcome(run, _status(stopped_by), run.step(), stopped_by)
    return _scored(session, loop, process)


def _status(stopped_by: str) -> int:
    """The exit status of a run that was stopped."""
    if stopped_by == UNSAVED:
        return EXIT_UNSAVED
    return EXIT_LOW_MEMORY if stopped_by.startswith(LOW_MEMORY) else EXIT_STOPPED


def _placed_state(session: Session, start: int | None):
    """The state to continue with: the one saved at `start`, or the initial one; the same in every process."""
    refuse_full(session)
    state = _past_bad_data(session.restore(start) if start else session.fresh(), session.run, start or 0)
    whole = [leaf for leaf in jax.tree.leaves(state) if meshes.is_here(leaf.sharding, leaf.shape)]
    if processes.count() > 1:  # of what is cut, every process has another part
        processes.refuse_unlike("state", meshes.checksum(meshes.local_view(whole)))
    return state


def _compiled(session: Session, progress, *, fresh: bool):
    progress.status("compiling")
    with noticed(lambda: "compiling"):
        compiled, seconds = session.compile(fresh=fresh)
    if seconds > _COMPILED_SECONDS:
        give_back_freed()
    progress.status("compiling", seconds)
    return compiled


@contextlib.contextmanager
def _released(loop: Loop):
    """Release a loop's arrays if it fails in a way that allows another attempt."""
    try:
        yield
    except OutOfMemory:
        loop.release()
        raise
    except BadNumbers as error:
        error.fault = where_it_begins(loop.session, meshes.local_view(loop.state._replace(opt_state={})), error.window)
        loop.release()
        raise


def _past_bad_data(state, run: runs.Run, step: int):
    """A restored state; if the run went back because of bad data, its data step is moved past that data."""
    data_step = processes.agreed(lambda: data_step_of(logs.read(run.events), step))
    if data_step is None:
        return state
    return state._replace(data_step=meshes.put(np.int32(data_step), state.data_step.sharding))


def _score_before(session: Session, evaluations: Evaluations, state, process: Process, progress: Progress) -> None:
    """Score the state with which the run starts, for the comparison at its end."""
    began = time.perf_counter()
    progress.status("scoring the model before training")
    evaluator, own = evaluations.for_a_score(state)

    def scored() -> None:
        heed = process.stop.heeding(silent)
        score_before(session.recipe, session.config, session.run, evaluator, own, heed)

    with refused("the model is scored before training", "start the run with evaluate.before=false"):
        processes.agreed(scored)
    progress.status("scoring the model before training", time.perf_counter() - began)


def _scored(session: Session, loop: Loop, process: Process) -> Outcome:
    config, run = session.config, session.run

    def score(evaluator, state) -> None:
        with preparation(process.console, quiet=process.quiet) as shown:
            score_run(
                session.recipe, config, run, evaluator, state, loop.step, process.stop.heeding(shown),
                baselines=config.evaluate.baselines,
            )

    with refused("the finished run is scored", _SCORE):
        if config.evaluate.final:
            judged = loop.evaluations.for_a_score(loop.state)
            processes.agreed(lambda: score(*judged))
        digest = state_hash(loop.state)
    session.store.close()
    steps = config.train.steps
    early = {"early": runs.early_end(config.evaluate.patience, steps)} if loop.step < steps else {}
    return Outcome(run, 0, loop.step, state_sha256=digest, remarks=early)


def claim(session: Session, damaged: list) -> int | None:
    """Remove what a crash left; return the step of the newest intact checkpoint or None, append damage to `damaged`.

    UserError if the log says that there were checkpoints, and there are none.
    """
    session.store.sweep()
    start, damages = session.store.newest_intact()
    damaged += damages
    saved = [event["step"] for event in logs.read(session.run.events) if event["event"] == "save"]
    if start is None and saved:
        raise UserError(
            "every checkpoint of this run is gone",
            where=str(session.run.checkpoints),
            why=f"events.jsonl says that step {max(saved)} was saved",
            hint="restore one from a copy, or start over with `aurora train CONFIG --fresh` (this run is kept)",
        )
    return start


def _recorded(session: Session) -> ChainedEvents:
    """Record the run's origin, now that nothing can refuse it. Returns the log of its events.

    The config makes a folder a run, so the recipe's code is written before it: a run without code could not be read.
    """
    run, config = session.run, session.config
    runs.copy_code(run, config.recipe_code)
    # A run from before facts existed, whose recipe declares none, is still read with its data.
    if not run.provenance.exists() or (session.recipe.known and facts.read(run.facts) is None):
        facts.write(run.facts, session.recipe.known)
    files.write_atomically(run.config, dump(config))
    recorded = files.read_json(run.provenance, {})
    if "data" not in recorded:
        machine = profile.this_machine().describe()
        # An imported run keeps the record of what it was imported from.
        parents = {"parent": recorded["parent"]} if "parent" in recorded else record_of(session.parents)
        files.write_json(run.provenance, runs.provenance(config, session, machine, parents))
    return ChainedEvents(run, begun=True)


def sinks(config, run, after_step: int) -> list:
    """The viewers that the config asks for besides metrics.jsonl; only one process writes to them."""
    made: list = []
    if run.follows:
        return made
    if "tensorboard" in config.log.sinks:
        made.append(logs.TensorBoardSink(run.folder / "tensorboard", after_step))
    for name in [name for name in ("wandb", "wandb-online") if name in config.log.sinks][-1:]:
        known = config.model_dump(mode="json")
        made.append(logs.WandbSink(run.folder, run.wandb_id, config.name, known, online=name == "wandb-online"))
    return made


def throughput(session: Session, state) -> Throughput:
    """Rates of this run: HFU if the machine's peak is known, and MFU if the recipe's FLOPs are known too."""
    peak = profile.peak_flops(profile.this_machine(), session.config.train.precision)
    per_target = session.recipe.flops(parameter_count(state.params), parameter_count(state.frozen))
    as_run = session.program.product_flops(session.plan)
    return Throughput(per_target, peak and peak * session.mesh.devices.size, as_run)
