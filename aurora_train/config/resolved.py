"""Operations on a finished Config: write, hash, compare and describe it."""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from aurora_train.config.fields import paths_in, resume_class
from aurora_train.config.schema import Core
from aurora_train.config.yaml import Tree, write

_FIRST = ("recipe", "name")


def tree_of(config: Core) -> dict:
    """Every key and value as plain JSON-able data: the recipe, its own sections, then the trainer's."""
    tree = config.model_dump(mode="json", by_alias=True)
    own = [name for name in tree if name not in Core.model_fields]
    return {name: tree[name] for name in (*_FIRST, *own, *(n for n in Core.model_fields if n not in _FIRST))}


def dump(config: Core) -> str:
    """The resolved config as YAML from which an equal one can be loaded."""
    return write(tree_of(config))


def dump_without_folders(config: Core) -> str:
    """As `dump`, with the name alone of each file and folder: for a copy that is given away."""
    tree = Tree(tree_of(config), {}, {})
    for place in paths_in(tree, type(config)):
        tree.at(place[:-1])[place[-1]] = Path(tree.at(place)).name
    return write(tree.value)


def flat(config: Core) -> dict[str, tuple[Any, str]]:
    """`key.path` -> (value, resume class) of every leaf."""
    return {key: (value, resume) for key, value, resume, _ in _leaves(config)}


def _leaves(model: BaseModel, above: str = "", given: bool = False) -> Iterator[tuple[str, Any, str, bool]]:
    """(key, value, resume class, whether it was given) of every leaf; given is a value other than the default, and
    every value of a section that is None by default."""
    plain = model.model_dump(mode="json", by_alias=True)
    for name, field in type(model).model_fields.items():
        key, value = field.alias or name, getattr(model, name)
        default = field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{above}{key}.", given or not isinstance(default, BaseModel))
        else:
            differs = value != default or type(value) is not type(default)
            yield above + key, plain[key], resume_class(field), given or differs


def config_hash(config: Core) -> str:
    """sha256 hex over every key that is neither `free` nor at its default, and over a user recipe's code.

    Defaults are left out so that a key added by a later version does not rename the runs of earlier versions.
    """
    kept = {key: value for key, value, resume, given in _leaves(config) if resume != "free" and given}
    if not config.recipe_bundled:
        kept["recipe_sha256"] = config.recipe_sha256
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def diff(old: Core, new: Core) -> list[tuple[str, Any, Any, str]]:
    """(key, old value, new value, resume class) of every key that differs; a key absent on one side counts as None."""
    before, after = flat(old), flat(new)
    changes = []
    for key in {**before, **after}:
        (was, resume), (now, resume_now) = (side.get(key, (None, None)) for side in (before, after))
        if was != now or type(was) is not type(now):
            changes.append((key, was, now, _within(key, was, now, type(new)) or resume or resume_now))
    if not (old.recipe_bundled and new.recipe_bundled) and old.recipe_sha256 != new.recipe_sha256:
        changes.append(("recipe (its code)", old.recipe_sha256, new.recipe_sha256, "frozen"))
    return changes


def _within(key: str, was, now, schema: type[BaseModel]) -> str | None:
    """The resume class of a change within a dict of sections if all changed fields share one, otherwise None."""
    for name in key.split("."):
        fields = {field.alias or name: field for name, field in getattr(schema, "model_fields", {}).items()}
        if name not in fields:
            return None
        schema = fields[name].annotation
    section = typing.get_args(schema)[1] if typing.get_origin(schema) is dict else None
    named = isinstance(section, type) and issubclass(section, BaseModel)
    if not named or was is None or was.keys() != (now or {}).keys():
        return None
    fields = section.model_fields
    kinds = {resume_class(fields[one]) for part in was for one in was[part] if was[part][one] != now[part].get(one)}
    return kinds.pop() if len(kinds) == 1 else None


def json_schema(config_class: type[BaseModel]) -> dict:
    """JSON Schema of a config class, for editors; each field carries its `resume` class."""
    schema = config_class.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["extends"] = {
        "type": "string", "description": "another YAML file, relative to this one, whose values lie underneath"
    }
    return schema
