"""What the records of a lineage say to everyone: a chain goes out with an export, so it names no folder of the machine.

An event of a run goes into its chain with the sha256 of its line in events.jsonl, which decides all of it, and with
those of its details that are listed here.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

# A folder in the middle of a text, up to the name of what lies in it.
_FOLDERS = re.compile(r"(?<![\w./:-])~?/(?:[^/\s()'\";,]+/)*(?=[^/\s()'\";,])")
_DETAILS = {
    "start": ("parameters", "frozen"),
    "save": ("given_up",),
    "skip": ("loss", "grad_norm"),
    "rewind": ("first", "last", "data_first", "data_step", "fault"),
    "override": ("changes",),
    "replan": ("what", "reason", "before", "after", "restored"),
    "versions": ("what", "before", "after"),
    "walk_back": ("restored",),
    "other_code": ("by", "before", "after"),
    "limits_overridden": ("by", "reason", "exceeded"),
    "gate_overridden": ("by", "gate", "reason", "says"),
    "finish": ("state_sha256", "early"),
    "stop": ("by",),
}
_ENERGY = ("total_joules", "kwh", "cost", "co2_g")


def without_folders(value: Any) -> Any:
    """A JSON value in which each path of this machine has become the name of its file or folder."""
    if isinstance(value, dict):
        return {name: without_folders(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~/")) and "\n" not in value and " (" not in value:
        return PurePath(value).name or value
    return _FOLDERS.sub("", value)


def of_event(event: dict) -> dict[str, Any]:
    """The published part of an event, without its name, step and time."""
    shown = {name: event[name] for name in _DETAILS.get(event.get("event", ""), ()) if name in event}
    energy = event.get("energy")
    if isinstance(energy, dict):
        shown["energy"] = {name: energy[name] for name in _ENERGY if energy.get(name) is not None}
    return without_folders(shown)


def of_config(tree: dict) -> dict:
    """A run's resolved config, with names in place of folders. A plug's command may hold a password and stays here."""
    energy = {name: value for name, value in (tree.get("energy") or {}).items() if name != "plug"}
    return without_folders({**tree, **({"energy": energy} if "energy" in tree else {})})


def of_scores(scores: dict) -> dict:
    """The numbers of a score and of its baselines, with the step that was scored."""

    def numbers(one: Any) -> dict:
        return {name: value for name, value in (one or {}).items()
                if isinstance(value, int | float) and not isinstance(value, bool)}  # fmt: skip

    return {"step": scores.get("step"), "score": numbers(scores.get("score")),
            "baselines": numbers(scores.get("baselines")), "exceeded": scores.get("exceeded") or []}  # fmt: skip


def name_of(source: str | None) -> str | None:
    """The name of a source that may be a path."""
    return None if source is None else Path(source).name
