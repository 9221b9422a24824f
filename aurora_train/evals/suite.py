"""`aurora evaluate --suite`: tasks of lm-eval on a model of ours, every figure with its 95 % interval.

Nothing is downloaded: a task's data lie on this machine. `evals/adapter.py` answers what the tasks ask.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import logging
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from aurora_train import files
from aurora_train.errors import UserError
from aurora_train.evals.intervals import Measure
from aurora_train.record.metrics import now
from aurora_train.run import Run

log = logging.getLogger("aurora_train")


def asked(suite: str, folder: Path | None, limit: int | None) -> list:
    """lm-eval's tasks and groups that `NAME[,NAME]` names, with their data; no model is needed for this.

    Args:
        folder: a folder with task files; relative paths of data in them are relative to it. None: lm-eval's own tasks.
        limit: how many examples of each task will be read; None: all.

    Raises UserError for a task that there is none of, that cannot be read, or whose data are not on this machine.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the package lm_eval is not installed", where="--suite",
                        hint="pip install 'aurora_train[lm-eval]'")  # fmt: skip
    if folder is not None and not folder.is_dir():
        raise UserError(f"there is no folder {folder}", where="--suite-tasks", hint="a folder with task files")
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit}", where="--limit", why="it must be 1 or more")
    names = [name for name in map(str.strip, suite.split(",")) if name]
    if not names:
        raise UserError("no task is named", where="--suite", hint="--suite NAME[,NAME], such as hellaswag,arc_easy")
    with _quiet():
        return _loaded(names, folder and folder.absolute())


def run_suite(trained, tasks: list, limit: int | None, progress) -> dict:
    """The record of tasks on a model: {"tasks": {name: what is kept of it}, "lm_eval": its version, "step", ...}.

    Args:
        trained: a `loading.Loaded` language model.
        tasks: what `asked` returned, for the same limit.

    A run keeps each task as `suites/NAME.json`, with every example. Raises UserError for a model that does not continue
    text, and for a task that fails, or would run code that the model writes.
    """
    began = time.perf_counter()
    with _quiet():
        from lm_eval.evaluator import simple_evaluate

        from aurora_train.evals.adapter import Adapter

        leaves = _leaves(tasks)
        # Without lm-eval's own bootstrap, which forks a process that has threads: the intervals here are ours.
        with _as_user_errors(list(leaves)):
            found = simple_evaluate(Adapter(trained, progress), tasks=tasks, limit=limit, bootstrap_iters=0)
    record = _record(found, leaves, limit)
    record |= {"step": trained.step, "time": now(), "seconds": time.perf_counter() - began}
    _keep(Run(trained.run), record)
    return record


def suite_table(record: dict) -> dict:
    """The figures of a record as a table, for `record.console.show_table` and the report."""
    rows = [
        [name, figure["name"], figure["value"], figure["interval"] or "none", task["examples"]]
        for name, task in record["tasks"].items() for figure in task["figures"]
    ]  # fmt: skip
    return {"title": f"lm-eval {record['lm_eval']}", "columns": ["task", "", "value", "95 %", "examples"], "rows": rows}


def _loaded(names: list[str], folder: Path | None) -> list:
    """lm-eval's tasks and groups of these names."""
    from lm_eval.tasks import TaskManager

    skipped = _Skipped()
    with skipped.noted():
        manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
        if folder is not None and not set(names) <= set(manager.all_tasks):  # its own are many, and take seconds
            manager = TaskManager(include_path=str(folder))
    found: dict[str, Any] = {}
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"perhaps {' or '.join(near)}" if near else "--suite-tasks FOLDER has your own"
            why = skipped.reason() if folder else None
            raise UserError(f"there is no task {name!r}", where="--suite", why=why, hint=hint)
        with _as_user_errors([name]), contextlib.chdir(folder or "."):
            made = manager.load(name)
        found |= {name: made["groups"][name]} if name in made.get("groups", {}) else made["tasks"]
    return list(found.values())


def _leaves(tasks: list) -> dict[str, Any]:
    """Every task by its name, those of groups included."""
    inner = [task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task] for task in tasks]
    return {task.task_name: task for each in inner for task in each}


