"""`aurora plan`: how much memory a run would need, what is recomputed to make it fit, and why."""

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
        str | None, typer.Option("--machine", metavar="NAME", help="Plan for this machine, not the local one.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="SIZE", help="Bytes per device, such as 96GB, not memory.budget.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Compile the step to check its bytes; the default without --capacity."
        ),
    ] = None,
    capacity: Annotated[bool, typer.Option("--capacity", help="Show which sizes of model fit on the machine.")] = False,
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
    from aurora_train.tools import report_plan as report

    if json:
        print_json(report.document(plan))
    else:
        report.show(plan)
    if pareto:
        from aurora_train.tools.pareto import pareto_svg

        pareto_svg(plan, pareto)


def make(config: str, overrides, machine: str | None, budget: str | None, *, verify: bool, quiet: bool):
    """The plan of a config for a machine (None: this one). Progress is shown on standard error."""
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
    """`--budget` in bytes; None, which leaves it to the config, for "auto" or if it is not given."""
    from aurora_train.config import parse_bytes

    if text is None or text == "auto":
        return None
    try:
        return parse_bytes(text)
    except ValueError as fault:
        raise UserError(f"{text!r} {fault}", where="--budget", hint="--budget 96GB") from None


def refuse_beside_capacity(config, budget, pareto) -> None:
    """UserError for an argument about one run beside `--capacity`, which is about a machine."""
    given = {"CONFIG": config, "--budget": budget, "--pareto": pareto}
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"--capacity describes a machine, but {name} describes one run", where=name,
                hint="aurora plan --capacity",
            )


def show_capacity(machine: str | None, json: bool, *, verify: bool) -> None:
    """Print what a machine (None: this one) can hold."""
    from aurora_train.machine.profile import prepare_environment

    prepare_environment()
    from aurora_train.record.progress import preparation
    from aurora_train.tools import report_capacity
    from aurora_train.tools.capacity import capacity

    with preparation(quiet=json) as progress:
        figures = capacity(machine, progress, verify=verify)
    if json:
        print_json(figures)
    else:
        report_capacity.show_capacity(figures)
