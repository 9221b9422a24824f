"""`aurora report`: write a run's report.html from its records."""

from __future__ import annotations

from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, RunArgument, open_page, print_json

EXAMPLE = "aurora report runs/quickstart-1a2b3c4d --open"


def command(
    run: RunArgument,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    json: JsonOption = False,
):
    """Write report.html: one self-contained file with score, curves, samples, data, config and machine."""
    from aurora_train.tools.report import write_report

    path = write_report(run)
    if json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        print(path)
    if open_it:
        open_page(path)
