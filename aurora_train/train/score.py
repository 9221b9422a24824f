"""The number a user would quote: the recipe's score of a model, its baselines and its samples, kept in scores.json."""

from __future__ import annotations

import time

from aurora_train import files
from aurora_train.nn.ops import asking
from aurora_train.random import stream

_SHOWN_APART = ("tables", "notes")


def score_run(recipe, config, run, evaluator, state, step: int, progress, *, baselines: bool = True) -> dict:
    """Score `state` on the test split beside the recipe's baselines; written to scores.json and returned."""
    began = time.perf_counter()
    run.workdir.mkdir(exist_ok=True)
    key = stream(config.train.seed, "score")
    result = recipe.score(evaluator.predictor(state), "test", key, run.workdir, progress)
    rivals = recipe.baselines(run.workdir, progress) if baselines else {}
    with asking(config.train.forms.asked):
        samples = recipe.samples(evaluator.model(state), stream(config.train.seed, "samples"))
    if samples:
        files.write_json(run.samples / f"step-{step}.json", samples)
    record = {
        "headline": next(iter(result)),
        "score": {k: v for k, v in result.items() if k not in _SHOWN_APART} | shares(samples),
        "baselines": {k: v for k, v in rivals.items() if k not in _SHOWN_APART},
        "tables": result.get("tables", []) + rivals.get("tables", []),
        "notes": result.get("notes", []) + rivals.get("notes", []),
        "step": step,
        "seconds": time.perf_counter() - began,
    }
    files.write_json(run.scores, record)
    return record


def shares(samples: list[dict]) -> dict[str, float]:
    """The share of samples that pass each check a recipe made of them (its boolean fields)."""
    checks = {name for sample in samples for name, value in sample.items() if isinstance(value, bool)}
    return {f"samples_{name}": sum(bool(s.get(name)) for s in samples) / len(samples) for name in sorted(checks)}
