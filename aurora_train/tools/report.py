"""`report.html`: one file that shows what a run did, made only from the files in the run folder.

It opens without a network and without scripts, and the same saved files give the same bytes. A part whose file is
missing says "not recorded", except samples, which many recipes do not make; nothing is guessed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from aurora_train.errors import UserError
from aurora_train.files import read_json, write_atomically
from aurora_train.run import Run, early_words
from aurora_train.tools.chart import curve
from aurora_train.tools.markup import escape
from aurora_train.tools.recorded import Recorded, series
from aurora_train.tools.report_energy import energy_section, energy_used
from aurora_train.tools.report_lineage import lineage_section
from aurora_train.tools.report_memory import memory_section
from aurora_train.tools.report_page import bars, cards, facts, flatten, folded, number, page, picture, section, table
from aurora_train.units import count, counted, decimal, duration, percent, size, words

_SAMPLES_SHOWN, _EVENTS_SHOWN, _ROWS_SHOWN = 4, 30, 12


def write_report(run_folder) -> Path:
    """Write `report.html` of a run folder, finished or not; return its path. UserError if it is not a run folder."""
    run = Run.existing(run_folder)
    held, plan = Recorded.of(run), read_json(run.plan, {})
    data = held.provenance.get("data")
    body = "".join(
        (
            _head(held),
            _curves(held),
            score_section(held.scores),
            _suites(run.suites),
            plots_section(read_json(run.plots, []), lambda file, title: picture(run.workdir / file, title)),
            samples_section(run.samples),
            _data(data),
            section("Config", f"<pre>{escape(run.config.read_text())}</pre>"),
            _machine(held.provenance),
            memory_section(plan, held.steps) or section("Memory plan", facts(plan) if plan else ""),
            energy_section(held),
            lineage_section(run),
            events_section(held.events),
            "<footer>Drawn by <code>aurora report</code> from the files of this run folder.</footer>",
        )
    )
    write_atomically(run.report, page(f"{run.folder.name}: report", body))
    return run.report


def report_ending(outcome) -> None:
    """Write the report of a run that has just finished or stopped. `outcome`: the result of `train.start.train`.

    No report is written if the run stopped for lack of memory, because drawing takes a hundred megabytes, or if
    another process writes the run's record. Raises UserError if the folder cannot be written.
    """
    from aurora_train.always_on.guard import EXIT_LOW_MEMORY
    from aurora_train.train.saving import EXIT_UNSAVED
    from aurora_train.train.signals import StopRequest

    run = outcome.run
    if run.follows or outcome.status == EXIT_LOW_MEMORY or not run.config.is_file():
        return
    # A disk that accepted no checkpoint may refuse the report too; then only the exit status reports the failure.
    unless_full = contextlib.suppress(UserError) if outcome.status == EXIT_UNSAVED else contextlib.nullcontext()
    with unless_full, StopRequest():  # a signal that arrives now has nothing left to stop
        write_report(run.folder)


# ---- summary


def _head(held: Recorded) -> str:
    total, events = held.settings.get("train.steps"), [event.get("event") for event in held.events]
    last = next((e for e in reversed(held.events) if e.get("event") in ("start", "resume", "finish")), {})
    state = f"finished {early_words(last)}".strip() if last.get("event") == "finish" else "not finished"
    step, resumed = held.steps[-1]["step"] if held.steps else 0, events.count("resume")
    summary = f"{state}, step {step:,} of {total:,}" if total else f"{state}, step {step:,}"
    if resumed:
        summary += ", resumed once" if resumed == 1 else f", resumed {resumed} times"
    recipe = f"{words(str(held.settings['recipe']))} · " if held.settings.get("recipe") else ""
    head = f'<h1>{escape(held.run.folder.name)}</h1>\n<p class="soft">{escape(recipe + summary)}</p>\n'
    return head + cards(_glance(held))


def _glance(held: Recorded) -> list[tuple[str, str]]:
    """(what, figure) for each card; what was not recorded has none, but for time and energy."""

    def known(name: str) -> list:
        return [record[name] for record in held.steps if record.get(name) is not None]

    loss, over = held.recent_loss() or (held.steps[-1]["loss"] if held.steps else None, 1)
    skipped, losses = sum(map(bool, known("skipped"))), held.validation_losses
    figures = [
        (words(held.headline or ""), number(held.score.get(held.headline)) if held.headline else None),
        (f"training loss, mean of the last {over} steps" if over > 1 else "training loss",
         None if loss is None else decimal(loss)),
        ("best validation loss", decimal(min(losses)) if losses else None),
        ("targets trained on", count(held.targets) if held.steps else None),
        *((what, form(median(known(name))) if known(name) else None) for name, what, form in _RATES),
        ("memory, highest", size(max(known("memory_bytes"))) if known("memory_bytes") else None),
        ("training time", duration(held.seconds)),
        ("energy", energy_used(held) or "not measured"),
        ("updates not applied", str(skipped) if skipped else None),
    ]  # fmt: skip
    return [(what, figure) for what, figure in figures if figure is not None]


_RATES = (
    ("tokens_per_s", "targets per second, median", count), ("mfu", "MFU, median", percent),
    ("hfu", "HFU (recomputation counted), median", percent),
)  # fmt: skip


# ---- the score


def score_section(scores) -> str:
    """What `scores.json` holds: the headline beside its baselines, and all else that was measured."""
    if not scores:
        return section("Score")
    headline = scores["headline"]
    rivals = {name: _rival(value, headline) for name, value in (scores.get("baselines") or {}).items()}
    rows = [("this run", scores["score"].get(headline), True)]
    rows += [(words(name), value, False) for name, value in rivals.items() if value is not None]
    rows = [row for row in rows if isinstance(row[1], (int, float)) and np.isfinite(row[1])]
    parts = [f"<p>{escape(words(headline))} on held-out data, after step {number(scores.get('step'))}.</p>\n"]
    exceeded = [f"limit exceeded: {line}" for line in scores.get("exceeded") or []]
    parts += [f"<p><b>{escape(remark)}</b></p>\n" for remark in [*exceeded, *(scores.get("remarks") or [])]]
    if rows:
        rows.sort(key=lambda row: row[1])
        ours = next((i for i, row in enumerate(rows) if row[2]), None)
        parts.append('<div class="figures"><div>')
        parts.append(bars(rows))
        parts.append("</div><div>")
        parts.append(table(["", words(headline)], [[name, float(value)] for name, value, _ in rows], ours))
        parts.append("</div></div>\n")
    made = scores.get("baselines_made") or {}
    parts += [f"<p>{escape(note)}</p>\n" for note in [*(scores.get("notes") or []), *(made.get("notes") or [])]]
    if scores.get("before"):
        compared = scores["before"]["table"]
        parts += [f"<h3>{escape(compared['title'])}</h3>\n", table(compared["columns"], compared["rows"])]
    others = {words(k): v for k, v in flatten(scores["score"]) if k != headline}
    if others:
        parts += ["<h3>Also measured</h3>\n", facts(others)]
    unlike = {words(name): value for name, value in (scores.get("baselines") or {}).items() if rivals[name] is None}
    if unlike:
        parts += ["<h3>Baselines in other measures</h3>\n", facts(unlike)]
    for extra in [*(scores.get("tables") or []), *(made.get("tables") or [])]:
        whole, rows = table(extra["columns"], extra["rows"]), extra["rows"]
        shown = whole if len(rows) <= _ROWS_SHOWN else folded(f"{len(rows)} rows", whole)
        parts += [f"<h3>{escape(extra.get('title', ''))}</h3>\n", shown]
    return section("Score", *parts)


def _suites(folder: Path) -> str:
    """What the tasks of lm-eval gave (`evals/suite.py`)."""
    tasks = [read_json(path) for path in sorted(folder.glob("*.json"))]
    rows = [
        [task["task"], figure["name"], figure["value"], figure["interval"] or "none", task["examples"], task["step"]]
        for task in tasks for figure in task["figures"]
    ]  # fmt: skip
    columns = ["task", "", "value", "95 %", "examples", "step"]
    return section("Tasks of lm-eval", table(columns, rows)) if rows else ""


def plots_section(plots, shown: Callable[[str, str], str]) -> str:
    """The figures of the recipe's score (`Recipe.score`, "plots"): lines, and pictures. `shown` gives the HTML of a
    file of its work folder, by name and title."""
    drawn = []
    for plot in plots:
        title = f"<h3>{escape(plot.get('title', ''))}</h3>"
        if "file" in plot:
            drawn.append(f"<figure>{title}{shown(Path(plot['file']).name, plot.get('title', ''))}</figure>")
            continue
        lines = [(name, np.array(x, float), np.array(y, float)) for name, (x, y) in plot["series"].items()]
        labels = {"ylabel": plot.get("y_label", ""), "xlabel": plot.get("x_label", "")}
        drawing = curve(lines, labels["ylabel"], xlabel=labels["xlabel"])
        drawn.append(f'<figure class="wide">{title}{drawing}</figure>')
    return section("What it did", f'<div class="figures">{"".join(drawn)}</div>\n') if drawn else ""


def _rival(value, headline: str):
    """A baseline's number in the headline measure, from {"xz": 1.6} or {"xz": {"bits_per_byte": 1.6}}; else None."""
    if isinstance(value, dict):
        value = value.get(headline)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# ---- curves


