"""`aurora plan`: what a run would need in memory, what is recomputed to make it fit, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, Overrides, print_json
from aurora_train.errors import UserError

EXAMPLE = "aurora plan quickstart --machine dgx-spark --pareto choices.svg"


def command(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A YAML file or a bundled config; not needed with --capacity."),
    ] = None,
    overrides: Overrides = None,
    machine: Annotated[
        str | None, typer.Option("--machine", metavar="NAME", help="Plan for this machine; else for the one at hand.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="SIZE", help="Bytes a device, such as 96GB; else memory.budget.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Compile the step to check its bytes; the default but with --capacity."
        ),
    ] = None,
    capacity: Annotated[bool, typer.Option("--capacity", help="Show what sizes of model the machine holds.")] = False,
    pareto: Annotated[
        Path | None, typer.Option("--pareto", metavar="FILE.svg", help="Draw memory against recomputation.")
    ] = None,
    json: JsonOption = False,
):
    """Plan the memory of a run without running it, for this machine or another. Nothing is trained."""
    if capacity:
        refuse_beside_capacity(config, budget, pareto)
        return show_capacity(machine, json, verify=bool(compile))
    if config is None:
        raise UserError("a plan needs a config", where="CONFIG", hint="aurora plan quickstart, or --capacity")
    plan = make(config, overrides or (), machine, budget, verify=compile is not False, quiet=json)
    from aurora_train.memory import report

    if json:
        print_json(report.document(plan))
    else:
        report.show(plan)
    if pareto:
        from aurora_train.tools.pareto import pareto_svg

        pareto_svg(plan, pareto)


def make(config: str, overrides, machine: str | None, budget: str | None, *, verify: bool, quiet: bool):
    """The plan of a config for a machine (None: this one), with the progress of making it on standard error."""
    from aurora_train.config import load

    loaded = load(config, overrides)
    limit = budget_of(budget)
    from aurora_train.machine.profile import prepare_environment

    prepare_environment(loaded)
    from aurora_train.record.progress import preparation
    from aurora_train.train.beginning import Beginning
    from aurora_train.train.planning import plan_config
    from aurora_train.train.precision import settled

    loaded = settled(loaded, machine=machine)
    recipe = Beginning.of(loaded).recipe
    with preparation(quiet=quiet) as progress:
        return plan_config(loaded, recipe, machine=machine, budget=limit, verify=verify, progress=progress)


def budget_of(text: str | None) -> int | None:
    """`--budget` in bytes; "auto" and nothing leave it to the config."""
    from aurora_train.config import parse_bytes

    if text is None or text == "auto":
        return None
    try:
        return parse_bytes(text)
    except ValueError as fault:
        raise UserError(f"{text!r} {fault}", where="--budget", hint="--budget 96GB") from None


def refuse_beside_capacity(config, budget, pareto) -> None:
    """What says something about one run says nothing about a machine."""
    given = {"CONFIG": config, "--budget": budget, "--pareto": pareto}
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"--capacity is about a machine, {name} about one run", where=name, hint="aurora plan --capacity"
            )


def show_capacity(machine: str | None, json: bool, *, verify: bool) -> None:
    """Print what a machine (None: this one) can hold."""
    from aurora_train.machine.profile import prepare_environment

    prepare_environment()
    from aurora_train.record.progress import preparation
    from aurora_train.tools import report_capacity
    from aurora_train.tools.capacity import capacity

    with preparation(quiet=json) as progress:
        found = capacity(machine, progress, verify=verify)
    if json:
        print_json(found)
    else:
        report_capacity.show_capacity(found)
