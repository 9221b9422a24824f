"""Turns a path or bundled name, plus overrides, into one checked, frozen Config.

The file is laid over the one it extends, and overrides over both. Then the recipe's derived values fill the keys that
nobody set, and the whole is validated at once. Nothing after this module touches a raw tree.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError, create_model

from aurora_train import bundled
from aurora_train.config import messages, removed
from aurora_train.config.deriving import derives, fill, unset_nulls
from aurora_train.config.fields import paths_in
from aurora_train.config.find_recipe import FoundRecipe, find_recipe, load_recipe
from aurora_train.config.schema import Core, Init
from aurora_train.config.yaml import Mark, Tree, parse, read_file, show_path
from aurora_train.errors import UserError, nearest
from aurora_train.recipe import Derived, Recipe

_KEY = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\Z")
_NAMED = re.compile(r"\b[a-z_]\w*(?:\.\w+)+")  # keys that the text of an error names


@dataclass(frozen=True)
class _Loaded:
    """The origin of a Config: its file, its recipe, derived values and remarks on dials."""

    source: Path
    recipe: FoundRecipe
    derived: list[Derived]
    overruled: list[str]


def load(path_or_name: str | Path, overrides: Iterable[str] = ()) -> Core:
    """Read, complete and check a config.

    Args:
        path_or_name: a YAML file, or a bundled config's name (`quickstart`, `language/quickstart`).
        overrides: `key.path=value` strings, laid over the file in order.

    Raises:
        UserError: naming every wrong key with `file:line:column`.
    """
    file = _locate(str(path_or_name))
    return _load_file(file, overrides, None)


def load_values(values: dict, name: str) -> Core:
    """The config of plain values that no file holds, completed and checked like one; `name` stands for the file."""
    return _complete(Tree(values, {}, {(): Mark(name)}), Path(name), None)


def load_resolved(
    run_folder: str | Path, overrides: Iterable[str] = (), recipe: Path | None = None, *, reading: bool = True
) -> Core:
    """The config of a run; a user's recipe is read from the copy in the run's `code/`.

    The values were checked when the run began. They are checked again only if there are `overrides`, because the run's
    data may be missing on this machine. `recipe` is a file to use instead of the run's recipe. A run that is trained
    further, not only read (`reading`), is refused if a key of an earlier version asks for what is gone.
    """
    run_folder, overrides = Path(run_folder), list(overrides)
    file, code, checked = run_folder / "config.yaml", run_folder / "code", bool(overrides)
    return _load_file(file, overrides, code, recipe, checked=checked, reading=reading and not checked)


def _load_file(
    file: Path, overrides: Iterable[str], code: Path | None, recipe: Path | None = None, *, checked: bool = True,
    reading: bool = False,
) -> Core:  # fmt: skip
    tree = _read_extended(file)
    for override in overrides:
        tree.merge(parse_override(override))
    return _complete(tree, file, code, recipe, checked=checked, reading=reading)


def _complete(
    tree: Tree, file: Path, code: Path | None, recipe: Path | None = None, *, checked: bool = True,
    reading: bool = False,
) -> Core:  # fmt: skip
    """The Config of a whole tree: derived values filled in, validated, checked."""
    found_recipe = load_recipe(recipe, bundled.is_bundled(recipe)) if recipe else _recipe_of(tree, file, code)
    schema = config_class(found_recipe.cls)
    if tree.value.get("name") is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-") or "run"
        tree.merge(Tree({"name": name}, {}, {("name",): Mark(show_path(file))}))
    removed.take_out(tree, reading=reading)
    _write_out_parts(tree)
    unset_nulls(tree, schema, overrides_only=code is not None)
    _place_paths(tree, schema)
    # A run's config.yaml holds all that it was started with: a key missing there was added by a later version.
    derived, overruled = _derive(found_recipe, tree, schema, file) if code is None else ([], [])
    try:
        config = schema.model_validate_json(json.dumps(tree.value))
    except ValidationError as fault:
        raise _as_user_error(messages.explain(fault, tree, schema), file) from None
    config._loaded = _Loaded(file, found_recipe, derived, overruled)
    if checked:
        _check(config, tree)
    return config


def _locate(written: str) -> Path:
    path = Path(written)
    if os.path.isfile(path):  # unlike Path.is_file, False for names that the system rejects
        return path
    ours = bundled.config_file(written)
    if ours or os.path.isdir(path):
        return ours or path
    known = list(bundled.configs())
    rivals = known + [name.rpartition("/")[2] for name in known] + [str(p) for p in sorted(path.parent.glob("*.y*ml"))]
    hint = nearest(written, rivals, f"bundled configs: {', '.join(known)}" if known else None)
    raise UserError(f"no config file or bundled config `{written}`", hint=hint)


def _read_extended(file: Path) -> Tree:
    """The file laid over the one it extends, if any. One level: a chain is harder to read than a copy."""
    tree = read_file(file)
    if "extends" not in tree.value:
        return tree
    mark, written = tree.values[("extends",)], tree.value.pop("extends")
    if not isinstance(written, str):
        raise UserError("extends: must be the path of one YAML file", where=str(mark))
    base_file = file.parent / written
    if base_file.resolve() == file.resolve():
        raise UserError("extends: a config cannot extend itself", where=str(mark))
    if not base_file.exists():
        beside = (path.name for path in sorted(file.parent.glob("*.y*ml")))
        raise UserError(
            f"extends: no such file {show_path(base_file)}", where=str(mark),
            hint=nearest(written, beside, "the path is relative to this config"),
        )
    base = read_file(base_file)
    if "extends" in base.value:
        raise UserError(
            f"extends: {written} extends another config itself ({base.keys[('extends',)]})", where=str(mark),
            why="`extends` is one level deep", hint="extend the base directly, or write the values out",
        )
    base.merge(tree)
    base.values[()] = tree.values[()]
    return base


def parse_override(text: str) -> Tree:
    """`a.b.c=value` as a tree; the value is read as YAML."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals:
        raise UserError(f"override `{text}` has no `=`", hint="write key.path=value, such as train.steps=100")
    if not _KEY.match(key):
        raise UserError(f"override `{text}`: `{key}` is not a key path", hint="write key.path=value")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError("the value is not UTF-8 text", where=f"override {key}")
    mark = Mark(f"override {key}")
    path = tuple(key.split("."))
    inner = parse(value, lambda line, column: mark)
    node, keys, values = inner.value, {}, {}
    for end in range(len(path), 0, -1):
        node = {path[end - 1]: node}
        keys[path[:end]] = values[path[:end]] = mark
    for marks, inner_marks in ((keys, inner.keys), (values, inner.values)):
        marks.update({(*path, *below): place for below, place in inner_marks.items()})
    empty = {(*path, *below) for below in inner.empty} | ({path} if not value.strip() else set())
    return Tree(node, keys, values, empty)


