"""Rewrites pydantic's errors for someone who is editing a YAML file: place, key, fault, and the nearest valid thing."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from aurora_train.config.fields import named_sections, sections_in
from aurora_train.config.yaml import Mark, Tree, write_flow
from aurora_train.errors import nearest

_TYPES = {
    "int_type": "a whole number", "int_from_float": "a whole number", "int_parsing": "a whole number",
    "float_type": "a number", "bool_type": "true or false", "string_type": "text", "list_type": "a list [a, b]",
    "tuple_type": "a list [a, b]", "dict_type": "a section of `key: value` lines",
    "model_type": "a section of `key: value` lines", "model_attributes_type": "a section of `key: value` lines",
    "finite_number": "a finite number", "none_required": "null",
}
_LIMITS = {
    "greater_than": ("gt", "greater than"), "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"), "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}
_FROM_VALIDATORS = ("value_error", "assertion_error")

_ANY = "NAME"  # stands in a path for a name that the user chooses


def explain(fault: ValidationError, tree: Tree, schema: type[BaseModel], final: bool = True) -> list[str]:
    """One line per wrong key, in the order of the text; unless `final`, only errors no derived value could correct."""
    grouped: dict[tuple, list] = {}
    for error in fault.errors(include_url=False):
        whole_section = error["type"] in _FROM_VALIDATORS and isinstance(error["input"], dict)
        if final or not (whole_section or error["type"] == "missing"):
            path, through_union = _path(error, tree.value)
            path += getattr(error.get("ctx", {}).get("error"), "below", ())
            grouped.setdefault(path, []).append((error, through_union))
    lines = []
    for path, errors in grouped.items():
        inner = any(other[: len(path)] == path and len(other) > len(path) for other in grouped)
        if inner and all(through_union for _, through_union in errors):
            continue  # another branch of the same union has a more specific error, deeper down
        mark = tree.mark(path, of_key=errors[0][0]["type"] in ("extra_forbidden", "missing"))
        key = ".".join(map(str, path))
        text = f"{place(mark, key)}: {_what(path, [error for error, _ in errors], schema)}"
        order = (mark.line is None, mark.line or 0, mark.column or 0) if mark else (True, 0, 0)
        lines.append((order, text))
    return [text for _, text in sorted(lines, key=lambda line: line[0])]


def place(mark: Mark | None, key: str) -> str:
    """`file:line:column: key`, or `override key`."""
    if mark is None:
        return key
    return str(mark) if str(mark) == f"override {key}" else f"{mark}: {key}"


def _path(error: dict, node: Any) -> tuple[tuple, bool]:
    """(pydantic's `loc` without the names of union branches, whether it had any)."""
    path, through_union = [], False
    for position, step in enumerate(error["loc"]):
        in_list = isinstance(node, list) and isinstance(step, int) and step < len(node)
        if in_list or isinstance(node, dict) and step in node:
            node = node[step]
            path.append(step)
        elif error["type"] == "missing" and position == len(error["loc"]) - 1:
            path.append(step)
        else:
            through_union = True
    return tuple(path), through_union


def _what(path: tuple, errors: list[dict], schema: type[BaseModel]) -> str:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return "unknown key" + _nearest_key(path, schema)
    if first["type"] == "missing":
        return "is required"
    wanted, hints = [], []
    for error in errors:
        want, hint = _wanted(error)
        if want not in wanted:
            wanted.append(want)
        hints += [hint] if hint else []
    if len(wanted) == 1 and not wanted[0].startswith("must be "):
        return wanted[0]
    joined = " or ".join(want.removeprefix("must be ") for want in wanted)
    return f"must be {joined}; got {_show(first['input'])}" + (f"; {hints[0]}" if hints else "")


def _wanted(error: dict) -> tuple[str, str | None]:
    kind, context, given = error["type"], error.get("ctx", {}), error["input"]
    if kind in _FROM_VALIDATORS:
        return str(context["error"]), None
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        return "must be " + " or ".join(choices), nearest(given, choices)
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        limit = context[name]
        return f"must be {words} {int(limit) if float(limit).is_integer() else limit}", None
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}", _as_meant(kind, given)
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}", None
    return error["msg"][0].lower() + error["msg"][1:], None


def _as_meant(kind: str, given: Any) -> str | None:
    if kind.startswith("int") and isinstance(given, float) and given.is_integer():
        return f"write {int(given)}"
    if isinstance(given, str) and kind in ("int_type", "float_type", "int_parsing"):
        try:
            float(given)
        except ValueError:
            return None
        return f"write {given} without quotes"
    if kind == "bool_type" and isinstance(given, str) and given.lower() in ("yes", "no", "on", "off"):
        return f"write {'true' if given.lower() in ('yes', 'on') else 'false'}"
    if kind == "string_type" and isinstance(given, (bool, int, float)):
        return f'write "{write_flow(given)}" in quotes'
    if kind.startswith("model") and given is None:
        return "remove the empty section, or fill it"
    return None


def _show(value: Any) -> str:
    if isinstance(value, str):
        value = value if len(value) <= 60 else value[:57] + "..."
        return f'"{value}"'
    text = "nothing" if value is None else write_flow(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest_key(path: tuple, schema: type[BaseModel]) -> str:
    """A hint for an unknown key: the section where it belongs, else the nearest key of this section, else of any."""
    everywhere = key_paths(schema)
    here, last = [str(step) for step in path[:-1]], str(path[-1])
    siblings = [key[-1] for key in everywhere if _same(key[:-1], here)]
    homes = [".".join(key) for key in everywhere if key[-1] == last]
    if homes:
        return f"; it lives in `{homes[0]}`" + "".join(f" (or `{home}`)" for home in homes[1:])
    leaves = {key[-1]: ".".join(key) for key in reversed(everywhere)}
    near = difflib.get_close_matches(last, leaves, 1, 0.75)
    hint = f"did you mean `{leaves[near[0]]}`?" if near else f"known here: {', '.join(siblings)}" if siblings else ""
    hint = nearest(last, siblings, hint, cutoff=0.7)
    return f"; {hint}" if hint else ""


def key_paths(schema: type[BaseModel]) -> list[tuple[str, ...]]:
    """Every key of a schema, sections included, outer ones first."""
    paths, queue = [], [((), schema)]
    while queue:
        above, model = queue.pop(0)
        for name, field in model.model_fields.items():
            path = (*above, field.alias or name)
            paths.append(path)
            queue += [(path, inner) for inner in sections_in(field.annotation)]
            queue += [((*path, _ANY), inner) for inner in named_sections(field.annotation)]
    return paths


def _same(key: tuple[str, ...], path: list[str]) -> bool:
    return len(key) == len(path) and all(mine in (_ANY, theirs) for mine, theirs in zip(key, path, strict=True))
