"""`aurora evaluate`: the recipe's score of a trained run or of an open model, next to its baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, ModelArgument, print_json
from aurora_train.errors import UserError

EXAMPLE = "aurora evaluate runs/first --on other.jsonl"


def command(
    run: ModelArgument,
    step: Annotated[int | None, typer.Option("--step", help="The checkpoint to score; by default the newest.")] = None,
    on: Annotated[
        str | None, typer.Option("--on", metavar="PATH", help="Score on all of this data, not the test split.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Score with this recipe file, not the run's own.")
    ] = None,
    baselines: Annotated[
        bool | None,
        typer.Option(help="Score the baselines too; by default earlier scores are reused if nothing has changed."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", metavar="NAME[,NAME]", help="Ask these tasks of lm-eval, not the recipe's own score."),
    ] = None,
    suite_tasks: Annotated[
        Path | None, typer.Option("--suite-tasks", metavar="FOLDER", help="A folder of task files for --suite.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N examples of each task.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show errors and the result only.")] = False,
    json: JsonOption = False,
):
    """Score a trained run on its test data, or a run or an open model on other data (not part of the run's record).

    Of a run, it writes scores.json, samples/ and work/ in the run folder; with --on, scores-on/NAME.json; with --suite,
    suites/TASK.json. If that folder cannot be written, the score is shown and not kept. Exit status 4 if it exceeds the
    run's limits.
    """
    _refuse_both(suite, {"--on": on, "--baselines": baselines, "--recipe": recipe},
                 {"--suite-tasks": suite_tasks, "--limit": limit})  # fmt: skip
    if suite is not None:
        return _of_a_suite(run, step, suite, suite_tasks, limit, quiet, json)
    return _of_the_score(run, step, on, recipe, baselines, quiet, json)


def _of_the_score(run: Path, step: int | None, on, recipe: Path | None, baselines: bool | None, quiet, json) -> int:
    from aurora_train.check.limits import EXCEEDED
    from aurora_train.lineage.following import catch_up
    from aurora_train.loading import load
    from aurora_train.record.console import show_table
    from aurora_train.record.progress import preparation
    from aurora_train.run import Run

    with preparation(quiet=quiet) as progress:
        trained = load(run, step, recipe=recipe, by="evaluate", progress=progress)
        from aurora_train.score import score_lines, score_loaded

        try:
            record = score_loaded(trained, progress, on=on, baselines=baselines)
        except UserError as fault:
            raise _without_keys(fault, on) from fault
    catch_up(Run(trained.run))
    if json:
        print_json(record)
    else:
        print("\n".join([f"step {trained.step}", *score_lines(record)]))
        if record.get("before"):
            show_table(record["before"]["table"])
    return EXCEEDED if record.get("exceeded") else 0


def _refuse_both(suite: str | None, of_the_score: dict, of_a_suite: dict) -> None:
    """UserError for an option that would be ignored: tasks of lm-eval bring their own data, and have no baselines."""
    unused = of_the_score if suite is not None else of_a_suite
    given = next((name for name, value in unused.items() if value is not None), None)
    if given:
        why = "the tasks of --suite are scored on their own data" if suite is not None else "it belongs to --suite"
        raise UserError(f"{given} would have no effect", where=given, why=why, hint=f"leave {given} out")


def _of_a_suite(run: Path, step: int | None, suite: str, folder: Path | None, limit: int | None, quiet, json) -> None:
    from aurora_train.evals.suite import asked, run_suite, suite_table
    from aurora_train.lineage.following import catch_up
    from aurora_train.loading import load
    from aurora_train.record.console import show_table
    from aurora_train.record.progress import preparation
    from aurora_train.run import Run

    tasks = asked(suite, folder, limit)
    with preparation(quiet=quiet) as progress:
        trained = load(run, step, by="evaluate", progress=progress)
        record = run_suite(trained, tasks, limit, progress)
    catch_up(Run(trained.run))
    if json:
        print_json(record)
    else:
        show_table(suite_table(record))


def _without_keys(fault: UserError, on: str | None) -> UserError:
    """The same error without a hint to set a key of the data: this verb takes none, since a run keeps its config."""
    if not str(fault.where).startswith("data."):
        return fault
    settable = fault.hint is not None and "data." in fault.hint
    if on is not None:
        return UserError(fault.what, where=f"--on {on}", why=fault.why, hint=None if settable else fault.hint)
    hint = "restore the data where they were, or score other data with --on PATH" if settable else fault.hint
    return UserError(fault.what, where=fault.where, why=fault.why, hint=hint)
