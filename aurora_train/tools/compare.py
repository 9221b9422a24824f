"""`aurora compare`: the configs and results of several runs side by side, as text, JSON, or one HTML page.

Like the report, it reads only the files of the run folders. Runs of different recipes may share a page, but never a
figure: their losses measure different things.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora_train.errors import UserError
from aurora_train.files import write_atomically
from aurora_train.record.console import plain_console, table_of
from aurora_train.run import Run
from aurora_train.tools.chart import curve, running_mean, thin
from aurora_train.tools.markup import escape
from aurora_train.tools.recorded import Recorded, series
from aurora_train.tools.report_page import number, page, section, table
from aurora_train.tools.runs import Row, described, differences, find
from aurora_train.units import count, decimal, duration, words

_NOT_COMPARED = ("failed start", "imported", "unreadable")


@dataclass(frozen=True)
class Compared:
    """One run: its row in the list of runs, and what its files hold."""

    row: Row
    held: Recorded

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def data(self) -> str | None:
        """The fingerprint of its training data."""
        return self.held.provenance.get("data", {}).get("fingerprint")

    def measures(self) -> dict[str, Any]:
        """The figures of a run in one row of a table, the recipe's headline first."""
        held, losses, recent = self.held, self.held.validation_losses, self.held.recent_loss()
        return {
            **({held.headline: held.score.get(held.headline)} if held.headline else {}),
            "best_validation_loss": min(losses, default=None),
            "last_validation_loss": losses[-1] if losses else None,
            "training_loss": recent[0] if recent else None,
            "step": self.row.step,
            "steps": self.row.steps,
            "targets": held.targets,
            "seconds": held.seconds,
        }


@dataclass(frozen=True)
class Comparison:
    """`differences`: key -> {run: value} of keys that differ between runs; `remarks`: notes for the reader."""

    runs: list[Compared]
    differences: dict[str, dict[str, Any]]
    remarks: list[str]


def compare(folders: list[Path]) -> Comparison:
    """Compare runs, or all the runs in a folder. UserError for fewer than two that have taken a step."""
    named = {}
    for folder in folders:
        inside = find(folder)
        if not inside:
            raise UserError("no run, and no folder of runs", where=str(folder), hint="aurora runs [DIR] lists them")
        named |= {path.resolve(): (path, name) for path, name in inside}
    names = [name for _, name in named.values()]
    runs, remarks = [], []
    for path, name in named.values():
        row, _ = described(path, name if names.count(name) == 1 else str(path))
        if row.state in _NOT_COMPARED:
            remarks.append(f"{row.name} is left out: {row.state}{f', {row.why}' if row.why else ''}")
        else:
            runs.append(Compared(row, Recorded.of(Run(path))))
    if len(runs) < 2:
        raise UserError(
            f"{len(runs) or 'no'} run to compare", where=" ".join(map(str, folders)), why="; ".join(remarks) or None,
            hint="name two or more, or a folder of runs: aurora compare runs/A runs/B",
        )  # fmt: skip
    apart = differences({run.name: run.held.settings for run in runs})
    keys = dict.fromkeys(key for one in apart.values() for key in one)
    unlike = {key: {name: one[key] for name, one in apart.items() if key in one} for key in keys}
    return Comparison(runs, unlike, remarks + _remarks(runs))


def _remarks(runs: list[Compared]) -> list[str]:
    remarks = []
    recipes = _by_recipe(runs)
    if len(recipes) > 1:
        remarks.append(f"runs of {len(recipes)} recipes ({', '.join(recipes)}): losses and scores are not comparable")
    for recipe, alike in recipes.items():
        if len({run.data for run in alike}) > 1:
            remarks.append(
                f"the runs of {recipe} did not have the same data (fingerprints in provenance.json): losses and scores "
                "are comparable only if the held-out data and the unit of the score are the same"
            )
    unfinished = [f"{run.name} ({run.row.step} of {run.row.steps})" for run in runs if run.row.state != "finished"]
    if unfinished:
        remarks.append(f"not finished: {', '.join(unfinished)}")
    return remarks


def _by_recipe(runs: list[Compared]) -> dict[str, list[Compared]]:
    grouped: dict[str, list[Compared]] = {}
    for run in runs:
        grouped.setdefault(str(run.row.recipe), []).append(run)
    return grouped


# ---- what is shown


