"""What a compiled step sends over the links: bytes into each device by kind of collective, read from its text.

Collectives inside loops count once for each turn. A ring is assumed: gathering n parts brings n - 1 of them, and an
all-reduce is a reduce-scatter and a gather.
"""

from __future__ import annotations

import collections
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


def received(text: str) -> dict[str, int]:
    """Bytes into each device in one run of a compiled program, by kind; `text` as `jax.stages.Compiled.as_text` gives
    it. {} if nothing is communicated."""
    bodies, entry = _bodies(text)
    total: collections.Counter = collections.Counter()

    def add(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            found = _COLLECTIVE.search(line)
            if found:
                total[found[2]] += times * _bytes(found[2], found[1], bool(found[3]), line)
            elif called := _CALLED.search(line):
                turns = _TURNS.search(line) if "body=" in called[0] else None
                add(called[1], times * int(turns[1] if turns else 1))

    add(entry, 1)
    return {kind: int(number) for kind, number in total.most_common() if number}


def _bodies(text: str) -> tuple[dict[str, list[str]], str]:
    """(the lines of each computation that call another one or communicate, the name of the first computation)."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if begun := _COMPUTATION.match(line):
            name = begun[2]
            bodies[name], entry = [], name if begun[1] else entry
        elif name and ("=%" in line or _COLLECTIVE.search(line)):
            bodies[name].append(line)
    return bodies, entry


def _bytes(kind: str, shapes: str, begins: bool, line: str) -> float:
    """What one collective brings into a device. `begins`: the shapes are those of its operands and of its results."""
    held, group = sum(map(_size, re.findall(r"(\w+)\[([\d,]*)\]", shapes))), _group(line)
    others = group - 1
    if kind == "all-gather":
        return (held * group / (group + 1) if begins else held) * others / group
    if kind == "reduce-scatter":
        return (held / (group + 1) if begins else held) * others
    if kind == "collective-permute":
        return held / 2 if begins else held
    return held * others / group * (2 if kind == "all-reduce" else 1)


def _size(shape: tuple[str, str]) -> int:
    width = _WIDTHS.get(shape[0]) or max(int(re.sub(r"\D.*", "", shape[0].lstrip("usfbc")) or 8) // 8, 1)
    return width * math.prod(int(n) for n in shape[1].split(",") if n)


def _group(line: str) -> int:
    """How many devices take part together."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if listed := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(listed[1])
    if written := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return written[1].count(",") + 1
    return 2  # pairs
