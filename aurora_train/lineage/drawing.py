"""A lineage drawn as a tree of lines, from the corpus to the export, and as one JSON document."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from aurora_train.lineage import chain, signing
from aurora_train.units import counted, decimal, energy

_DIGITS = 12  # of a hash, as shown
# Events that the tree counts, in this order; others are in the record alone.
_SHOWN = {"resume": "resumed", "skip": "updates skipped", "rewind": "went back", "override": "settings changed",
         "replan": "planned again", "versions": "versions changed", "walk_back": "walked past damage",
         "limits_overridden": "limits overridden", "gate_overridden": "gates overridden", "departed": "record departed",
         "fail": "failed", "hang": "hung"}


def document(folder: Path) -> dict[str, Any]:
    """The lineage of a run or an export as one JSON document. UserError for a chain that cannot be read."""
    path = folder / chain.NAME
    records, head = chain.read(path), chain.head_of(path)
    begin = records[0]
    return {
        "name": folder.absolute().name, "records": head.count, "head": head.sha256, "begin": begin,
        "config": config_now(records),
        "events": dict(counts(records)), "checkpoints": [
            {"step": one["step"], "manifest_sha256": one.get("checkpoint")} for one in records if one["kind"] == "save"
        ],
        "energy": ended(records).get("energy"), "state_sha256": ended(records).get("state_sha256"),
        "scores": newest_scores(records), "overrides": overrides(records),
        "gates": [_plain(one) for one in records if one["kind"] == "gate"],
        "export": next((_plain(one) for one in reversed(records) if one["kind"] == "export"), None),
        "signed_by": next((one["key_sha256"] for one in reversed(records) if one["kind"] == "sign"), None)
        if (folder / signing.SIGNATURE).is_file() else None,
    }  # fmt: skip


def _plain(record: dict) -> dict:
    return {name: one for name, one in record.items() if name not in ("n", "prev", "kind")}


def counts(records: list[dict]) -> Counter:
    """How often each kind of event is in a chain."""
    return Counter(one["kind"] for one in records if "event" in one or one["kind"] == "departed")


def ended(records: list[dict]) -> dict:
    """The newest record of a process that ended in order; {} if there is none."""
    return next((one for one in reversed(records) if one["kind"] in ("finish", "stop")), {})


def newest_scores(records: list[dict]) -> dict | None:
    """The newest score on record, with the step that was scored."""
    return next((one["scores"] for one in reversed(records) if one.get("scores")), None)


def overrides(records: list[dict]) -> list[dict]:
    """Limits and gates that were overridden, each with who asked, why, and the lines that it concerned."""
    return [{"gate": one.get("gate", "limits"), "by": one.get("by"), "reason": one.get("reason"),
             "says": one.get("says") or one.get("exceeded") or [], "step": one.get("step"), "time": one.get("time")}
            for one in records if one["kind"] in ("limits_overridden", "gate_overridden")]  # fmt: skip


def tree(held: dict[str, Any]) -> list[str]:
    """A document as lines: each corpus, each parent below what it was made from, the run, its export, and the chain."""
    nodes = _sources(held["begin"])
    below = [_run(held), *([_export(held["export"])] if held["export"] else []), _chain(held)]
    level = max(level for level, _ in nodes) + 1
    nodes += [(level + number, node) for number, node in enumerate(below)]
    lines = []
    for level, (first, *rest) in nodes:
        indent = "   " * level
        lines.append(f"{indent[3:]}└─ {first}" if level else first)
        lines += [f"{indent}   {line}" for line in rest]
    return lines


def _sources(begin: dict) -> list[tuple[int, list[str]]]:
    """(generation, lines) of what a run was made from: each parent after what that was made from, then its own data."""
    nodes = []
    for parent in begin.get("parents") or []:
        known = parent.get("lineage") or {}
        above = _sources(known["begin"]) if known else []
        at = f" at step {parent['step']}" if parent.get("step") is not None else ""
        at = f" at revision {parent['revision']}" if "revision" in parent else at
        of = f", for `{parent['prefix']}`" if parent.get("prefix") else ""
        own = f"its lineage has {known['records']} records, head {short(known['head'])}" if known else \
            "it has no lineage of its own"
        node = [f"parent {parent['from']}{at}{of}", f"sha256 {short(parent.get('digest'))}; {own}"]
        nodes += [*above, (max((level + 1 for level, _ in above), default=0), node)]
    return [*nodes, (0, _corpus(begin))]


def config_now(records: list[dict]) -> dict:
    """The config with which a run began, with every setting that was changed since."""
    config = json.loads(json.dumps(records[0].get("config") or {}))
    for record in records:
        for key, _, new, *_ in record.get("changes") or [] if record["kind"] == "override" else []:
            *above, last = key.split(".")
            section = config
            for name in above:
                section = section.setdefault(name, {}) if isinstance(section, dict) else {}
            if isinstance(section, dict):
                section[last] = new
    return config


def _corpus(begin: dict) -> list[str]:
    data = begin.get("data") or {}
    if not data:
        return ["no training data"]
    rest = [f"licence: {data.get('licence') or 'not recorded'}"]
    splits = data.get("splits") if isinstance(data.get("splits"), dict) else {}
    held = [f"{counted(one['documents'], 'document')} for {name}" for name, one in splits.items()
            if isinstance(one, dict) and "documents" in one]  # fmt: skip
    rest += [", ".join(held)] if held else []
    shards = begin.get("shards") or {}
    over = f" over {counted(len(shards), 'file')}" if shards else ""
    rest.append(f"fingerprint {short(data.get('fingerprint'))}{over}")
    tokenizer = begin.get("tokenizer") or {}
    if tokenizer:
        rest.append(f"tokenizer {tokenizer.get('kind')}, {tokenizer.get('vocab_size')} entries, "
                    f"sha256 {short(tokenizer.get('sha256'))}")  # fmt: skip
    return [f"corpus {data.get('source', 'without a name')}", *rest]


def _run(held: dict[str, Any]) -> list[str]:
    begin, events = held["begin"], held["events"]
    train, machine = held["config"].get("train") or {}, begin.get("machine") or {}
    versions = begin.get("versions") or {}
    rest = []
    if train:
        rest.append(f"{counted(train.get('steps', 0), 'step')} of {train.get('batch')}, seed {begin.get('seed')}, "
                    f"{train.get('precision')}")  # fmt: skip
    rest.append(f"code {short(begin.get('code_sha256'))}, recipe {short((begin.get('recipe') or {}).get('sha256'))}, "
                f"facts {short(begin.get('facts_sha256'))}")  # fmt: skip
    if versions:
        named = [f"{name} {versions[name]}" for name in ("aurora_train", "jax", "python") if name in versions]
        rest.append(", ".join([*named, f"{counted(len(begin.get('packages') or {}), 'package')} on record"]))
    if machine:
        rest.append(f"on {machine.get('device_count')} x {machine.get('device_kind')} ({machine.get('cpu_model')})")
    happened = [f"{what} {counted(events[kind], 'time')}" for kind, what in _SHOWN.items() if events.get(kind)]
    rest += ["; ".join(happened)] if happened else []
    joules = (held["energy"] or {}).get("total_joules")
    rest.append(f"energy: {energy(joules)}" if joules is not None else "energy: not measured")
    rest += _scored(held["scores"])
    rest += [f"overridden: {one['gate']} by {one['by']} ({one['reason']})" for one in held["overrides"]]
    rest += [f"state {short(held['state_sha256'])}"] if held["state_sha256"] else []
    recipe = (begin.get("recipe") or {}).get("name") or "an open model, not trained here"
    return [f"run {begin.get('run')}: {recipe}", *rest]


def _scored(scores: dict | None) -> list[str]:
    if not scores or not scores.get("score"):
        return []
    name, value = next(iter(scores["score"].items()))
    return [f"{name} {decimal(float(value))} at step {scores.get('step')}"]


def _export(export: dict[str, Any]) -> list[str]:
    proof = export.get("proof") or {}
    what = " ".join(filter(None, [export.get("format"), export.get("dtype")]))
    return [f"export of step {export.get('step')}: {what}", f"{counted(len(export.get('files') or {}), 'file')}; "
            f"proof ({proof.get('kind')}): {proof.get('says')}"]  # fmt: skip


def _chain(held: dict[str, Any]) -> list[str]:
    signed = f"signed by the key {short(held['signed_by'])}" if held["signed_by"] else "not signed"
    return [f"{counted(held['records'], 'record')}, head {held['head']}", signed]


def short(value: str | None) -> str:
    """The beginning of a hash."""
    return value[:_DIGITS] if value else "not recorded"