def document(comparison: Comparison) -> dict:
    """What `aurora compare --json` prints."""
    runs = [
        {"run": run.name, "folder": run.row.folder, "state": run.row.state, "recipe": run.row.recipe,
         **run.measures(), "scores": run.held.score}
        for run in comparison.runs
    ]  # fmt: skip
    return {"runs": runs, "differences": comparison.differences, "remarks": comparison.remarks}


def _summary(runs: list[Compared]) -> tuple[list[str], list[list[Any]]]:
    """(columns, one row per run); a column without any value is left out."""
    measured = [run.measures() for run in runs]
    scores = dict.fromkeys(run.held.headline for run in runs if run.held.headline)
    names = [*scores, *(name for name in measured[0] if name not in (*scores, "steps"))]
    names = [name for name in names if any(one.get(name) is not None for one in measured)]
    rows = [[run.name, *(_cell(name, one) for name in names)] for run, one in zip(runs, measured, strict=True)]
    return ["run", *map(words, names)], rows


def _cell(name: str, measures: dict) -> Any:
    value = measures.get(name)
    if name == "step":
        return f"{value}/{measures['steps']}" if measures["steps"] else str(value)
    if value is None:
        return ""
    return count(value) if name == "targets" else duration(value) if name == "seconds" else value


def _settings_table(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    names = [run.name for run in comparison.runs]
    rows = [
        [key, *(number(values[name]) if name in values else "" for name in names)]
        for key, values in comparison.differences.items()
    ]
    return ["key", *names], rows


def _without_differences(runs: list[Compared]) -> str:
    """What is said of configs of which no key differs: keys are compared among the runs of a recipe."""
    alike = _by_recipe(runs)
    if len(alike) == 1:
        return "the configs are the same"
    most = max(map(len, alike.values()))
    return "configs of different recipes are not compared" + ("; those of one recipe are the same" if most > 1 else "")


def show(comparison: Comparison) -> None:
    """Print the tables and remarks of `aurora compare`."""
    console = plain_console()
    for columns, rows in (_summary(comparison.runs), _settings_table(comparison)):
        shown = [[decimal(cell) if isinstance(cell, float) else cell for cell in row] for row in rows]
        console.print(table_of(*columns, rows=shown) if rows else _without_differences(comparison.runs), "")
    for remark in comparison.remarks:
        console.print(remark, soft_wrap=True)


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the page: one self-contained HTML file. Returns its path."""
    runs, names = comparison.runs, [run.name for run in comparison.runs]
    columns, rows = _summary(runs)
    parts = [f"<h1>{len(names)} runs compared</h1>\n", "".join(f"<p>{escape(one)}</p>\n" for one in comparison.remarks)]
    parts += [_figures(recipe, alike) for recipe, alike in _by_recipe(runs).items()]
    parts.append(section("Results", table(columns, rows)))
    same = _without_differences(runs)
    settings = table(*_settings_table(comparison)) if comparison.differences else f"<p>{escape(same)}</p>\n"
    parts.append(section("Config, where it differs", settings))
    measured = dict.fromkeys(name for run in runs for name in run.held.score)
    if measured:
        scores = [[words(name), *(number(run.held.score[name]) if name in run.held.score else "" for run in runs)]
                  for name in measured]  # fmt: skip
        parts.append(section("Scores", table(["", *names], scores)))
    folders = table(["run", "folder"], [[run.name, run.row.folder] for run in runs])
    parts.append(section("Folders", folders))
    parts.append("<footer>Drawn by <code>aurora compare</code> from the files of these run folders.</footer>")
    write_atomically(path, page(f"{len(names)} runs compared", "".join(parts)))
    return path


def _figures(recipe: str, runs: list[Compared]) -> str:
    drawn = []
    training = [(run.name, *_smooth(*series(run.held.steps, "loss"))) for run in runs if run.held.steps]
    validation = [(run.name, *series(run.held.evaluations, "loss")) for run in runs if run.held.evaluations]
    for lines, label in ((training, "training loss, smoothed"), (validation, "validation loss")):
        if lines:
            drawn.append(f'<figure class="wide">{curve(lines, label)}</figure>')
    return section(f"Curves: {words(recipe)}", f'<div class="figures">{"".join(drawn)}</div>\n' if drawn else "")


def _smooth(steps, values):
    steps, values = thin(steps, values)
    return steps, running_mean(values, max(len(values) // 20, 2)) if len(values) > 20 else values
