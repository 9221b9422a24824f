"""The number a user would quote: the recipe's score of a model, its baselines and its samples, kept in scores.json."""

from __future__ import annotations

import time
from pathlib import Path

from aurora_train import files
from aurora_train.nn.ops import asking
from aurora_train.random import stream
from aurora_train.run import Run
from aurora_train.train.session import refuse_other_data

_SHOWN_APART = ("tables", "notes")


def score_run(recipe, config, run, evaluator, state, step: int, progress, *, baselines: bool = True) -> dict:
    """Score `state` on the test split beside the recipe's baselines; written to scores.json and returned."""
    began = time.perf_counter()
    record = _measured(recipe, config, run, evaluator, state, progress, baselines)
    with asking(config.train.forms.asked):
        samples = recipe.samples(evaluator.model(state), stream(config.train.seed, "samples"))
    if samples:
        files.write_json(run.samples / f"step-{step}.json", samples)
    record["score"] |= shares(samples)
    record |= {"step": step, "seconds": time.perf_counter() - began}
    files.write_json(run.scores, record)
    return record


def score_loaded(trained, progress, *, on: str | None = None, baselines: bool = True) -> dict:
    """Score a run that was loaded on its own test split, as `score_run`, or on all of the data at the path `on`.

    The score of other data is written to `scores-on/<its name>.json` in the run's folder. Raises UserError where the
    run's data is not what it trained on.
    """
    run, recipe = Run(trained.run), trained.recipe
    parts = trained.evaluator, trained.state
    if on is None:
        recipe.prepare(progress)
        refuse_other_data(run, recipe.data("train"))
        return score_run(recipe, trained.config, run, *parts, trained.step, progress, baselines=baselines)
    began, place = time.perf_counter(), Path(on).expanduser().absolute()
    other = recipe.on(str(place))
    other.prepare(progress)
    record = _measured(other, trained.config, run, *parts, progress, baselines)
    record |= {"on": str(place), "step": trained.step, "seconds": time.perf_counter() - began}
    files.write_json(run.folder / "scores-on" / f"{place.name}.json", record)
    return record


def _measured(recipe, config, run, evaluator, state, progress, baselines: bool) -> dict:
    run.workdir.mkdir(exist_ok=True)
    key = stream(config.train.seed, "score")
    result = recipe.score(evaluator.predictor(state), "test", key, run.workdir, progress)
    rivals = recipe.baselines(run.workdir, progress) if baselines else {}
    return {
        "headline": next(iter(result)),
        "score": {k: v for k, v in result.items() if k not in _SHOWN_APART},
        "baselines": {k: v for k, v in rivals.items() if k not in _SHOWN_APART},
        "tables": result.get("tables", []) + rivals.get("tables", []),
        "notes": result.get("notes", []) + rivals.get("notes", []),
        "recipe_sha256": config.recipe_sha256,
    }


def shares(samples: list[dict]) -> dict[str, float]:
    """The share of samples that pass each check a recipe made of them (its boolean fields)."""
    checks = {name for sample in samples for name, value in sample.items() if isinstance(value, bool)}
    return {f"samples_{name}": sum(bool(s.get(name)) for s in samples) / len(samples) for name in sorted(checks)}
