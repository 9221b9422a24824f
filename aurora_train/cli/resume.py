"""`aurora resume`: continue a run from its folder alone."""

from __future__ import annotations

from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, OverrideOption, Overrides, RunArgument
from aurora_train.cli.joined import CoordinatorOption, ProcessesOption, ProcessOption, joined

EXAMPLE = "aurora resume runs/first train.steps=400"


def command(
    run: RunArgument,
    overrides: Overrides = None,
    replan: Annotated[bool, typer.Option("--replan", help="Drop the run's memory plan and make a new one.")] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option("--allow-change", metavar="KEY", help="Allow this frozen key to change; recorded. Repeatable."),
    ] = None,
    override_limits: OverrideOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show errors and the result only.")] = False,
    json: JsonOption = False,
    coordinator: CoordinatorOption = None,
    process: ProcessOption = None,
    processes: ProcessesOption = None,
):
    """Continue a run. Keys that are not frozen may be changed; each change is recorded in events.jsonl."""
    from aurora_train.check.intent import for_resume
    from aurora_train.cli.train import go
    from aurora_train.machine.place import set_place
    from aurora_train.machine.processes import told

    set_place(coordinator, process, processes)
    with told():
        _refuse_absent(run)
        config, known, changes = for_resume(run, overrides or [], allow_change or [])
    with joined(config, replan=replan):
        return go(config, known, quiet=quiet, json=json, changes=changes, replan=replan,
                  override_limits=override_limits)  # fmt: skip


def _refuse_absent(folder: str) -> None:
    """UserError on a machine that does not have the run folder, because it shares no disk with process 0's."""
    from aurora_train.errors import UserError
    from aurora_train.machine.place import place
    from aurora_train.run import Run

    if place().index > 0 and not Run(folder).config.is_file():
        raise UserError("this machine does not have that run folder", where=folder,
                        hint="machines that share no disk continue a run by the command that started it: "
                        "aurora train CONFIG --run DIR checkpoint.gather=true")  # fmt: skip
