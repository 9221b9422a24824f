"""`aurora runs`: the runs of a folder, how their configs differ, and their results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, print_json

EXAMPLE = "aurora runs runs/quickstart-sweep"


def command(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A folder of runs, or one run; by default runs/.")
    ] = None,
    json: JsonOption = False,
):
    """List runs, newest first: state, step, score or validation loss, size, age, and the keys that differ."""
    from aurora_train.tools.runs import DEFAULT, document, listing, show

    rows = listing(folder)
    if json:
        print_json(document(rows))
    elif rows:
        from aurora_train.tools.report_plan import plain_console

        show(rows, plain_console())
    else:
        print(f"no runs in {folder or DEFAULT}: `aurora train CONFIG` starts one, such as `aurora train quickstart`")
