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
    devices: Annotated[
        int | None, typer.Option("--devices", metavar="N", min=1, help="How many devices of --machine, over all boxes.")
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
    from aurora_train.record.progress import preparation

    if capacity:
        _refuse_beside_capacity(CONFIG=config, **{"--budget": budget, "--pareto": pareto, "--devices": devices})
        return _show_capacity(machine, bool(compile), json)
    if config is None:
        raise UserError("a plan needs a config", where="CONFIG", hint="aurora plan quickstart, or --capacity")
    if devices is not None and machine is None:
        raise UserError("the devices of this machine are counted, not given", where="--devices",
                        hint="--machine NAME --devices N plans for those of another one")  # fmt: skip
    with preparation(quiet=json) as progress:
        plan = _plan(config, overrides or (), machine, devices, budget, compile is not False, progress)
    from aurora_train.tools import report_plan as report

    if json:
        print_json(report.document(plan))
    else:
        report.show(plan)
    if pareto:
        from aurora_train.tools.pareto import pareto_svg

        pareto_svg(plan, pareto)


def _show_capacity(machine: str | None, verify: bool, json: bool) -> None:
    from aurora_train.record.progress import preparation
    from aurora_train.tools.report_capacity import show_capacity

    with preparation(quiet=json) as progress:
        figures = _capacity(machine, progress, verify=verify)
    (print_json if json else show_capacity)(figures)


def _plan(config: str, overrides, machine: str | None, devices: int | None, budget: str | None, verify: bool, progress):
    """The plan of a config for a machine (None: this one)."""
    from aurora_train.config import load, parse_bytes
    from aurora_train.machine.profile import prepare_environment

    loaded, limit = load(config, overrides), None  # None leaves it to the config
    if budget not in (None, "auto"):
        try:
            limit = parse_bytes(budget)
        except ValueError as fault:
            raise UserError(f"{budget!r} {fault}", where="--budget", hint="--budget 96GB") from None
    prepare_environment(loaded)
    from aurora_train.machine.precision import settled
    from aurora_train.train.beginning import Beginning
    from aurora_train.train.planning import plan_config

    loaded = settled(loaded, machine=machine)
    recipe = Beginning.of(loaded).recipe
    return plan_config(
        loaded, recipe, machine=machine, devices=devices, budget=limit, verify=verify, progress=progress
    )


def _refuse_beside_capacity(**about_one_run) -> None:
    for name, value in about_one_run.items():
        if value is not None:
            raise UserError(
                f"--capacity describes a machine, but {name} describes one run", where=name,
                hint="aurora plan --capacity",
            )  # fmt: skip


def _capacity(machine: str | None, progress, *, verify: bool) -> dict:
    """What a machine (None: this one) can hold."""
    from aurora_train.machine.profile import prepare_environment

    prepare_environment()
    from aurora_train.tools.capacity import capacity

    return capacity(machine, progress, verify=verify)
