"""`aurora inspect-batch`: show the batch that a step of a run was trained on."""

from __future__ import annotations

from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, RunArgument, print_json

EXAMPLE = "aurora inspect-batch runs/quickstart-1a2b3c4d 120 --rows 2"


def command(
    run: RunArgument,
    step: Annotated[int, typer.Argument(min=1, help="A step of the run, from 1, or one that it rewound.")],
    rows: Annotated[int, typer.Option(min=0, help="How many rows to print.")] = 4,
    json: JsonOption = False,
):
    """Show the batch of a run's step: text, documents, tokens, and which examples have non-finite numbers."""
    from rich.console import Console

    from aurora_train.config import load_resolved
    from aurora_train.data.inspection import inspect_batch, show
    from aurora_train.record import metrics as logs
    from aurora_train.record.progress import preparation
    from aurora_train.run import Run
    from aurora_train.train.bad_numbers import data_step_of_step
    from aurora_train.train.beginning import Beginning

    known = Run.existing(run)
    config = load_resolved(known.folder)
    data_step = data_step_of_step(step, logs.read(known.metrics), logs.read(known.events), str(known.folder))
    with preparation(quiet=json) as progress:
        source = Beginning.of(config, known).ready(progress)
    facts = inspect_batch(source, "train", config.train.seed, config.train.batch, data_step, rows) | {"step": step}
    if json:
        print_json(facts)
    else:
        show(facts, Console())