def _recipe_of(tree: Tree, file: Path, code: Path | None) -> FoundRecipe:
    written = tree.value.get("recipe")
    if written is None:
        raise UserError(
            f"{show_path(file)}: recipe: is required",
            hint="bundled: " + ", ".join(bundled.recipes()) + "; or a .py file beside the config",
        )
    mark = tree.mark(("recipe",))
    if not isinstance(written, str):
        raise UserError("recipe: must be a name or a .py file", where=str(mark))
    if code is not None and written.endswith(".py"):
        return find_recipe(Path(written).name, code, str(mark))
    return find_recipe(written, (mark.file or file).parent, str(mark))


@functools.cache
def config_class(recipe_class: type[Recipe]) -> type[Core]:
    """One pydantic class with the sections of Core and of a recipe. UserError if a recipe redefines one of Core's."""
    owned: type[BaseModel] = recipe_class.Config
    clash = [name for name in owned.model_fields if hasattr(Core, name) or name in Core.model_fields]
    if clash:
        raise UserError(f"{recipe_class.__name__}.Config redefines `{clash[0]}`, which belongs to the trainer")
    bases = (Core,) if issubclass(Core, owned) else (owned, Core)  # a recipe without sections uses Section itself
    return create_model("Config", __base__=bases)


def _write_out_parts(tree: Tree) -> None:
    """Expand `init: {policy: RUN}` to `init: {parts: {policy: RUN}}`; the prefix `""` becomes `from`."""
    section = tree.value.get("init")
    if not isinstance(section, dict):
        return
    own = [field.alias or name for name, field in Init.model_fields.items()]
    for key in [key for key in section if isinstance(key, str) and not difflib.get_close_matches(key, own, 1, 0.7)]:
        if tree.has(("init", "parts", key)):
            raise UserError(
                f"init.{key} and init.parts.{key} both name a source", where=str(tree.mark(("init", "parts", key))),
                why="one is short for the other", hint=f"init.{key}=RUN overrides the short form",
            )  # fmt: skip
        mark, sources = tree.mark(("init", key)), _dotted(section[key], key)
        tree.remove(("init", key))
        for prefix, source in sources.items():
            long = ("init", "parts", prefix) if prefix else ("init", "from")
            places = {long[:end]: mark for end in (2, 3)}
            tree.merge(Tree({"init": {"parts": {prefix: source}} if prefix else {"from": source}}, places, places))


