"""`aurora checkpoints`: what a run has saved."""

from __future__ import annotations

import typer

from aurora_train.cli.common import JsonOption, RunArgument, print_json
from aurora_train.cli.verify import DAMAGED

EXAMPLE = "aurora checkpoints runs/quickstart-1a2b3c4d"


def command(run: RunArgument, json: JsonOption = False):
    """List a run's checkpoints: step, size, time, score, why each is kept, and whether its files are complete."""
    from aurora_train.config.schema import Checkpoint
    from aurora_train.config.yaml import read_file
    from aurora_train.run import Run
    from aurora_train.tools.checkpoints import listing

    known = Run.existing(run)
    policy = Checkpoint(**read_file(known.config).value.get("checkpoint", {}))  # the recipe's code is not needed
    rows = listing(known.checkpoints, keep=policy.keep, keep_every=policy.keep_every, best=policy.best)
    if json:
        print_json({"run": str(known.folder), "checkpoints": rows})
    elif not rows:
        print(f"no checkpoint yet; the first comes at step {policy.every}")
    else:
        _show(rows)
    if any(row["state"] not in _FINE for row in rows):
        raise typer.Exit(DAMAGED)


_FINE = ("whole", "unfinished", "set aside")


def _show(rows: list[dict]) -> None:
    from aurora_train.record.console import plain_console, table_of
    from aurora_train.units import decimal, size

    shown = [
        ("record" if row["step"] is None else row["step"], size(row["bytes"]),
         (row["saved"] or "").replace("T", " ").removesuffix("+00:00"),
         "" if row["score"] is None else decimal(row["score"]), row["kept"] or "",
         row["state"] if row["state"] in _FINE else "damaged")
        for row in rows
    ]  # fmt: skip
    columns = ("step", "size", "saved (UTC)", "loss", "kept as", "files")
    plain_console().print(table_of(*columns, left=(2, 4, 5), rows=shown))
    for row in rows:
        if row["state"] not in _FINE:
            print(f"damaged: {row['folder']}: {row['state']}")
    print("Only names and sizes were checked; `aurora verify RUN` reads every byte.")
