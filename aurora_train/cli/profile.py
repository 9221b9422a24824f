"""`aurora profile`: where the time of a step goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import ConfigArgument, JsonOption, Overrides, print_json
from aurora_train.errors import UserError
from aurora_train.files import make_folder

EXAMPLE = "aurora profile quickstart --steps 5 --out profiles/quickstart"


def command(
    config: ConfigArgument,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many steps to trace.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: profiles/NAME.")] = None,
    json: JsonOption = False,
):
    """Trace a few real steps: device time, host time, waits for data, a save, and time by part of the model.

    The trace opens in Perfetto (perfetto_trace.json.gz) and in xprof (the whole folder). No run folder is changed.
    """
    from aurora_train.config import load

    loaded = load(config, overrides or ())
    folder = out or Path("profiles") / loaded.name
    try:
        make_folder(folder)
    except OSError as error:
        raise UserError(
            f"cannot make the profile's folder: {error.strerror}", where=str(folder), hint="--out with another name"
        ) from error
    if any(folder.iterdir()):
        raise UserError(
            "a profile needs a folder of its own", where=str(folder), why="the folder exists and is not empty",
            hint="--out with another name, or remove it",
        )  # fmt: skip
    from aurora_train.machine.profile import prepare_environment

    prepare_environment(loaded)
    from aurora_train.record.progress import preparation
    from aurora_train.tools.profile import profile

    with preparation(quiet=json) as progress:
        result = profile(loaded, folder, steps=steps, progress=progress)
    if json:
        print_json(document(result))
    else:
        show(result)


def document(result) -> dict:
    """A `tools.profile.Profile` as a JSON document: seconds per step, and the table of operations."""
    line = result.timeline
    return {
        "steps": result.steps, "step_s": line.step, "device_busy_s": line.busy, "host_s": line.host,
        "save_blocks_s": result.save, "compile_s": result.compile, "product_flops": result.product_flops,
        "plan": result.plan, "trace": str(result.trace),
        "operations": [row._asdict() for row in line.rows],
    }  # fmt: skip


def show(result) -> None:
    """Print a `tools.profile.Profile` as a table and a few lines."""
    from aurora_train.machine.rates import flop_rate
    from aurora_train.record.console import plain_console, table_of
    from aurora_train.units import count

    line, console = result.timeline, plain_console()
    console.print(f"a step of {1e3 * line.step:.1f} ms, mean of {result.steps}")
    rows = [
        (row.part, row.kind, f"{1e3 * row.seconds:.1f}", f"{row.share:.1%}", f"{row.count:.0f}")
        for row in line.rows if row.share >= 0.001
    ]  # fmt: skip
    console.print(table_of("part", "kind", "ms", "share", "operations", left=(0, 1), rows=rows))
    host = ", ".join(f"{name} {1e3 * took:.1f} ms" for name, took in line.host.items())
    flops = result.product_flops
    rate = f"{count(flops)}FLOP in products, {flop_rate(flops / line.step)}" if flops else "FLOP unknown"
    console.print(
        f"{rate}; device busy {1e3 * line.busy:.1f} ms ({line.busy / line.step:.1%}); host: {host}\n"
        f"a save blocks training for {1e3 * result.save:.0f} ms; compiled in {result.compile:.1f} s\n"
        f"{result.plan}\n"
        f"for Perfetto: {result.trace}\nfor xprof: xprof --logdir {result.trace.parents[3]}",
        soft_wrap=True,
    )
