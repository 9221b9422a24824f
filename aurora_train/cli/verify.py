"""`aurora verify`: check that a run's checkpoints hold the bytes that were saved, or repeat an export's proof."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, RunArgument, print_json

EXAMPLE = "aurora verify runs/quickstart-1a2b3c4d --step 400"


DAMAGED = 3  # exit status; 1 means that a pipe broke


def command(
    run: RunArgument,
    step: Annotated[int | None, typer.Option("--step", min=0, help="Only this checkpoint; by default all.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show the result only.")] = False,
    json: JsonOption = False,
):
    """Read every byte of a run's checkpoints and compare it with what was saved. Exit status 3 for damage.

    RUN may be an export: then its files are compared with its record, and its proof is repeated.
    """
    from aurora_train.checkpoint.audit import committed
    from aurora_train.errors import UserError
    from aurora_train.record.progress import preparation
    from aurora_train.run import Run
    from aurora_train.tools.checkpoints import verify

    if (run / "proof.json").is_file() and not (run / "checkpoints").is_dir():
        return _verify_export(run, json)
    folder = Run.existing(run).checkpoints
    steps = committed(folder)
    if not steps:
        raise UserError("this run has no checkpoint yet", where=str(run))
    if step is not None and step not in steps:
        available = ", ".join(map(str, steps))
        raise UserError(f"no checkpoint of step {step}", where=str(run), hint=f"there are: {available}")
    with preparation(quiet=quiet or json) as progress:
        rows = verify(folder, steps if step is None else [step],
                      lambda done, in_all: progress(done, in_all, "reading checkpoints"))  # fmt: skip
    damaged = [row for row in rows if row["faults"]]
    if json:
        print_json({"run": str(run), "intact": not damaged, "checkpoints": rows})
    else:
        _show(rows)
    if damaged:
        raise typer.Exit(DAMAGED)


def _verify_export(folder, json: bool) -> None:
    from aurora_train.interop import proof as of_language_models
    from aurora_train.run import Run
    from aurora_train.tools import exported

    if Run(folder).is_export():
        from aurora_train.loading import load

        found = exported.repeat(folder, lambda path: load(path, by="verify"))
    else:
        found = of_language_models.repeat(folder)
    if json:
        shown = ("kind", "dtype", "family", "format", "says")
        proof = {name: found["proof"][name] for name in shown if name in found["proof"]}
        print_json({"export": str(folder), "intact": not found["faults"], "faults": found["faults"], "proof": proof})
    elif found["faults"]:
        print("\n".join(f"{folder}: {line}" for line in found["faults"]))
    else:
        print(f"{folder}: as exported; proof ({found['proof']['kind']}) holds: {found['proof']['says']}")
    if found["faults"]:
        raise typer.Exit(DAMAGED)


def _show(rows: list[dict]) -> None:
    from aurora_train.checkpoint.frozen import FOLDER
    from aurora_train.units import counted, size

    for row in rows:
        name = "shared by all" if row["step"] is None else f"step {row['step']}"
        if not row["faults"]:
            print(f"{name}: intact ({counted(row['files'], 'file')}, {size(row['bytes'])})")
        for line in row["faults"]:
            print(f"{name}: damaged: {line}")
    steps = [row for row in rows if row["step"] is not None]
    if any(row["faults"] and Path(row["folder"]).name == FOLDER for row in rows):
        print("Every checkpoint needs the frozen parameters, which are stored once: restore that folder from a copy.")
    elif all(row["faults"] for row in steps):
        print("None of these checkpoints can be resumed from: restore one from a copy.")
    elif any(row["faults"] for row in rows):
        print("`aurora resume RUN` sets damaged checkpoints aside and continues from the newest intact one.")
