"""Turns the `recipe:` line of a config into a Recipe class: a bundled name, or a file beside the config.

A user's recipe is code, and a config is text that may come from anyone. Therefore the file must be in the config's own
folder, and its path and sha256 are printed before it runs.
"""

from __future__ import annotations

import ast
import sys
import traceback
import types
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path

from pydantic import BaseModel

from aurora_train import bundled
from aurora_train.config.recipe_code import code_sha256, files_beside, let_import_beside
from aurora_train.config.yaml import read_text, show_path
from aurora_train.errors import UserError, nearest
from aurora_train.recipe import Recipe


@dataclass(frozen=True)
class FoundRecipe:
    """A recipe's class, its file, and the hash of its code. `beside`: the modules it imports from its own folder."""

    cls: type[Recipe]
    file: Path
    sha256: str
    bundled: bool
    beside: dict[str, Path] = field(default_factory=dict)


def find_recipe(written: str, folder: Path, where: str | None = None) -> FoundRecipe:
    """The recipe that a config in `folder` calls `written`; `where` is the place of that line, for errors."""
    if not written.endswith(".py"):
        return load_recipe(bundled_recipe(written, folder, where), bundled_one=True)
    file = folder / written
    if Path(written).is_absolute() or not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"recipe `{written}` lies outside the config's folder", where=where,
            why="a config may only name code that came with it", hint="copy the recipe beside the config",
        )
    if not file.exists():
        hint = nearest(written, (path.name for path in sorted(folder.glob("*.py"))), form="recipe: {}")
        raise UserError(f"no recipe file {show_path(file)}", where=where, hint=hint)
    return load_recipe(file, bundled_one=bundled.is_bundled(file))


def bundled_recipe(written: str, folder: Path = Path(), where: str | None = None) -> Path:
    """The file of a bundled recipe. The error for an unknown one suggests a user's own file in `folder`."""
    known = bundled.recipes()
    if written in known:
        return known[written]
    if (folder / f"{written}.py").is_file():
        hint = f"did you mean your own file, `recipe: {written}.py`?"
    else:
        hint = nearest(written, known, f"bundled: {', '.join(known)}; your own file ends in .py")
    raise UserError(f"unknown recipe `{written}`", where=where, hint=hint)


def load_recipe(file: Path, bundled_one: bool) -> FoundRecipe:
    """Import one recipe file by path. The same bytes give the same class, so configs loaded twice compare equal."""
    text = read_text(file, "recipe")
    beside = files_beside(file)
    sha256, shown = code_sha256(file, beside), show_path(file)
    name = f"aurora_recipe_{file.stem}" if bundled_one else f"aurora_recipe_{file.stem}_{sha256[:12]}"
    module = sys.modules.get(name)
    if module is None or module.__file__ != str(file.resolve()):
        if not bundled_one:
            print(f"recipe {' + '.join([shown, *beside])} sha256 {sha256}", file=sys.stderr)
        module = _run(text, file, name, bundled_one)
    return FoundRecipe(_recipe_class(module, text, shown), file, sha256, bundled_one, beside)


def _run(text: str, file: Path, name: str, trusted: bool) -> types.ModuleType:
    shown = show_path(file)
    try:
        if trusted:
            code = SourceFileLoader(name, str(file.resolve())).get_code(name)
        else:
            code = compile(text, str(file.resolve()), "exec", dont_inherit=True)
    except SyntaxError as fault:
        raise UserError(
            f"syntax error: {fault.msg}", where=f"{shown}:{fault.lineno or 1}:{fault.offset or 1}",
            why=(fault.text or "").strip() or None,
        ) from None
    except ValueError as fault:
        raise UserError(f"not Python source: {fault}", where=shown) from None
    module = types.ModuleType(name)
    module.__file__ = str(file.resolve())
    sys.modules[name] = module  # dataclasses and pickle look the module up by name while and after it runs
    let_import_beside(module)
    try:
        exec(code, module.__dict__)
    except UserError:
        del sys.modules[name]
        raise
    except Exception as fault:
        del sys.modules[name]
        if trusted:
            raise
        lines = [at.lineno for at in traceback.extract_tb(fault.__traceback__) if at.filename == module.__file__]
        raise UserError(
            f"the recipe fails on import: {type(fault).__name__}: {fault}", where=f"{shown}:{lines[-1] if lines else 1}"
        ) from fault
    return module


def _recipe_class(module: types.ModuleType, text: str, shown: str) -> type[Recipe]:
    own = [
        value for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == module.__name__
    ]
    lines = {node.name: node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)}
    if not own:
        raise UserError(
            "the file defines no subclass of Recipe", where=f"{shown}:1",
            hint="class MyRecipe(aurora_train.recipe.Recipe): ...",
        )
    if len(own) > 1:
        names = " and ".join(f"{cls.__name__} (line {lines.get(cls.__name__, '?')})" for cls in own)
        raise UserError(
            f"the file defines {len(own)} recipes: {names}", where=f"{shown}:{lines.get(own[1].__name__, 1)}",
            why="a recipe file holds exactly one", hint="move the other one to its own file",
        )
    owned = getattr(own[0], "Config", None)
    if not (isinstance(owned, type) and issubclass(owned, BaseModel)):
        raise UserError(
            f"{own[0].__name__} has no `Config`", where=f"{shown}:{lines.get(own[0].__name__, 1)}",
            hint="declare the config sections that this recipe owns: class Config(aurora_train.config.Section)",
        )
    return own[0]
