"""`report.html`: one file that shows what a run did, made only from the files in the run folder.

It opens without a network and without scripts, and the same saved files give the same bytes. A part whose file is
missing says "not recorded", except samples, which many recipes do not make; nothing is guessed.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from statistics import median

import numpy as np

from aurora_train.errors import UserError
from aurora_train.files import write_atomically
from aurora_train.record import metrics as logs
from aurora_train.run import Run, early_words
from aurora_train.tools.report_memory import memory_section
from aurora_train.tools.report_page import (
    cards,
    escape,
    facts,
    flatten,
    folded,
    number,
    page,
    section,
    table,
    words,
)
from aurora_train.tools.report_plots import bars, curve
from aurora_train.units import count, counted, decimal, duration, percent, size

_SAMPLES_SHOWN, _EVENTS_SHOWN, _ROWS_SHOWN = 4, 30, 12


def write_report(run_folder) -> Path:
    """Write `report.html` of a run folder, finished or not; return its path. UserError if it is not a run folder."""
    run = Run.existing(run_folder)
    config_text = run.config.read_text()
    config = _yaml(config_text)
    records, events = logs.read(run.metrics), logs.read(run.events)
    scores, provenance, plan = _json(run.scores), _json(run.provenance), _json(run.plan)
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if isinstance(record.get("evaluation"), dict)]
    body = "".join(
        (
            _head(run, config, steps, evaluations, events, scores),
            _curves(steps, evaluations),
            _score(scores),
            _plots(_json(run.plots)),
            _samples(run.samples),
            section("Data", facts(provenance["data"]) if provenance and provenance.get("data") else ""),
            section("Config", f"<pre>{escape(config_text)}</pre>"),
            _machine(provenance),
            memory_section(plan, steps) or section("Memory plan", facts(plan) if plan else ""),
            _events(events),
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
    from aurora_train.train.guard import EXIT_LOW_MEMORY
    from aurora_train.train.saving import EXIT_UNSAVED
    from aurora_train.train.signals import StopRequest

    run = outcome.run
    if run.follows or outcome.status == EXIT_LOW_MEMORY or not run.config.is_file():
        return
    # A disk that accepted no checkpoint may refuse the report too; then only the exit status reports the failure.
    unless_full = contextlib.suppress(UserError) if outcome.status == EXIT_UNSAVED else contextlib.nullcontext()
    with unless_full, StopRequest():  # a signal that arrives now has nothing left to stop
        write_report(run.folder)


def _yaml(text: str) -> dict:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(text) or {}


def _json(path: Path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError("this file is not JSON", where=str(path), why=str(error)) from error


# ---- summary


def _head(run: Run, config: dict, steps, evaluations, events, scores) -> str:
    total = (config.get("train") or {}).get("steps")
    last = next((e for e in reversed(events) if e.get("event") in ("start", "resume", "finish")), {})
    state = f"finished {early_words(last)}".strip() if last.get("event") == "finish" else "not finished"
    lives = 1 + sum(event.get("event") == "resume" for event in events)
    step = steps[-1]["step"] if steps else 0
    summary = f"{state}, step {step:,} of {total:,}" if total else f"{state}, step {step:,}"
    if lives > 1:
        summary += ", resumed once" if lives == 2 else f", resumed {lives - 1} times"
    recipe = f"{words(str(config.get('recipe', '')))} · " if config.get("recipe") else ""
    return f'<h1>{escape(run.folder.name)}</h1>\n<p class="soft">{escape(recipe + summary)}</p>\n' + cards(
        _glance(steps, evaluations, events, scores)
    )


def _glance(steps, evaluations, events, scores) -> list[tuple[str, str]]:
    shown = []
    if scores:
        shown.append((words(scores["headline"]), number(scores["score"].get(scores["headline"]))))
    if steps:
        loss, over = recent_loss(steps) or (steps[-1]["loss"], 1)
        shown.append((f"training loss, mean of the last {over} steps" if over > 1 else "training loss", decimal(loss)))
    losses = [record["evaluation"]["loss"] for record in evaluations if "loss" in record["evaluation"]]
    if losses:
        shown.append(("best validation loss", decimal(min(losses))))
    if steps:
        shown.append(("targets trained on", count(sum(record.get("tokens", 0) for record in steps))))
    rates = [record["tokens_per_s"] for record in steps if record.get("tokens_per_s")]
    if rates:
        shown.append(("targets per second, median", count(median(rates))))
        shares = [record["mfu"] for record in steps if record.get("mfu") is not None]
        if shares:
            shown.append(("MFU, median", percent(median(shares))))
        done = [record["hfu"] for record in steps if record.get("hfu") is not None]
        if done:
            shown.append(("HFU (recomputation counted), median", percent(median(done))))
    memory = [record["memory_bytes"] for record in steps if record.get("memory_bytes")]
    if memory:
        shown.append(("memory, highest", size(max(memory))))
    shown.append(("training time", duration(training_seconds(steps))))
    joules = [event["energy_joules"] for event in events if event.get("energy_joules") is not None]
    shown.append(("energy", f"{sum(joules) / 3.6e6:.3g} kWh" if joules else "not measured"))
    skipped = sum(bool(record.get("skipped")) for record in steps)
    if skipped:
        shown.append(("updates not applied", str(skipped)))
    return shown


def recent_loss(steps: list[dict]) -> tuple[float, int] | None:
    """(mean, number) of the finite losses in the last twentieth of the steps, at least ten: a single one is noise."""
    last = [record["loss"] for record in steps[-max(len(steps) // 20, 10) :] if np.isfinite(record["loss"])]
    return (float(np.mean(last)), len(last)) if last else None


def training_seconds(steps) -> float | None:
    """Seconds that a run's recorded steps took, or None if none is recorded.

    `seconds` counts from the first step of each process, so the last values of all processes are added up."""
    total, before = 0.0, 0.0
    known = [record["seconds"] for record in steps if record.get("seconds") is not None]
    for seconds in known:
        if seconds < before:
            total += before
        before = seconds
    return total + before if known else None


# ---- the score


def _score(scores) -> str:
    if not scores:
        return section("Score")
    headline = scores["headline"]
    rivals = {name: _rival(value, headline) for name, value in (scores.get("baselines") or {}).items()}
    rows = [("this run", scores["score"].get(headline), True)]
    rows += [(words(name), value, False) for name, value in rivals.items() if value is not None]
    rows = [row for row in rows if isinstance(row[1], (int, float)) and np.isfinite(row[1])]
    parts = [f"<p>{escape(words(headline))} on held-out data, after step {number(scores.get('step'))}.</p>\n"]
    parts += [f"<p><b>{escape(remark)}</b></p>\n" for remark in scores.get("remarks") or []]
    if rows:
        rows.sort(key=lambda row: row[1])
        ours = next((i for i, row in enumerate(rows) if row[2]), None)
        parts.append('<div class="figures"><figure>')
        parts.append(bars("score", rows, words(headline)))
        parts.append("</figure><div>")
        parts.append(table(["", words(headline)], [[name, float(value)] for name, value, _ in rows], ours))
        parts.append("</div></div>\n")
    made = scores.get("baselines_made") or {}
    parts += [f"<p>{escape(note)}</p>\n" for note in [*(scores.get("notes") or []), *(made.get("notes") or [])]]
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


def _plots(plots) -> str:
    """The figures of the recipe's score (`Recipe.score`, "plots")."""
    drawn = []
    for index, plot in enumerate(plots or []):
        lines = [(name, np.array(x, float), np.array(y, float)) for name, (x, y) in plot["series"].items()]
        labels = {"ylabel": plot.get("y_label", ""), "xlabel": plot.get("x_label", "")}
        drawing = curve(f"plot-{index}", lines, wide=True, **labels)
        drawn.append(f'<figure class="wide"><h3>{escape(plot.get("title", ""))}</h3>{drawing}</figure>')
    return section("What it did", f'<div class="figures">{"".join(drawn)}</div>\n') if drawn else ""


