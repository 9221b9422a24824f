"""Reads a trace of training steps: the device's time by part of the model and kind of work.

The trace is written by jax's profiler. The part to which an operation belongs is read from the compiled program, whose
instructions carry the names of the scopes (`jax.named_scope`) in which they were traced.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

PARTS = ("embedding", "attention", "mlp", "norm", "loss", "optimizer")  # scopes of the models and of the step

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(", re.M)
_COMPUTATION = re.compile(r"^%?([\w.\-]+) \(.*?\{$(.*?)^\}", re.M | re.S)
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_SCOPE = re.compile(rf"(?<!\w)({'|'.join(PARTS)})(?!\w)")
_CONTAINERS = ("while", "conditional", "call")  # their time is the time of the operations inside them
_MOVES = {
    "copy", "transpose", "slice", "concatenate", "bitcast", "pad", "dynamic-slice", "dynamic-update-slice", "parameter",
    "constant", "reshape", "reverse", "iota", "tuple", "get-tuple-element", "convert", "copy-start", "copy-done",
}  # fmt: skip
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Row(NamedTuple):
    """Time of one kind of work in one part of the model. `seconds` per step; concurrent operations are added up."""

    part: str
    kind: str
    seconds: float
    count: float
    share: float


class Timeline(NamedTuple):
    """Seconds per step, as means over the traced steps. `busy`: at least one operation ran. `host`: by annotation."""

    step: float
    busy: float
    host: dict[str, float]
    rows: list[Row]


def read_events(folder: Path) -> list[dict]:
    """The complete events of the newest trace below `folder`. FileNotFoundError if there is none."""
    files = sorted(Path(folder).glob("plugins/profile/*/*.trace.json.gz"))
    if not files:
        raise FileNotFoundError(f"no trace under {folder}")
    with gzip.open(files[-1]) as stream:
        return [event for event in json.load(stream)["traceEvents"] if event.get("ph") == "X"]


def perfetto_file(folder: Path) -> Path:
    """The newest trace below `folder` in Perfetto's format."""
    return sorted(Path(folder).glob("plugins/profile/*/perfetto_trace.json.gz"))[-1]


def instructions(program: str) -> dict[str, tuple[str, str] | None]:
    """(part, kind) of every instruction in a compiled program's text, by name; None for one that contains others."""
    bodies = dict(_COMPUTATION.findall(program))
    known = {}
    for line in program.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, operation = match.groups()
        called = _CALLED.search(line)
        body = bodies.get(called[1], "") if called and operation == "fusion" else ""
        known[name] = None if operation in _CONTAINERS else (_part(line + body), _kind(operation, line, body))
    return known


def _part(text: str) -> str:
    """The innermost scope of the instruction itself, or of one that it fuses if it has none of its own."""
    for name in _OP_NAME.findall(text):
        scopes = _SCOPE.findall(name)
        if scopes:
            return scopes[-1]
    return "other"


def _kind(operation: str, line: str, body: str) -> str:
    within = [kind for _, kind in _INSTRUCTION.findall(body)] or [operation]
    if any(one.startswith(_COLLECTIVES) for one in within):
        return "communication"
    if "dot" in within or "convolution" in within:
        return "product"
    if "custom-call" in within:
        target = _TARGET.search(line)
        name = target[1].lower() if target else ""
        products = ("gemm", "matmul", "onednn", "ynn", "cublas")
        return "product" if any(one in name for one in products) else f"kernel {name}"
    if "reduce" in within or "sort" in within:
        return "reduction"
    return "movement" if set(within) <= _MOVES else "elementwise"


def timeline(events: list[dict], program: str, steps: int, annotations: tuple[str, ...]) -> Timeline:
    """The mean step of a trace.

    Args:
        events: from `read_events`.
        program: the compiled step's text.
        steps: the number of traced steps, each in an annotation "step".
        annotations: names of host activities, whose times are added up by name.
    """
    known, seconds, counts = instructions(program), defaultdict(float), defaultdict(int)
    intervals, host, whole = [], dict.fromkeys(annotations, 0.0), 0.0
    for event in events:
        length = event["dur"] * 1e-6
        where = known.get(event.get("args", {}).get("hlo_op") or "")
        if where is not None:
            seconds[where] += length
            counts[where] += 1
            intervals.append((event["ts"] * 1e-6, event["ts"] * 1e-6 + length))
        elif event["name"] in host:
            host[event["name"]] += length
        elif event["name"] == "step":
            whole += length
    total = sum(seconds.values()) or 1.0
    rows = [Row(*key, took / steps, counts[key] / steps, took / total) for key, took in seconds.items()]
    rows.sort(key=lambda row: -row.seconds)
    per_step = {name: took / steps for name, took in host.items()}
    return Timeline(whole / steps, _covered(intervals) / steps, per_step, rows)


def _covered(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
