"""`aurora doctor`: what this machine is, what is wrong with it, and the command that fixes it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, print_json

EXAMPLE = "aurora doctor --run-folder runs"


def command(
    run_folder: Annotated[Path, typer.Option(help="Where runs will be kept: its disk is tested.")] = Path("runs"),
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this device while it is idle, for the planner's times.")
    ] = False,
    json: JsonOption = False,
):
    """Check devices, memory, speed, disk and packages. Exit status 1 if training cannot work here."""
    from aurora_train.machine.profile import prepare_environment

    prepare_environment()
    from aurora_train.tools.doctor import examine, show

    checks = examine(run_folder, calibrate)
    if json:
        print_json({"ok": not any(check.fatal for check in checks), "checks": [asdict(check) for check in checks]})
    else:
        show(checks)
    return int(any(check.fatal for check in checks))
