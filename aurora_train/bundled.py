"""The recipes and configs that come with the package: inside the wheel, or beside it in a checkout."""

from __future__ import annotations

import ast
from pathlib import Path

from aurora_train.errors import UserError


def _home() -> Path:
    package = Path(__file__).resolve().parent
    inside = package / "_bundled"
    return inside if inside.is_dir() else package.parent


def recipes_folder() -> Path:
    """The folder of all bundled recipes and of the kits that they import."""
    return _home() / "recipes"


def recipes() -> dict[str, Path]:
    """`name` or `domain/name` -> file of every bundled recipe; the other files beside them are the kits they import."""
    folder = recipes_folder()
    files = [path for path in sorted(folder.rglob("*.py")) if _is_recipe(path)]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def _is_recipe(path: Path) -> bool:
    """Whether a class in a file declares the config sections that it owns, as the class of a recipe must."""
    return "\n    Config = " in path.read_text(encoding="utf-8")


def configs() -> dict[str, Path]:
    """`domain/name` -> file of every bundled config."""
    folder = _home() / "configs"
    return {str(path.relative_to(folder).with_suffix("").as_posix()): path for path in sorted(folder.rglob("*.yaml"))}


def config_file(name: str) -> Path | None:
    """The bundled config called `domain/name`, or `name` if only one domain has it; None if there is none."""
    known = configs()
    if name in known:
        return known[name]
    same = [full for full in known if full.rpartition("/")[2] == name]
    if len(same) > 1:
        raise UserError(f"`{name}` names {len(same)} bundled configs", hint="use the full name: " + ", ".join(same))
    return known[same[0]] if same else None


def is_bundled(path: Path) -> bool:
    """Whether a file belongs to the bundled recipes or configs."""
    return any(path.resolve().is_relative_to(_home() / folder) for folder in ("recipes", "configs"))


def first_line(path: Path) -> str:
    """The first line of a file's docstring or opening comment that is not a command."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    else:
        lines = [line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#")]
    return next((line for line in lines if line and not line.startswith("aurora ")), "")
