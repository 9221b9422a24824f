"""`aurora runs`: lists a folder of runs, one row per run, from the small files and the ends of the logs.

Neither jax nor a recipe is imported and no log is read completely, so that forty long runs are listed at once.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from aurora_train.config.yaml import parse, read_file, read_text, write_flow, write_scalar
from aurora_train.errors import UserError
from aurora_train.files import read_json
from aurora_train.record.console import plain_console, table_of
from aurora_train.record.metrics import newest
from aurora_train.run import Run, early_words, is_end
from aurora_train.tools.report_page import flatten
from aurora_train.units import decimal, duration, size

DEFAULT = Path("runs")
_KEYS_SHOWN = 6


@dataclass(frozen=True)
class Row:
    """One run. `name` is its path below the listed folder; `written` is in seconds since 1970.

    `state`: "training" (a process holds it now), "finished", "stopped" (on request), "failed" (by an error), "killed"
    (neither is on record; all three can be resumed), "imported" (an open model, at step 0, which has no data and no
    length of its own yet), "failed start" (no step was taken) or "unreadable", with the reason in `why`. `score` is
    {"name", "value", "better"} of the headline; `differs` has the config keys whose values differ among the listed runs
    of the same recipe, the imported ones apart.
    """

    name: str
    folder: str
    state: str
    recipe: str | None = None
    step: int = 0
    steps: int | None = None
    score: dict | None = None
    validation_loss: float | None = None
    bytes: int = 0
    written: float = 0.0
    differs: dict[str, Any] | None = None
    why: str = ""

    @property
    def progress(self) -> str:
        """`step/steps`; "" if the length is not known."""
        return f"{self.step}/{self.steps}" if self.steps else ""


def listing(folder: Path | None = None) -> list[Row]:
    """The runs of a folder (None: `runs`), the most recently written first; a folder that is a run is the only row.

    The runs of sweeps, one level deeper, are listed too. Raises UserError if a named folder does not exist.
    """
    rows, known = [], {}
    for path, name in find(folder):
        row, known[name] = described(path, name)
        rows.append(row)
    apart = differences({row.name: known[row.name] for row in rows if row.state != "imported"})
    rows = [replace(row, differs=apart.get(row.name, {})) for row in rows]
    return sorted(rows, key=lambda row: -row.written)


def find(folder: Path | None = None) -> list[tuple[Path, str]]:
    """(folder, name) of every run in a folder, or of the folder itself if it is a run."""
    top = Path(folder or DEFAULT)
    if not top.is_dir():
        if folder is None:
            return []
        raise UserError("there is no such folder", where=str(folder), hint="aurora runs [DIR]; without DIR: runs/")
    if is_run(top):
        return [(top, top.absolute().name)]
    runs = []
    for child in _folders(top):
        if is_run(child):
            runs.append((child, child.name))
        else:
            runs += [(below, f"{child.name}/{below.name}") for below in _folders(child) if is_run(below)]
    return runs


def is_run(folder: Path) -> bool:
    """Whether a run was started in a folder; a user's own config.yaml alone does not make it one."""
    run = Run(folder)
    return (folder / ".lock").exists() or (run.config.is_file() and (run.events.exists() or run.provenance.exists()))


def is_imported(run: Run) -> bool:
    """Whether a run is an imported model that was not trained: what it has by default, nobody has chosen."""
    return run.config.is_file() and run.has_checkpoint() and "data" not in read_json(run.provenance, {"data": None})


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    except PermissionError:
        return []


def described(folder: Path, name: str) -> tuple[Row, dict]:
    """(one run's row, still without `differs`; its settings by key)."""
    run = Run(folder)
    row = Row(name, str(run.folder), "failed start", bytes=_bytes(folder), written=_written(run))
    try:
        known = settings(run.config) if run.config.is_file() else {}
        last, evaluation = newest(run.metrics, "loss"), newest(run.metrics, "evaluation")
        validation_loss = evaluation["evaluation"].get("loss") if evaluation else None
        return looked_at(run, row, known, last["step"] if last else 0, validation_loss), known
    except (UserError, OSError, ValueError) as error:
        return unreadable(row, error), {}


def unreadable(row: Row, error: Exception) -> Row:
    """The row of a run of which some file cannot be read."""
    return replace(row, state="unreadable", why=(str(error) or type(error).__name__).splitlines()[0])


def looked_at(run: Run, row: Row, known: dict, recorded: int, validation_loss: float | None) -> Row:
    """A run's row, completed from its settings and from its log: the step of the last record, the last validation loss.

    Raises UserError, OSError or ValueError for what cannot be read."""
    steps, saved, finish = known.get("train.steps"), run.step(), newest(run.events, "event", "finish")
    row = replace(row, recipe=known.get("recipe"), steps=steps, score=_headline(read_json(run.scores)),
                  validation_loss=validation_loss)  # fmt: skip
    if run.is_held():
        return replace(row, state="training", step=recorded, why=run.holder())
    if finish is not None and is_end(finish, steps, known.get("evaluate.patience")):
        return replace(row, state="finished", step=finish["step"], why=early_words(finish))
    if not (recorded or saved) and is_imported(run):
        return replace(row, state="imported", steps=None)
    if not (recorded or saved):
        return replace(row, why="it took no step; start it again, or delete the folder")
    last = _last_bound(run)
    if last.get("event") == "stop":
        return replace(row, state="stopped", step=saved, why=f"by {last.get('by')}")
    if last.get("event") in ("fail", "hang"):
        why = last.get("why", f"{last.get('doing')} made no progress")
        return replace(row, state="failed", step=saved, why=str(why))
    return replace(row, state="killed", step=saved)