def _curves(held: Recorded) -> str:
    steps, validation = held.steps, held.evaluations
    if not steps:
        return section("Training")
    losses = [("training", *series(steps, "loss"))]
    if held.validation_losses:
        losses.append(("validation", *series(validation, "loss")))
    figures = [f'<figure class="wide">{curve(losses, "loss", smooth=True)}</figure>']
    for name, label in (
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("tokens_per_s", "targets per second"),
        ("memory_bytes", "memory, bytes"),
        ("watts", "power, watts"),
    ):
        x, y = series(steps, name)
        if np.isfinite(y).sum() > 1:
            absolute = name in ("tokens_per_s", "memory_bytes", "watts")
            drawing = curve([(label, x, y)], label, smooth=name == "grad_norm", from_zero=absolute)
            figures.append(f"<figure>{drawing}</figure>")
    summary = f"{counted(len(steps), 'step')}, {count(held.targets)} targets"
    if validation and "loss" in validation[-1]:
        summary += f"; last validation loss {decimal(validation[-1]['loss'])} at step {validation[-1]['step']:,}"
    return section("Training", f"<p>{escape(summary)}.</p>\n", f'<div class="figures">{"".join(figures)}</div>\n')


# ---- samples


def samples_section(folder: Path) -> str:
    """The samples in a folder, the newest in full; "" if there are none. UserError for a damaged file."""
    files = sorted(folder.glob("*.json"), key=_step_of)
    if not files:
        return ""
    parts, read = [], {path: _list(read_json(path)) for path in files}
    before = read[files[0]] if _step_of(files[0])[0] == 0 and len(files) > 1 else None
    for position, path in enumerate(reversed(files)):
        samples = read[path]
        if position == 0 and before and _prompts(before) == _prompts(samples):
            shown = [_beside(*both) for both in zip(before, samples, strict=True)]
        else:
            shown = [_sample(sample) for sample in samples]
        first, rest = shown[:_SAMPLES_SHOWN], shown[_SAMPLES_SHOWN:]
        block = "".join(first) + (folded(f"{len(rest)} more", "".join(rest)) if rest else "")
        if position == 0:
            parts.append(f'<p class="soft">{escape(words(path.stem))}, exactly as the model wrote them.</p>\n{block}')
        else:
            parts.append(folded(words(path.stem), block))
    return section("Samples", *parts)


