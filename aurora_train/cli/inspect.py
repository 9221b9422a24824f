"""`aurora inspect`: show what a batch contains; `aurora inspect-batch`: the one that a run's step was trained on."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from aurora_train.cli.common import ConfigArgument, JsonOption, Overrides, RunArgument, print_json

EXAMPLE = "aurora inspect quickstart --step 3 --rows 2"
EXAMPLE_OF_A_RUN = "aurora inspect-batch runs/quickstart-1a2b3c4d 120 --rows 2"

Rows = Annotated[int, typer.Option(min=0, help="How many rows to print.")]


def command(
    config: ConfigArgument,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=0, help="The data step, from 0.")] = 0,
    split: Annotated[Literal["train", "validation"], typer.Option(help="Which split.")] = "train",
    rows: Rows = 4,
    example: Annotated[
        int | None, typer.Option(min=0, help="Show this example alone, by its number in the split, from 0.")
    ] = None,
    json: JsonOption = False,
):
    """Prepare the data of a config and show one batch or example: text, documents, tokens, what is learned."""
    from aurora_train.config import load

    _show(load(config, overrides or ()), None, split, step, rows, json, example)


def of_a_run(
    run: RunArgument,
    step: Annotated[int, typer.Argument(min=1, help="A step of the run, from 1, or one that it rewound.")],
    rows: Rows = 4,
    json: JsonOption = False,
):
    """Show the batch of a run's step: text, documents, tokens, and which examples have non-finite numbers."""
    from aurora_train.config import load_resolved
    from aurora_train.record import metrics as logs
    from aurora_train.run import Run
    from aurora_train.train.bad_numbers import data_step_of_step

    known = Run.existing(run)
    config = load_resolved(known.folder)
    data_step = data_step_of_step(step, logs.read(known.metrics), logs.read(known.events), str(known.folder))
    _show(config, known, "train", data_step, rows, json, None, step=step)


def _show(config, run, split: str, data_step: int, rows: int, json: bool, example: int | None, **more):
    from aurora_train.machine.profile import prepare_environment

    prepare_environment(config)  # a recipe may measure its data by the model that the run starts from
    from aurora_train.check.inspection import inspect_batch, inspect_example, show
    from aurora_train.machine.precision import settled
    from aurora_train.record.console import plain_console
    from aurora_train.record.progress import preparation
    from aurora_train.train.beginning import Beginning

    config = settled(config, run)
    beginning = Beginning.of(config, run)
    with preparation(quiet=json) as progress:
        beginning.ready(progress)
    source, train = beginning.recipe.data(split), config.train
    if example is None:
        facts = inspect_batch(source, split, train.seed, train.batch, data_step, rows)
    else:
        facts = inspect_example(source, split, example)
    if json:
        print_json(facts | more)
    else:
        show(facts, plain_console())
