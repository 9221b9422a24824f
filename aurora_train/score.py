"""Computes the number a user would quote: the score of a model, its baselines and samples, kept in scores.json."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path

from aurora_train import files
from aurora_train import run as runs
from aurora_train.check.blame import recipe_code
from aurora_train.check.limits import exceeded
from aurora_train.check.remarks import remarks_on_losses
from aurora_train.check.results import checked_result, checked_samples
from aurora_train.check.source import refuse_other_data
from aurora_train.config import dump
from aurora_train.errors import UserError
from aurora_train.nn.tracing import tracing
from aurora_train.random import stream
from aurora_train.recipe import makes_experience
from aurora_train.record import metrics as logs
from aurora_train.record.metrics import now
from aurora_train.run import Run
from aurora_train.units import decimal

log = logging.getLogger("aurora_train")

_SHOWN_APART = ("tables", "notes", "plots", "remarks")
_SCORED = "score.json"  # in the folder `before`; written last


def score_run(
    recipe, config, run, evaluator, state, step: int, progress, *, baselines: bool | None = True
) -> dict:
    """Score `state` on the test split beside the recipe's baselines; write the result to scores.json and return it.

    The score's plots are written to plots.json, for the report.

    With `baselines` None, those in scores.json are kept if nothing they depend on has changed (data, recipe, config,
    step, this package, what the score left in the work folder), and computed again otherwise.
    """
    began = time.perf_counter()
    run.workdir.mkdir(exist_ok=True)
    before = files.read_json(run.before / _SCORED)
    record = _measured(recipe, config, run.workdir, evaluator, state, progress)
    if baselines is not False:
        key, known = _depends_on(recipe, config, run, step), files.read_json(run.scores) or {}
        made = known.get("baselines_made") or {}
        if baselines is None and made.get("key") == key:
            record |= {"baselines": known["baselines"], "baselines_made": {**made, "kept": True}}
        else:
            record |= _made(recipe, run.workdir, progress, key)
    record["score"] |= _sampled(recipe, config, run, evaluator, state, step)
    record["exceeded"] = exceeded(recipe, record["score"])
    if not makes_experience(recipe):
        losses = [one["loss"] for one in logs.read(run.metrics) if "loss" in one]
        record["remarks"] += remarks_on_losses(losses, config.optimizer.lr)
    if before is not None:
        record["before"] = {"score": before["score"], "table": _compared(recipe, run, before["score"], record["score"])}
    elif config.evaluate.before:
        record["remarks"].append("the model was not scored before training, because the run had begun already")
    files.write_json(run.plots, record.pop("plots"))
    record |= {"step": step, "seconds": time.perf_counter() - began}
    files.write_json(run.scores, record)
    return record


def score_before(recipe, config, run, evaluator, state, progress) -> None:
    """Score the state with which a run starts on the test split, and keep the result for the comparison at its end.

    What was scored before a kill is kept, if nothing that it depends on has changed since; what a kill interrupted is
    scored again.
    """
    key = [_depends_on(recipe, config, run, 0), recipe.start and recipe.start.digest]
    if files.read_json(run.before / _SCORED, {}).get("key") == key:
        return
    shutil.rmtree(run.before, ignore_errors=True)
    run.before.mkdir()
    record = _measured(recipe, config, run.before, evaluator, state, progress)
    record["score"] |= _sampled(recipe, config, run, evaluator, state, 0)
    for path in run.before.rglob("*"):  # a power cut leaves no score beside half of what it is compared by
        files.sync(path)
    known = {name: record[name] for name in ("score", "tables", "notes")}
    files.write_json(run.before / _SCORED, {"key": key, **known})


def _sampled(recipe, config, run, evaluator, state, step: int) -> dict[str, float]:
    """Write the recipe's samples of a state; return the share that passes each of its checks."""
    with tracing(forms=config.train.forms), recipe_code(recipe, "samples"):
        samples = recipe.samples(evaluator.model(state), stream(config.train.seed, "samples"))
    checked_samples(recipe, samples)
    if samples:
        files.write_json(run.samples / f"step-{step}.json", samples)
    return shares(samples)


def _compared(recipe, run, before: dict, after: dict) -> dict:
    """The table of what training changed: the recipe's own, or one of the numbers that both scores have."""
    with recipe_code(recipe, "compared"):
        table = recipe.compared(run.before, run.workdir)
    if table is not None:
        return checked_result(recipe, {"tables": [table]}, "compared")["tables"][0]
    both = [name for name in after if all(isinstance(score.get(name), float) for score in (before, after))]
    rows = [[name, before[name], after[name], after[name] - before[name]] for name in both]
    return {"title": "Before and after training", "columns": ["", "before", "after", "difference"], "rows": rows}