def _dotted(value, prefix: str) -> dict:
    """{"a.b": RUN} of `a: {b: RUN}`, because an override of `init.a.b` writes a mapping for each dot."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    inner = [_dotted(one, f"{prefix}.{key}" if prefix else key) for key, one in value.items()]
    return {name: source for part in inner for name, source in part.items()}


def _place_paths(tree: Tree, schema: type[BaseModel]) -> None:
    """Make every path absolute: relative to the file it is written in, or in an override to the current folder."""
    for one in paths_in(tree, schema):
        file = tree.mark(one).file
        base = file.parent if file else Path.cwd()
        tree.at(one[:-1])[one[-1]] = str((base / Path(tree.at(one)).expanduser()).absolute())


def _derive(recipe: FoundRecipe, tree: Tree, schema: type[Core], file: Path) -> tuple[list[Derived], list[str]]:
    """Fill the keys that the user left unset. Errors that no derived value can correct are reported first."""
    if not derives(recipe.cls):
        return [], []
    try:
        schema.model_validate_json(json.dumps(tree.value))
    except ValidationError as fault:
        lines = messages.explain(fault, tree, schema, final=False)
        if lines:
            raise _as_user_error(lines, file) from None
    try:
        return fill(recipe.cls, tree, file)
    except UserError as fault:
        raise _placed(fault, tree) from None


def _check(config: Core, tree: Tree) -> None:
    """Check what concerns several keys, and report all mistakes at once."""
    parts = (config.train, config.memory, config.evaluate, config.energy, config.gates)
    faults = [fault for part in parts for fault in part.conflicts(config)]
    try:
        config.recipe_class.check(config)
    except UserError as fault:
        faults.append(fault)
    faults = [_placed(fault, tree) for fault in faults]
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise _as_user_error([str(fault).replace("\n", "\n  ") for fault in faults], config.source)


def _placed(fault: UserError, tree: Tree) -> UserError:
    """The same error with the place of its key instead of the key alone, and of the overrides that its text names."""
    path = tuple(str(fault.where).split("."))
    if not tree.has(path[:1]):
        return fault
    where = messages.place(_mark(tree, path), fault.where)
    if not where.startswith("override "):  # the file alone may be right, and an override against it wrong
        named = [_mark(tree, tuple(key.split("."))) for key in _NAMED.findall(f"{fault.what} {fault.why or ''}")]
        against = dict.fromkeys(str(mark) for mark in named if str(mark).startswith("override "))
        where = f"{', '.join(against)}, with {where}" if against else where
    return UserError(fault.what, where=where, why=fault.why, hint=fault.hint)


def _mark(tree: Tree, path: tuple) -> Mark | None:
    """The place of a path or of the section that encloses it, unless an override wrote another key of that section."""
    mark = tree.mark(path)
    written = path in tree.values or path in tree.keys
    encloses = str(mark) in {f"override {'.'.join(path[:end])}" for end in range(1, len(path))}
    return mark if written or encloses or not str(mark).startswith("override ") else None


def _as_user_error(lines: list[str], file: Path) -> UserError:
    if len(lines) == 1:
        return UserError(lines[0])
    given = " with these overrides" if any(line.startswith("override ") for line in lines) else ""
    return UserError(f"{len(lines)} errors in {show_path(file)}{given}", why="\n  ".join(lines))
