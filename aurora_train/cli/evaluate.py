"""`aurora evaluate`: the recipe's score of a trained run, beside its baselines."""

from __future__ import annotations

from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, RunArgument, print_json

EXAMPLE = "aurora evaluate runs/first --step 400 --json"


def command(
    run: RunArgument,
    step: Annotated[int | None, typer.Option("--step", help="The checkpoint to score; else the newest.")] = None,
    baselines: Annotated[bool, typer.Option(help="Score the recipe's simple rivals too.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show errors and the result only.")] = False,
    json: JsonOption = False,
):
    """Score a trained run on its test data. Writes scores.json, samples/ and work/ in the run folder."""
    from aurora_train.loading import load
    from aurora_train.observe.progress import preparation

    with preparation(quiet=quiet) as progress:
        trained = load(run, step, progress=progress)
    from aurora_train.run import Run
    from aurora_train.train.score import score_run

    with preparation(quiet=quiet) as progress:
        record = score_run(
            trained.recipe, trained.config, Run(run), trained.evaluator, trained.state, trained.step, progress,
            baselines=baselines,
        )
    if json:
        print_json(record)
        return
    print(f"step {trained.step}")
    for name, value in {**record["score"], **record["baselines"]}.items():
        print(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