def _last_bound(run: Run) -> dict:
    """The newest event with which a process of a run began or ended; {} if there is none."""
    bounds = ("hang", "fail", "stop", "resume", "start")  # of two in the same millisecond, the first is the later
    found = [newest(run.events, "event", name) for name in bounds]
    return max((event for event in found if event), key=lambda event: str(event.get("time")), default={})


def _headline(scores: dict | None) -> dict | None:
    if not scores:
        return None
    name = scores["headline"]
    return {"name": name, "value": scores["score"].get(name), "better": scores.get("better")}


def _written(run: Run) -> float:
    """When a run was last written, in seconds since 1970, by its logs and config, or else its folder."""
    times = [path.stat().st_mtime for path in (run.metrics, run.events, run.config) if path.exists()]
    return max(times, default=run.folder.stat().st_mtime)


def _bytes(folder: Path) -> int:
    """Total size of the files below a folder; a file with several hard links counts once."""
    total, seen = 0, set()
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                about = os.lstat(os.path.join(place, name))
            except OSError:  # a checkpoint that has just been deleted
                continue
            if about.st_nlink == 1 or (about.st_dev, about.st_ino) not in seen:
                seen.add((about.st_dev, about.st_ino))
                total += about.st_size
    return total


# ---- settings


def settings(config: Path) -> dict[str, Any]:
    """`key.path` -> value of a run's config.yaml: a plain value, or a list or an empty mapping as its text.

    Reading YAML takes 11 ms for a config, and the configs of a folder are much alike: each section is read once.
    """
    head, *sections = re.split(r"^(?=[a-z])", read_text(config), flags=re.MULTILINE)
    read = [_section(text) for text in sections]
    keys = [text.partition(":")[0] for text in sections]
    if head.strip() or not read or None in read or len(set(keys)) < len(keys):  # it was not written by us
        return _flat(read_file(config).value)
    return {key: value for section in read for key, value in section.items()}


@lru_cache(maxsize=2000)
def _section(text: str) -> dict[str, Any] | None:
    """The settings of one section of a config; None if it does not stand by itself."""
    try:
        tree = parse(text, lambda line, column: None).value
    except UserError:
        return None
    return _flat(tree) if isinstance(tree, dict) and len(tree) == 1 else None


def _flat(tree: dict) -> dict[str, Any]:
    return {key: write_flow(value) if isinstance(value, (list, dict)) else value for key, value in flatten(tree)}


def differences(known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each run, by name, the keys whose values differ among the runs of its recipe.

    `name` is left out, because it only names the folder.
    """
    apart: dict[str, dict[str, Any]] = {name: {} for name in known}
    for recipe in {one.get("recipe") for one in known.values()}:
        alike = {name: one for name, one in known.items() if one and one.get("recipe") == recipe}
        keys = dict.fromkeys(key for one in alike.values() for key in one if key != "name")
        unlike = [key for key in keys if len({repr(one.get(key)) for one in alike.values()}) > 1]
        apart |= {name: {key: one[key] for key in unlike if key in one} for name, one in alike.items()}
    return apart


# ---- what is shown


def show(rows: list[Row]) -> None:
    """Print the table of `aurora runs`."""
    console, now = plain_console(), time.time()
    shown = [
        (row.name, row.state, row.progress, scored(row), size(row.bytes), duration(max(now - row.written, 0)),
         shown_differences(row.differs))
        for row in rows
    ]  # fmt: skip
    columns = ("run", "state", "step", "score", "size", "age", "differs in")
    console.print(table_of(*columns, left=(0, 1, 3, 6), rows=shown))
    for row in rows:
        if row.state != "stopped" and row.why:
            console.print(f"{row.name}: {row.state}: {row.why}", soft_wrap=True)


def scored(row: Row) -> str:
    """The headline score with its name, otherwise the last validation loss, otherwise ""."""
    if row.score and isinstance(row.score["value"], (int, float)):
        return f"{row.score['name']} {decimal(row.score['value'])}"
    return f"validation loss {decimal(row.validation_loss)}" if row.validation_loss is not None else ""


def shown_differences(differs: dict[str, Any] | None) -> str:
    """`key=value` for the first few keys, and the number of the others."""
    items = list((differs or {}).items())
    shown = [f"{key}={value if isinstance(value, str) else write_scalar(value)}" for key, value in items[:_KEYS_SHOWN]]
    return " ".join(shown) + (f" and {len(items) - _KEYS_SHOWN} more" if len(items) > _KEYS_SHOWN else "")
