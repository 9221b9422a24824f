"""The model card of an export, README.md: made from the chain alone, so that nothing in it was typed by hand."""

from __future__ import annotations

import json

from aurora_train.lineage.drawing import ended, newest_scores, overrides
from aurora_train.units import counted, decimal, energy

NAME = "README.md"


def card(records: list[dict]) -> str:
    """The text of the card, in Markdown, from a chain that ends with an export."""
    begin, export = records[0], records[-1]
    head = {name: export[name] for name in ("library_name", "pipeline_tag", "licence", "base") if export.get(name)}
    renamed = {"licence": "license", "base": "base_model"}
    proof = export["proof"]
    lines = [
        "---", *(f"{renamed.get(key, key)}: {json.dumps(value)}" for key, value in head.items()), "---", "",
        f"# {export['run']}", "", *_what(begin, export), *_data(begin), *_scores(records, export),
        *_limits(records, export), *_gates(records), *_energy(records), *_origin(begin, export),
        "## Proof", "", f"**{proof['kind']}**: {proof['says']}.".replace("..", "."), "",
        "`aurora verify FOLDER` repeats it; `aurora lineage FOLDER` draws where the model comes from, and `--verify` "
        "holds every file to the record.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _what(begin: dict, export: dict) -> list[str]:
    lines = [f"{export['what']}, exported from step {export['step']} of the run `{export['run']}` (recipe "
             f"`{export['recipe']}`). {export.get('stored') or ''}".rstrip(), ""]  # fmt: skip
    source = (begin.get("data") or {}).get("source")
    if source:
        start = f", starting from `{export['base']}`" if export.get("base") else ""
        lines += [f"It was trained on `{source}`{start}.", ""]
    if export.get("parts"):
        lines += [export["parts"], ""]
    if export.get("use"):
        lines += [export["use"], ""]
    return lines


def _data(begin: dict) -> list[str]:
    data, rows = begin.get("data") or {}, []
    if not data:
        return []
    splits = data.get("splits") if isinstance(data.get("splits"), dict) else {}
    splits = {name: one for name, one in splits.items() if isinstance(one, dict)}
    columns = list(dict.fromkeys(what for one in splits.values() for what in one if isinstance(one[what], int)))
    for name, one in splits.items():
        rows.append(f"| {name} | " + " | ".join(f"{one.get(what, 0):,}" for what in columns) + " |")
    table = [f"| split | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|", *rows, ""] if columns else []
    parents = [f"Licence of the data of `{one['from']}`, from which it started: "
               f"{((one.get('lineage') or {}).get('begin', {}).get('data') or {}).get('licence', 'not recorded')}."
               for one in begin.get("parents") or [] if one.get("lineage")]  # fmt: skip
    licence = data.get("licence") or "not recorded"
    known = f"Licence of the data: {licence}. Fingerprint: sha256 {data.get('fingerprint')}."
    return ["## Training data", "", known, "", *table, *[text for one in parents for text in (one, "")]]  # fmt: skip


def _scores(records: list[dict], export: dict) -> list[str]:
    scores = newest_scores(records)
    if not scores or scores.get("step") != export["step"]:  # a score of another step says nothing of these weights
        return []
    numbers = scores["score"] | scores["baselines"]
    rows = [f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {decimal(value)} |"
            for name, value in numbers.items()]  # fmt: skip
    return ["## Score", "", "| | |", "|---|---|", *rows, ""] if rows else []


def _limits(records: list[dict], export: dict) -> list[str]:
    exceeded = [f"- {line}" for line in export.get("exceeded") or []]
    overridden = [f"- {line} ({one['by']}, {one['time']}: {one['reason']})"
                  for one in overrides(records) for line in one["says"]]  # fmt: skip
    return [
        *(["## Limits that it exceeds", "", *exceeded, ""] if exceeded else []),
        *(["## Limits and gates that were overridden", "", *overridden, ""] if overridden else []),
    ]


def _gates(records: list[dict]) -> list[str]:
    newest = {one["gate"]: one for one in records if one["kind"] == "gate"}
    rows = [f"| {name} | {'passed' if one['passed'] else 'failed'} | {'; '.join(one['says'])} |"
            for name, one in newest.items()]  # fmt: skip
    return ["## Gates", "", "| gate | | |", "|---|---|---|", *rows, ""] if rows else []


def _energy(records: list[dict]) -> list[str]:
    last = ended(records)
    if not last:
        return []
    used = last.get("energy") or {}
    if used.get("total_joules") is None:
        return ["## Energy", "", "Not measured.", ""]
    co2 = f", {used['co2_g']:.3g} g of CO2" if used.get("co2_g") is not None else ""
    return ["## Energy", "", f"{energy(used['total_joules'])}{co2}, all processes of the run together.", ""]


def _origin(begin: dict, export: dict) -> list[str]:
    lines, versions = [], begin.get("versions") or {}
    for parent in begin.get("parents") or []:
        at = f" at step {parent['step']}" if parent.get("step") is not None else ""
        at = f" at revision {parent['revision']}" if "revision" in parent else at
        lines.append(f"Started from: `{parent['from']}`{at} (sha256 {parent['digest']}).")
    if begin.get("code_sha256"):
        lines.append(f"Code: sha256 {begin['code_sha256']}.")
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines += [f"Versions: {named}."] if named else []
    machine = begin.get("machine")
    if machine:
        kind, processor = machine.get("device_kind"), machine.get("cpu_model")
        lines.append(f"Machine: {machine.get('device_count')} x {kind} ({processor}).")
    licence = f"that of its base, `{export['licence']}`" if export.get("licence") else "not recorded"
    lines += [f"Licence: {licence}.", f"Lineage: {counted(export['n'] + 1, 'record')} in `lineage.jsonl`, the last of "
              f"them after {export['prev']}."]  # fmt: skip
    return ["## Origin", "", *[text for one in lines for text in (one, "")]]