def score_loaded(trained, progress, *, on: str | None = None, baselines: bool | None = None) -> dict:
    """Score a loaded run on its own test split, as `score_run` does, or on all of the data at the path `on`.

    The score of other data is written to `scores-on/<its name>.json` in the run's folder. Raises UserError if the run's
    data has changed since training, and for an open model or an imported run, which have no data of their own, if `on`
    is None.
    """
    run, recipe = Run(trained.run), trained.recipe
    parts, is_run = (trained.evaluator, trained.state), run.config.is_file()
    if on is None and not is_run:
        raise UserError(f"{trained.run.name} is an open model, and has no test data of its own", where="--on",
                        hint="--on FILE scores it on a text, or on a folder of texts")  # fmt: skip
    if on is None and run.is_export():
        raise UserError(f"{trained.run.name} is an export, and the data of its score is not part of it", where="RUN",
                        hint="score the run that it was made of")  # fmt: skip
    if on is None and "data" not in (files.read_json(run.provenance) or {"data": None}):
        raise UserError(f"{trained.run.name} was imported and not trained, so it has no test data", where="--on",
                        hint="--on FILE scores it on a text, or on a folder of texts")  # fmt: skip
    if on is None:
        recipe.prepare(progress)
        refuse_other_data(run, recipe.data("train"))
        return _scored_where_possible(run, trained, parts, progress, baselines)
    began, place = time.perf_counter(), Path(on).expanduser().absolute()
    if not place.exists():
        raise UserError(f"there is no file or folder {place}", where="--on")
    other = recipe.on(str(place))
    other.prepare(progress)
    evaluator = trained.evaluator if isinstance(other, type(recipe)) else trained.evaluator.under(other)
    with tempfile.TemporaryDirectory() as folder:  # the run's work folder belongs to the score of its own data
        workdir = Path(folder)
        record = _measured(other, trained.config, workdir, evaluator, trained.state, progress)
        record |= {} if baselines is False else _made(other, workdir, progress)
    record.pop("plots")  # plots.json belongs to the score of the run's own data
    record |= {"on": str(place), "step": trained.step, "seconds": time.perf_counter() - began}
    if not is_run:  # there is no folder of its own to keep the score in
        return record
    try:
        _keep_beside(run, place, record)
    except (UserError, OSError) as fault:  # it took long to make
        log.warning("the score is shown and not kept: %s", fault)
    return record


def _keep_beside(run: Run, place: Path, record: dict) -> None:
    """Write the score of other data than the run's own into its folder."""
    target = run.folder / "scores-on" / f"{place.name}.json"
    if (files.read_json(target) or record)["on"] != str(place):  # another of the same name
        target = target.with_stem(f"{target.stem}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}")
    files.write_json(target, record)


def _scored_where_possible(run: Run, trained, parts: tuple, progress, baselines: bool | None) -> dict:
    """`score_run`, in a temporary folder if the run's cannot be written."""

    def scored(run: Run) -> dict:
        return score_run(trained.recipe, trained.config, run, *parts, trained.step, progress, baselines=baselines)

    if run.is_writable():
        return scored(run)
    log.warning("%s cannot be written: the score is shown and not kept", run.folder)
    with tempfile.TemporaryDirectory() as folder:
        return scored(runs.UnwritableRun(run, folder))


def _measured(recipe, config, workdir: Path, evaluator, state, progress) -> dict:
    result = _result(recipe, config, "test", workdir, evaluator, state, progress)
    headline = next(iter(result))
    return {
        "headline": headline,
        "better": recipe.metric[1] if recipe.metric and recipe.metric[0] == headline else None,
        "score": _numbers(result),
        "baselines": {},
        **{name: result.get(name, []) for name in _SHOWN_APART},
        "recipe_sha256": config.recipe_sha256,
    }


def validation_score(recipe, config, evaluator, state, progress) -> dict[str, float]:
    """The numbers of the recipe's score on the validation split, while training."""
    with tempfile.TemporaryDirectory() as folder:  # the run's work folder belongs to its final score
        return _numbers(_result(recipe, config, "validation", Path(folder), evaluator, state, progress))


def _result(recipe, config, split: str, workdir: Path, evaluator, state, progress) -> dict:
    key = stream(config.train.seed, "score")
    with tracing(forms=config.train.forms), recipe_code(recipe, "score"):
        result = recipe.score(evaluator.predictor(state), split, key, workdir, progress)
    return checked_result(recipe, result)


def _numbers(result: dict) -> dict:
    return {name: value for name, value in result.items() if name not in _SHOWN_APART}


def _made(recipe, workdir: Path, progress, key: str | None = None) -> dict:
    """{"baselines": values by name, "baselines_made": {"key", "time", "kept", "tables", "notes"}}."""
    with recipe_code(recipe, "baselines"):
        made = recipe.baselines(workdir, progress)
    made = checked_result(recipe, made, "baselines")
    apart = {name: made.get(name, []) for name in ("tables", "notes")}
    return {
        "baselines": {name: value for name, value in made.items() if name not in _SHOWN_APART},
        "baselines_made": {"key": key, "time": now(), "kept": False, **apart},
    }


def _depends_on(recipe, config, run, step: int) -> str:
    """sha256 hex over everything on which a recipe's baselines depend."""
    hasher = hashlib.sha256()
    facts = [recipe.data("train").fingerprint, config.recipe_sha256, runs.code_hash(), dump(config), step]
    hasher.update(json.dumps(facts).encode())
    for path in sorted(path for path in run.workdir.rglob("*") if path.is_file()):
        hasher.update(f"\0{path.relative_to(run.workdir)}\0".encode() + path.read_bytes())
    return hasher.hexdigest()


def score_lines(record: dict) -> list[str]:
    """A score as lines: its numbers, its baselines and their date, and its remarks."""
    numbers = {**record["score"], **record["baselines"]}
    lines = [f"{name} {decimal(value) if isinstance(value, float) else value}" for name, value in numbers.items()]
    made = record.get("baselines_made", {})
    if made.get("kept"):
        when = made["time"][:16].replace("T", " ")
        lines.append(f"baselines: kept from {when} UTC, as nothing has changed since; --baselines recomputes them")
    lines += [f"note: {remark}" for remark in record["remarks"]]
    return lines + [f"limit exceeded: {line}" for line in record.get("exceeded", [])]


def shares(samples: list[dict]) -> dict[str, float]:
    """The share of samples that pass each of the recipe's checks (their boolean fields)."""
    checks = {name for sample in samples for name, value in sample.items() if isinstance(value, bool)}
    return {f"samples_{name}": sum(bool(s.get(name)) for s in samples) / len(samples) for name in sorted(checks)}
