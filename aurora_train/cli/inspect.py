"""`aurora inspect`: show what the batch of a step contains."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from aurora_train.cli.common import ConfigArgument, JsonOption, Overrides, print_json
from aurora_train.config import load

EXAMPLE = "aurora inspect quickstart --step 3 --rows 2"


def command(
    config: ConfigArgument,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=0, help="The data step, from 0.")] = 0,
    split: Annotated[Literal["train", "validation"], typer.Option(help="Which split.")] = "train",
    rows: Annotated[int, typer.Option(min=0, help="How many rows to print.")] = 4,
    json: JsonOption = False,
):
    """Prepare the data of a config and show one batch: text, documents, tokens, padding."""
    checked = load(config, overrides or ())

    from rich.console import Console

    from aurora_train.data.inspection import inspect_batch, show
    from aurora_train.record.progress import preparation
    from aurora_train.train.beginning import Beginning

    beginning = Beginning.of(checked)
    with preparation(quiet=json) as progress:
        beginning.ready(progress)
    facts = inspect_batch(beginning.recipe.data(split), split, checked.train.seed, checked.train.batch, step, rows)
    if json:
        print_json(facts)
    else:
        show(facts, Console())
