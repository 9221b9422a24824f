"""Reads YAML text into a plain tree, with the place of every key and value so that later errors can name a column.

Reads the parser's events rather than its objects: a config is untrusted text, and events carry no constructors,
no tags and no recursion. Scalars follow the YAML 1.2 core schema: `3e-4` is a number, `no` and `1_000` are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
)

from aurora_train.errors import UserError

MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_VALUES = 1 << 20, 32, 64, 5000

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL, _HEX = re.compile(r"0o[0-7]+\Z"), re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_INFINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z")


@dataclass(frozen=True)
class Mark:
    """A place in a text: `file:line:column` counted from one, or `override a.b.c` when `line` is None."""

    text: str
    line: int | None = None
    column: int | None = None
    file: Path | None = None  # the file itself, for paths that are relative to it

    def __str__(self):
        return self.text if self.line is None else f"{self.text}:{self.line}:{self.column}"


@dataclass
class Tree:
    """`value` is nested dicts, lists and scalars; `keys` and `values` map a path (tuple) to its Mark.

    `empty` holds the paths whose value is null because nothing was written after the key.
    """

    value: Any
    keys: dict[tuple, Mark]
    values: dict[tuple, Mark]
    empty: set[tuple] = field(default_factory=set)

    def mark(self, path: tuple, of_key: bool = False) -> Mark | None:
        """The place of a path, or of the nearest enclosing one that was written down."""
        first, second = (self.keys, self.values) if of_key else (self.values, self.keys)
        for end in range(len(path), 0, -1):
            mark = first.get(path[:end]) or second.get(path[:end])
            if mark:
                return mark
        return self.values.get(())

    def merge(self, other: Tree) -> None:
        """Lay `other` over this tree: mappings merge key by key, anything else replaces."""
        self._merge_at((), other)

    def _merge_at(self, path: tuple, other: Tree) -> None:
        mine, theirs = self.at(path), other.at(path)
        for key, value in theirs.items():
            inner = (*path, key)
            if isinstance(value, dict) and isinstance(mine.get(key), dict):
                self._merge_at(inner, other)
                continue
            self._forget(inner)
            mine[key] = value
            for marks, others in ((self.keys, other.keys), (self.values, other.values)):
                marks.update({p: m for p, m in others.items() if p[: len(inner)] == inner})
            self.empty |= {p for p in other.empty if p[: len(inner)] == inner}

    def _forget(self, path: tuple) -> None:
        for marks in (self.keys, self.values):
            for stale in [p for p in marks if p[: len(path)] == path]:
                del marks[stale]
        self.empty = {p for p in self.empty if p[: len(path)] != path}

    def remove(self, path: tuple) -> None:
        """Remove a key, as if it had not been written."""
        del self.at(path[:-1])[path[-1]]
        self._forget(path)

    def has(self, path: tuple) -> bool:
        """Whether the key was written, even as null."""
        node = self.value
        for step in path:
            if not isinstance(node, dict) or step not in node:
                return False
            node = node[step]
        return True

    def at(self, path: tuple) -> Any:
        node = self.value
        for step in path:
            node = node[step]
        return node


def show_path(path: Path) -> str:
    """The path as a user would type it: relative when it lies under the current folder."""
    full = path.absolute()
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(full)


def read_text(path: Path, what: str = "config") -> str:
    """The text of a UTF-8 file of limited size. Every failure is a UserError."""
    shown = show_path(path)
    if path.is_dir():
        raise UserError(f"is a folder, not a {what} file", where=shown)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"no such {what} file", where=shown) from None
    except OSError as fault:
        raise UserError(f"cannot read the {what} file", where=shown, why=fault.strerror) from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"the {what} file is larger than {MAX_BYTES >> 20} MiB", where=shown)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        before = raw[: fault.start]
        line, column = before.count(b"\n") + 1, fault.start - before.rfind(b"\n")
        raise UserError(
            f"byte 0x{raw[fault.start]:02x} is not UTF-8 text", where=f"{shown}:{line}:{column}",
            hint=f"save the {what} file as UTF-8",
        ) from None


def read_file(path: Path) -> Tree:
    """The tree of a YAML file, whose top level must be a mapping."""
    text, shown = read_text(path), show_path(path)
    tree = parse(text, lambda line, column: Mark(shown, line, column, path))
    if tree.value is None:
        raise UserError("the config is empty", where=shown, hint="it needs at least `recipe: NAME`")
    if not isinstance(tree.value, dict):
        raise UserError("the top level must be `key: value` lines", where=str(tree.values[()]))
    return tree


def parse(text: str, mark) -> Tree:
    """Parse one YAML document. `mark(line, column)` makes the Mark of a place; lines count from one."""

    def refuse(what, event_mark, hint=None):
        raise UserError(what, where=str(mark(event_mark.line + 1, event_mark.column + 1)), hint=hint)

    root, documents = None, 0
    try:
        events = YAML(typ="safe", pure=True).parse(text)
        reader = _Reader(events, mark, refuse)
        for event in events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    what = "a second YAML document; a config is one document"
                    refuse(what, event.start_mark, "remove the `---` line")
            elif isinstance(event, NodeEvent):
                root = reader.node(event, ())
    except MarkedYAMLError as fault:
        place = fault.problem_mark or fault.context_mark
        what = " ".join(part for part in (fault.context, fault.problem) if part)
        refuse(f"not valid YAML: {what}", place)
    except YAMLError as fault:
        raise UserError(f"not valid YAML: {str(fault).splitlines()[0]}", where=str(mark(1, 1))) from None
    return Tree(root, reader.keys, reader.values, reader.empty)


class _Reader:
    """Reads parser events by recursive descent, at most MAX_DEPTH levels deep."""

    def __init__(self, events, mark, refuse):
        self.events, self.mark, self.refuse = events, mark, refuse
        self.keys, self.values, self.empty = {}, {}, set()

    def node(self, event, path: tuple) -> Any:
        """The value that begins with this event."""
        self._refuse_references(event)
        place = event.start_mark
        if len(self.values) == MAX_VALUES:
            self.refuse(f"more than {MAX_VALUES} values; a config is not a place for data", place)
        self.values[path] = self.mark(place.line + 1, place.column + 1)
        if isinstance(event, ScalarEvent):
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            self.refuse(f"nested deeper than {MAX_DEPTH} levels", place)
        container = {} if isinstance(event, MappingStartEvent) else []
        while not isinstance(inner := next(self.events), (MappingEndEvent, SequenceEndEvent)):
            if isinstance(container, dict):
                key = self._key(inner, path, container)
                container[key] = self.node(next(self.events), (*path, key))
            else:
                container.append(self.node(inner, (*path, len(container))))
        return container

    def _refuse_references(self, event) -> None:
        place = event.start_mark
        if isinstance(event, AliasEvent):
            self.refuse(f"aliases (`*{event.anchor}`) are not allowed", place, "write the value out")
        if event.anchor:
            self.refuse(f"anchors (`&{event.anchor}`) are not allowed", place, "write the value out")
        if event.tag is not None:
            self.refuse(f"tags (`{event.tag}`) are not allowed", place, "remove the tag")

    def _key(self, event, path: tuple, container: dict) -> str:
        self._refuse_references(event)
        place = event.start_mark
        if not isinstance(event, ScalarEvent):
            self.refuse("a key must be a single word, not a list or mapping", place)
        inner = (*path, event.value)
        if event.value in container:
            self.refuse(f"`{event.value}` is written twice; first at {self.keys[inner]}", place)
        self.keys[inner] = self.mark(place.line + 1, place.column + 1)
        return event.value

    def _scalar(self, event, path: tuple) -> Any:
        text = event.value
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            self.refuse("half of a surrogate pair is not a character", event.start_mark)
        if event.style in ("'", '"', "|", ">"):
            return text
        if (_INT.match(text) or _OCTAL.match(text) or _HEX.match(text)) and len(text) > MAX_DIGITS:
            self.refuse(f"a number of {len(text)} digits", event.start_mark)
        value = plain_scalar(text)
        if not text:
            self.empty.add(path)
        if value is None and path in self.keys:
            self.values[path] = self.keys[path]  # the parser puts an empty value on the line below its key
        return value


def plain_scalar(text: str) -> Any:
    """An unquoted YAML 1.2 core scalar as None, bool, int, float or str."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text)
    if _OCTAL.match(text):
        return int(text[2:], 8)
    if _HEX.match(text):
        return int(text, 16)
    if _FLOAT.match(text) or _INFINITE.match(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./+-]*(?: [A-Za-z0-9_./+-]+)*\Z")


def write_scalar(value: Any) -> str:
    """The text that `plain_scalar`, or a double-quoted YAML string, reads back as exactly this value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value).replace("inf", ".inf").replace("nan", ".nan")
    if isinstance(value, int):
        return str(value)
    if _PLAIN.match(value) and plain_scalar(value) == value:
        return value
    return '"' + "".join(_escape(letter) for letter in value) + '"'


def _escape(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    code = ord(letter)
    if 0x20 <= code < 0x7F or letter.isalpha() and code < 0x10000:
        return letter
    return f"\\U{code:08x}"


def write_flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write_scalar(key)}: {write_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(write_flow(inner) for inner in value) + "]"
    return write_scalar(value)


def write(tree: dict, indent: int = 0) -> str:
    """Block-style YAML of nested dicts; lists and empty mappings on one line."""
    lines = []
    for key, value in tree.items():
        head = " " * indent + write_scalar(key) + ":"
        if isinstance(value, dict) and value:
            lines.append(f"{head}\n{write(value, indent + 2)}")
        else:
            lines.append(f"{head} {write_flow(value)}\n")
    return "".join(lines)