def _list(samples) -> list:
    return samples if isinstance(samples, list) else [samples]


def _prompts(samples: list) -> list | None:
    """The prompts of samples; None if they are not all samples with a text."""
    sound = all(isinstance(one, dict) and "text" in one for one in samples)
    return [str(one.get("prompt") or "") for one in samples] if sound else None


def _beside(before: dict, after: dict) -> str:
    """The same prompt's samples before training and after it, side by side."""
    columns = "".join(
        f"<figure><h3>{title}</h3>{_sample({**sample, 'prompt': ''})}</figure>"
        for title, sample in (("before training", before), ("after", after))
    )
    prompt = escape(after.get("prompt") or "")
    return f'<pre><span class="prompt">{prompt}</span></pre><div class="figures">{columns}</div>\n'


def _step_of(path: Path) -> tuple[int, str]:
    digits = "".join(c for c in path.stem if c.isdigit())
    return int(digits or 0), path.stem


def _sample(sample) -> str:
    if not isinstance(sample, dict) or "text" not in sample:
        return f"<pre>{escape(json.dumps(sample, indent=1, ensure_ascii=False))}</pre>\n"
    prompt = str(sample.get("prompt") or "")
    text = str(sample["text"])
    text = text[len(prompt) :] if prompt and text.startswith(prompt) else text
    rest = {name: value for name, value in sample.items() if name not in ("prompt", "text")}
    notes = " · ".join(f"{words(name)}: {number(value)}" for name, value in rest.items())
    caption = f'<p class="soft">{escape(notes)}</p>\n' if notes else ""
    return f'<pre><span class="prompt">{escape(prompt)}</span>{escape(text)}</pre>\n{caption}'


