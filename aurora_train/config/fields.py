"""How a config field is declared: its default, its limits, its help, and what a resume may do with it.

A resume class is part of a field's meaning, so it is declared with the field and nowhere else:
a change of a `frozen` field makes another run; `located` is a path to bytes that are the same wherever they are
stored; `warned` may change and is recorded; `elastic` changes float order only (the plan, the mesh); `free` does not
affect the numbers at all and is left out of the config's hash.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Resume = Literal["frozen", "located", "warned", "elastic", "free"]


class Section(BaseModel):
    """A mapping of the config. Frozen; unknown keys and inexact types are errors (an int serves as a float)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


class WrongKey(ValueError):
    """Raised by a validator of a whole section for one key of it: `key` is its path from there, `lora.targets`.

    A message for a user then has the place of that key.
    """

    def __init__(self, what: str, *, key: str):
        super().__init__(what)
        self.below = tuple(key.split("."))


def setting(
    default: Any = ...,
    *,
    resume: Resume = "frozen",
    help: str = "",
    path_unless: tuple[str, ...] | None = None,
    **limits,
) -> Any:
    """Declare one field of a Section.

    Args:
        default: the value when unset; `...` makes the field required.
        resume: what a resume may do with a changed value.
        help: one line with the unit; it becomes the JSON Schema's description.
        path_unless: the value is a path, unless it begins with one of these; `()` for always. Loading makes it
            absolute, so that a resume can open it; it is relative to its file, or in an override to the current folder.
        limits: pydantic's own (`ge`, `gt`, `le`, `lt`, `min_length`, `pattern`, `alias`, ...).
    """
    extra = {"resume": resume} | ({} if path_unless is None else {"path_unless": list(path_unless)})
    return Field(default, description=help or None, json_schema_extra=extra, **limits)


def resume_class(field) -> Resume:
    """The resume class of a pydantic FieldInfo; a field declared without `setting` is frozen."""
    extra = field.json_schema_extra
    return extra.get("resume", "frozen") if isinstance(extra, dict) else "frozen"


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes of an annotation such as `Model`, `Model | None` or `Annotated[A | B, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [inner for part in typing.get_args(annotation) for inner in sections_in(part)]
    return []


def named_sections(annotation: Any) -> list[type[BaseModel]]:
    """The section classes of an annotation such as `dict[str, Source]`, whose keys are names that the user chooses."""
    return sections_in(typing.get_args(annotation)[1]) if typing.get_origin(annotation) is dict else []


def written(tree, schema: type[BaseModel], above: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(path, pydantic's FieldInfo) of every key of a schema that a Tree has, each section before its keys.

    A key may be removed from the tree while it is visited.
    """
    for name, field in schema.model_fields.items():
        path = (*above, field.alias or name)
        if not tree.has(path):
            continue
        yield path, field
        value = tree.at(path) if tree.has(path) else None
        if isinstance(value, dict):
            inner = [(path, section) for section in sections_in(field.annotation)]
            inner += [((*path, one), section) for one in value for section in named_sections(field.annotation)]
            for place, section in inner:
                if isinstance(tree.at(place), dict):
                    yield from written(tree, section, place)


def paths_in(tree, schema: type[BaseModel]) -> Iterator[tuple]:
    """The place in a Tree of every text that is a path (`setting`, `path_unless`)."""
    for path, field in written(tree, schema):
        extra, value = field.json_schema_extra, tree.at(path)
        if not isinstance(extra, dict) or "path_unless" not in extra:
            continue
        for one in [(*path, key) for key in value] if isinstance(value, dict) else [path]:
            text = tree.at(one)
            if isinstance(text, str) and text and not text.startswith(tuple(extra["path_unless"])):
                yield one


_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?i?B)\Z")


def parse_bytes(text: str) -> int:
    """`96GB` or `80GiB` as bytes; ValueError for anything else."""
    match = _BYTES.match(text)
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError("must be a size such as 96GB or 80GiB")
    return int(float(match[1]) * _UNITS[match[2]])
