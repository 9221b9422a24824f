"""How a config field is declared: its default, its limits, its help, and what a resume may do with it.

A resume class is part of a field's meaning, so it is declared with the field and nowhere else:
a change of a `frozen` field makes another run; `located` is a path to bytes that are the same wherever they are
stored; `warned` may change and is recorded; `elastic` changes float order only (the plan, the mesh); `free` does not
affect the numbers at all and is left out of the config's hash.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Resume = Literal["frozen", "located", "warned", "elastic", "free"]


class Section(BaseModel):
    """A mapping of the config. Frozen; unknown keys and inexact types are errors (an int serves as a float)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


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
