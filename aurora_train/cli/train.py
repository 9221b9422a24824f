"""`aurora train`: start a run of a config, or continue one that was interrupted."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from aurora_train.cli.common import ConfigArgument, JsonOption, OverrideOption, Overrides, print_json
from aurora_train.cli.joined import CoordinatorOption, ProcessesOption, ProcessOption, joined

EXAMPLE = "aurora train quickstart train.steps=200 --run runs/first"


def command(
    config: ConfigArgument,
    overrides: Overrides = None,
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="Folder (default runs/NAME-HASH).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an existing run aside and start over.")] = False,
    replan: Annotated[bool, typer.Option("--replan", help="Drop the run's memory plan and make a new one.")] = False,
    online: Annotated[bool, typer.Option("--online", help="Let hub: sources and models use the network.")] = False,
    override_limits: OverrideOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show errors and the result only.")] = False,
    json: JsonOption = False,
    coordinator: CoordinatorOption = None,
    process: ProcessOption = None,
    processes: ProcessesOption = None,
):
    """Train. The same command resumes a run that was interrupted; an edited config starts a new one beside it."""
    from aurora_train.check.intent import for_train
    from aurora_train.config import derived_lines, load
    from aurora_train.machine.place import set_place
    from aurora_train.machine.processes import agreed, told
    from aurora_train.run import Run

    if online:
        os.environ.update(HF_HUB_OFFLINE="0", HF_DATASETS_OFFLINE="0")
        overrides = [*(overrides or ()), "data.online=true"]
    set_place(coordinator, process, processes)
    with told():
        loaded = load(config, overrides or ())
    for line in [] if quiet else [*derived_lines(loaded.derived), *loaded.overruled]:
        print(line, file=sys.stderr)
    with joined(loaded, fresh=fresh, replan=replan):
        folder = agreed(lambda: str(for_train(loaded, run, fresh=fresh).folder))
        return go(loaded, Run(folder), quiet=quiet, json=json, replan=replan, override_limits=override_limits)


def go(
    config, run, *, quiet: bool, json: bool, changes=(), replan: bool = False, override_limits: str | None = None
) -> int:
    """Train a config in a run folder and print how it ended. Returns the exit status."""
    from aurora_train.check.intent import rate_after, warnings
    from aurora_train.check.limits import refuse_blank
    from aurora_train.machine import processes
    from aurora_train.machine.profile import prepare_environment

    refuse_blank(override_limits)
    done = processes.agreed(lambda: _was_finished(config, run, replan, changes))
    if done is not None:
        return show(run, done, 0, None, json, override_limits) if processes.leads() else 0
    for line in warnings(changes):
        print(f"changed {line}", file=sys.stderr)
    if changes and (line := rate_after(run, config)) is not None:
        print(line, file=sys.stderr)
    prepare_environment(config)
    from aurora_train.tools.report import report_ending
    from aurora_train.train.start import train

    outcome = train(config, run, quiet=quiet, changes=list(changes), replan=replan)
    report_ending(outcome)
    if outcome.run.follows:
        return outcome.status
    return show(run, outcome.step, outcome.status, outcome.stopped_by, json, override_limits)


def _was_finished(config, run, replan: bool, changes=()) -> int | None:
    """The step at which the run is finished, if it is and is intact; else None."""
    from aurora_train.checkpoint.audit import newest_fault

    step = run.finished_at(config)
    if step is None:
        return None
    fault = newest_fault(run.checkpoints)
    if fault:
        print(f"the run is finished, but its newest checkpoint is damaged: {fault}", file=sys.stderr)
        return None
    if replan:
        print("this run is finished, so no new plan was made", file=sys.stderr)
    if changes:
        keys = ", ".join(key for key, *_ in changes)
        print(f"this run is finished, so these keys were not changed: {keys}\n"
              f"  aurora resume {run.folder} train.steps=N continues it", file=sys.stderr)  # fmt: skip
    if not run.report.exists():
        from aurora_train.tools.report import write_report

        write_report(run.folder)
    return step


_UNSAVED = 74  # `train.saving.EXIT_UNSAVED`, repeated here because that module imports jax


def show(
    run, step: int, status: int, stopped_by: str | None, json: bool, override_limits: str | None = None
) -> int:
    """Print the end of a run: its score and report, or the command that resumes it. Returns the exit status."""
    from aurora_train.check import limits
    from aurora_train.files import read_json
    from aurora_train.lineage.following import catch_up
    from aurora_train.record.console import show_table
    from aurora_train.units import decimal

    scores, said = read_json(run.scores), []
    if not (status or stopped_by):
        status, said = limits.judged(run, (scores or {}).get("exceeded", []), "train", override_limits, step)
        if override_limits is not None:
            catch_up(run)
    if json:
        print_json({"run": str(run.folder), "step": step, "status": status, "stopped_by": stopped_by, "scores": scores})
    elif status == _UNSAVED:
        print(f"stopped by {stopped_by}; training after step {step} is lost\n"
              f"free some space or make the disk writable again, then: aurora resume {run.folder}")  # fmt: skip
    elif stopped_by:
        name, *why = stopped_by.splitlines()
        where = f"at step {step}; everything is saved" if step else "before anything was trained"
        print(f"stopped by {name} {where}")
        print(*why, f"resume with: aurora resume {run.folder}" if step else "the same command starts again", sep="\n")
    else:
        print(f"finished at step {step}: {run.folder}")
        if scores:
            name = scores["headline"]
            print(f"{name} {decimal(scores['score'][name])}")
            for rival, value in scores["baselines"].items():
                if isinstance(value, (int, float)):
                    print(f"  {rival} {decimal(value)}")
            if scores.get("before"):
                show_table(scores["before"]["table"])
            for remark in scores.get("remarks", []):
                print(f"note: {remark}")
        print(f"report: {run.report}", flush=True)
    for line in said:
        print(line, file=sys.stderr)
    return status
