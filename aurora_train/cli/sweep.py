"""`aurora sweep`: train every combination of some values, in turn, and show the results in one table."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from aurora_train.cli.common import ConfigArgument, JsonOption, print_json

EXAMPLE = "aurora sweep quickstart optimizer.lr=3e-3,1e-2,3e-2 train.seed=0,1 train.steps=200"


def command(
    config: ConfigArgument,
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY.PATH=A,B,C",
            help="Values of a key, split at commas outside brackets and quotes; a key with one value is an override.",
        ),
    ],
    run: Annotated[
        str | None, typer.Option("--run", metavar="DIR", help="Folder of the runs; by default runs/NAME-sweep.")
    ] = None,
    online: Annotated[bool, typer.Option("--online", help="Let hub: sources and models use the network.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show errors and the result only.")] = False,
    json: JsonOption = False,
):
    """Train every combination of the values, one after another. The same command continues where it stopped."""
    from aurora_train.tools import sweep

    made = sweep.members(config, overrides, run)

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    going = sweep.Sweep(config, made, tell, quiet=quiet, online=online)
    results = going.run()
    if json:
        print_json(sweep.document(results, going.stopped))
    else:
        sweep.show(results)
    if going.stopped:
        again = shlex.join(["aurora", *sys.argv[1:]])
        print(f"stopped by {going.stopped}; continue with the same command: {again}", file=sys.stderr)
        return sweep.STOPPED
    return int(any(result.row.state != "finished" for result in results))
