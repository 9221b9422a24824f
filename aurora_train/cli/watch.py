"""`aurora watch`: a live page of runs, in the browser."""

from __future__ import annotations

import contextlib
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import (
    AllowHostOption,
    HostOption,
    JsonOption,
    TokenFileOption,
    print_json,
    until_asked,
)

EXAMPLE = "aurora watch runs --open"


def command(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A folder of runs, or one run; by default runs/.")
    ] = None,
    host: HostOption = None,
    port: Annotated[int, typer.Option("--port", help="The port; 0 takes any that is free.")] = 8050,
    token_file: TokenFileOption = None,
    allow_host: AllowHostOption = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    json: JsonOption = False,
):
    """Show runs in the browser while they train, until Ctrl-C: curves, memory, energy, samples, events, side by side.

    It only reads, and runs need not be started for it. docs/watch.md says what is shown. Needs the extra [serve].
    """
    from aurora_train.serve.address import address
    from aurora_train.serve.http import refuse_missing
    from aurora_train.tools.runs import DEFAULT
    from aurora_train.units import counted
    from aurora_train.watch.server import Watching

    refuse_missing("starlette", "uvicorn", by="aurora watch")
    place = address(host, port, None, token_file)
    with until_asked() as stop, contextlib.closing(Watching(folder, place, allow_host or ())) as watching:
        runs = counted(watching.found, "run")
        print(f"{runs} in {folder or DEFAULT}: {watching.url}/ ; Ctrl-C ends it", file=sys.stderr)
        if json:
            print_json({"url": watching.url, "folder": str(Path(folder or DEFAULT).absolute()), "runs": watching.found})
            sys.stdout.flush()
        if open_it:
            webbrowser.open(watching.url)
        watching.run(stop)