def _rival(value, headline: str):
    """A baseline's number in the headline measure, from {"xz": 1.6} or {"xz": {"bits_per_byte": 1.6}}; else None."""
    if isinstance(value, dict):
        value = value.get(headline)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# ---- curves


def series(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values), float64[N] each, from the records that have a number of this name."""
    pairs = [(record["step"], record[name]) for record in records if isinstance(record.get(name), (int, float))]
    array = np.array(pairs, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _curves(steps, evaluations) -> str:
    if not steps:
        return section("Training")
    losses = [("training", *series(steps, "loss"))]
    validation = [{"step": record["step"], **record["evaluation"]} for record in evaluations]
    if len(series(validation, "loss")[0]):
        losses.append(("validation", *series(validation, "loss")))
    figures = [f'<figure class="wide">{curve("loss", losses, "loss", smooth=True, wide=True)}</figure>']
    for name, label in (
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("tokens_per_s", "targets per second"),
        ("memory_bytes", "memory, bytes"),
    ):
        x, y = series(steps, name)
        if np.isfinite(y).sum() > 1:
            absolute = name in ("tokens_per_s", "memory_bytes")
            drawing = curve(name, [(label, x, y)], label, smooth=name == "grad_norm", from_zero=absolute)
            figures.append(f"<figure>{drawing}</figure>")
    targets = sum(record.get("tokens", 0) for record in steps)
    summary = f"{counted(len(steps), 'step')}, {count(targets)} targets"
    if validation and "loss" in validation[-1]:
        summary += f"; last validation loss {decimal(validation[-1]['loss'])} at step {validation[-1]['step']:,}"
    return section("Training", f"<p>{escape(summary)}.</p>\n", f'<div class="figures">{"".join(figures)}</div>\n')


# ---- samples


def _samples(folder: Path) -> str:
    files = sorted(folder.glob("*.json"), key=_step_of)
    if not files:
        return ""
    parts = []
    for position, path in enumerate(reversed(files)):
        samples = _json(path)
        samples = samples if isinstance(samples, list) else [samples]
        shown = [_sample(sample) for sample in samples]
        first, rest = shown[:_SAMPLES_SHOWN], shown[_SAMPLES_SHOWN:]
        block = "".join(first) + (folded(f"{len(rest)} more", "".join(rest)) if rest else "")
        if position == 0:
            parts.append(f'<p class="soft">{escape(words(path.stem))}, exactly as the model wrote them.</p>\n{block}')
        else:
            parts.append(folded(words(path.stem), block))
    return section("Samples", *parts)


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


def _machine(provenance) -> str:
    if not provenance:
        return section("Machine and versions")
    parts = []
    for title, name in (("Machine", "machine"), ("Versions", "versions"), ("Energy", "energy")):
        if provenance.get(name):
            parts += [f"<h3>{title}</h3>\n", facts(provenance[name])]
    rest = {k: v for k, v in provenance.items() if k not in ("machine", "versions", "energy", "data")}
    if rest:
        parts += ["<h3>Code and command</h3>\n", facts(rest)]
    return section("Machine and versions", *parts)


def _events(events) -> str:
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