# ---- where it came from


def _data(data) -> str:
    """The data's provenance, and the texts of which it says what is learned (`Source.describe`, "learned")."""
    if not data:
        return section("Data")
    shown = "".join(_learned(segment) for segment in data.get("learned") or [])
    shown = f"<h3>What is learned, in the first row</h3>\n{shown}" if shown else ""
    return section("Data", facts({name: value for name, value in data.items() if name != "learned"}), shown)


def _learned(segment: dict) -> str:
    text = "".join(f"<ins>{escape(part)}</ins>" if is_learned else escape(part)
                   for part, is_learned in segment["parts"])  # fmt: skip
    return f'<p class="soft">{escape(segment["document"])}: {segment["tokens"]:,} tokens</p>\n<pre>{text}</pre>\n'


def _machine(provenance) -> str:
    if not provenance:
        return section("Machine and versions")
    parts = []
    for title, name in (("Machine", "machine"), ("Versions", "versions")):
        if provenance.get(name):
            parts += [f"<h3>{title}</h3>\n", facts(provenance[name])]
    rest = {k: v for k, v in provenance.items() if k not in ("machine", "versions", "data")}
    if rest:
        parts += ["<h3>Code and command</h3>\n", facts(rest)]
    return section("Machine and versions", *parts)


def events_section(events) -> str:
    """A table of events in their order; of more than a few, the rare ones first."""
    if not events:
        return section("Events")
    rows = []
    for event in events:
        details = {k: v for k, v in event.items() if k not in ("event", "step", "time") and v not in (None, [], {})}
        summary = ", ".join(f"{words(name)} {number(value)}" for name, value in flatten(details))
        when = str(event.get("time", "")).replace("T", " ")[:19]
        rows.append([when, "" if event.get("step") is None else f"{event['step']:,}", event.get("event", ""), summary])
    columns = ["time (UTC)", "step", "event", ""]
    if len(rows) <= _EVENTS_SHOWN:
        return section("Events", table(columns, rows))
    kinds = {}
    for event in events:
        kinds[event.get("event", "")] = kinds.get(event.get("event", ""), 0) + 1
    summary = ", ".join(f"{amount} {kind}" for kind, amount in kinds.items())
    rare = [row for row in rows if row[2] not in ("save", "skip")][:_EVENTS_SHOWN]
    everything = folded(f"all {len(rows):,} events", table(columns, rows))
    return section("Events", f"<p>{escape(summary)}.</p>\n", table(columns, rare), everything)
