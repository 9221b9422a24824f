"""`aurora unit`: print a systemd unit that keeps a run going."""

from __future__ import annotations

from typing import Annotated

import typer

from aurora_train.cli.common import RunArgument

EXAMPLE = "aurora unit runs/first | install -D -m 644 /dev/stdin ~/.config/systemd/user/aurora-first.service"


def command(
    run: RunArgument,
    system: Annotated[
        bool, typer.Option("--system/--user", help="For the machine's own systemd (as root), or the user's.")
    ] = False,
    stop_minutes: Annotated[
        int, typer.Option("--stop-minutes", min=1, help="How long a stop waits for the last save.")
    ] = 10,
    on_failure: Annotated[
        str | None, typer.Option("--on-failure", metavar="UNIT", help="A unit to start when systemd gives up.")
    ] = None,
):
    """Print a systemd unit that continues the run at boot and after a crash, a hang or a power cut."""
    from aurora_train.config.yaml import read_file
    from aurora_train.run import Run
    from aurora_train.tools.unit import unit_text

    known = Run.existing(run)
    on_a_clock = (read_file(known.config).value.get("train") or {}).get("stop_after_minutes") is not None
    print(
        unit_text(known, system=system, stop_minutes=stop_minutes, on_failure=on_failure, stays_stopped=on_a_clock),
        end="",
    )