@contextlib.contextmanager
def _as_user_errors(names: list[str]):
    """A task file is the user's, with code and data of its own: whatever fails in it is told in one message."""
    try:
        yield
    except (UserError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        away = re.search(r"[Oo]ffline|ConnectionError|Couldn't (reach|find)|doesn't exist on the Hub", text)
        hint = "no data are downloaded: name local files in the task, dataset_path: json and dataset_kwargs: " \
               "{data_files: ...}, and its folder by --suite-tasks" if away else None  # fmt: skip
        raise UserError(f"the task {', '.join(names)} failed in lm-eval", where="--suite", why=text[:600],
                        hint=hint) from error  # fmt: skip


class _Skipped(logging.Handler):
    """Collects why lm-eval left out task files, which it tells nobody."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Skip"):
            self._lines.append(record.getMessage())

    @contextlib.contextmanager
    def noted(self):
        source = logging.getLogger("lm_eval.tasks._index")
        level, spread = source.level, source.propagate
        source.setLevel(logging.DEBUG)
        source.addHandler(self)
        source.propagate = False
        try:
            yield
        finally:
            source.setLevel(level)
            source.propagate = spread
            source.removeHandler(self)

    def reason(self) -> str | None:
        lines = [" ".join(line.split()) for line in self._lines]
        return f"lm-eval left out task files: {'; '.join(lines)[:600]}" if lines else None


@contextlib.contextmanager
def _quiet():
    """Without the remarks and bars of lm-eval and datasets: the verb's own progress shows what is done."""
    import datasets
    import tqdm

    source = logging.getLogger("lm_eval")
    level, had_none, init = source.level, datasets.are_progress_bars_disabled(), tqdm.tqdm.__init__
    source.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # lm-eval has no switch for the bar of its requests.
    tqdm.tqdm.__init__ = functools.partialmethod(init, disable=True)
    try:
        yield
    finally:
        source.setLevel(level)
        tqdm.tqdm.__init__ = init
        if not had_none:
            datasets.enable_progress_bars()


# ---- the record


def _record(found: dict, tasks: dict[str, Any], limit: int | None) -> dict:
    kept = {}
    for name, values in found["results"].items():
        figures = []
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            parts = [(tasks[part], found["samples"][part]) for part in _members(name, found["group_subtasks"])]
            figures.append({
                "name": metric if chosen == "none" else f"{metric} ({chosen})", "value": float(value),
                "interval": _interval(parts, metric, chosen, float(value)),
                "better": {True: "max", False: "min"}.get(found["higher_is_better"].get(name, {}).get(metric)),
            })  # fmt: skip
        samples = found["samples"].get(name, [])
        kept[name] = {
            "figures": figures, "examples": int(values["sample_len"]), "shots": found["n-shot"].get(name),
            "version": found["versions"].get(name), "limit": limit, "parts": found["group_subtasks"].get(name) or [],
            "samples": [_plain(sample) for sample in samples],
        }  # fmt: skip
    return {"lm_eval": metadata.version("lm_eval"), "tasks": kept}


def _members(name: str, groups: dict[str, list[str]]) -> list[str]:
    """The tasks of a group and of the groups within it; of a task, itself."""
    return [leaf for part in groups[name] for leaf in _members(part, groups)] if groups.get(name) else [name]


def _interval(parts: list[tuple[Any, list[dict]]], metric: str, chosen: str, value: float) -> list[float] | None:
    """[low, high] at 95 % of a figure over the examples of a task, or of a group's tasks; None if it is neither a mean
    over them nor a function of a mean, so that nothing can be said."""
    items = [[one[metric] for one in rows if one["filter"] == chosen and metric in one] for _, rows in parts]
    flat = [item for each in items for item in each]
    if not flat:
        return None
    aggregate = parts[0][0].aggregation().get(metric, lambda some: sum(some) / len(some))
    if all(isinstance(item, tuple | list) and len(item) == 2 for item in flat):  # (ln p, bytes or words)
        return _through(Measure(np.arange(len(flat)), *np.array(flat, np.float64).T), aggregate, value, pairs=True)
    if not all(isinstance(item, bool | int | float | np.number) for item in flat):
        return None
    # A group weighs its tasks by their sizes or alike.
    alike = np.concatenate([np.full(len(each), len(flat) / (len(items) * max(len(each), 1))) for each in items])
    for weights in (np.ones(len(flat)), alike):
        sums = np.array(flat, np.float64) * weights
        measure = Measure(np.arange(len(flat)), sums, np.ones(len(flat)), bool(np.isin(sums, (0, 1)).all()))
        if (made := _through(measure, aggregate, value)) is not None:
            return made
    return None


def _through(measure: Measure, aggregate, value: float, *, pairs: bool = False) -> list[float] | None:
    """A mean's interval as lm-eval's aggregation of a single example sees it: a perplexity is a function of a mean.
    None if the aggregation of all examples is not that of their mean."""

    def seen(mean: float) -> float:
        return float(aggregate([(mean, 1.0)] if pairs else [mean]))

    try:
        if not np.isclose(seen(measure.value), value, rtol=1e-6, atol=1e-9):
            return None
        return sorted(float(f"{seen(bound):.4g}") for bound in measure.interval())
    except (TypeError, ValueError, IndexError):  # it takes other items than numbers
        return None


def _plain(sample: dict) -> dict:
    """An example as JSON has it: the document, what was asked, what was answered, and its metrics."""
    measured = {name: sample[name] for name in sample["metrics"]}
    return {
        "id": sample["doc_id"], "filter": sample["filter"], "document": sample["doc"], "target": sample["target"],
        "asked": [list(one) for one in sample["arguments"]], "answered": sample["filtered_resps"], **measured,
    }  # fmt: skip


def _keep(run: Run, record: dict) -> None:
    """Write what each task gave into the run; the figures of an open model are shown and not kept."""
    if not run.config.is_file():
        return
    if not run.is_writable():
        log.warning("%s cannot be written: the figures are shown and not kept", run.folder)
        return
    run.suites.mkdir(exist_ok=True)
    common = {name: record[name] for name in ("lm_eval", "step", "time")}
    for name, task in record["tasks"].items():
        file = re.sub(r"[^\w.-]", "_", name) + ".json"
        files.write_json(run.suites / file, {"task": name, **common, **task})
