"""Handles unset keys: `null` unsets a key, and a recipe derives some keys from others (`model.size` is such a dial).

The upper layer wins: a dial on the command line replaces the keys that it decides in the file, and a dial in a file
replaces those of the file it extends. A key written in the dial's own layer, or above it, wins over the dial. Each
case is reported.
"""

from __future__ import annotations

import copy
import typing
from pathlib import Path

from pydantic import BaseModel

from aurora_train.config.fields import written
from aurora_train.config.yaml import Mark, Tree, write_flow
from aurora_train.recipe import Derived, Recipe


def unset_nulls(tree: Tree, schema: type[BaseModel], *, overrides_only: bool = False) -> None:
    """Remove every key that is `null` although its default is not, or it may not be: it counts as unset.

    `overrides_only`: only keys of the command line, because the file is the complete record of a run.
    """
    for path, field in written(tree, schema):
        if tree.at(path) is None and path not in tree.empty:
            kept = overrides_only and tree.mark(path).line is not None
            if not kept and (field.default is None or not _admits_null(field.annotation)):
                tree.remove(path)


def _admits_null(annotation) -> bool:
    return annotation is type(None) or any(map(_admits_null, typing.get_args(annotation)))


def derives(recipe: type[Recipe]) -> bool:
    """Whether a recipe derives anything."""
    return recipe.derive.__func__ is not Recipe.derive.__func__


def fill(recipe: type[Recipe], tree: Tree, file: Path) -> tuple[list[Derived], list[str]]:
    """Put derived values into the tree where a key is unset. Returns them, and one line for each conflict between a
    dial and a written key, whichever of them won. `file` is the config's own file, above the one it extends."""
    overruled = [line for dial in recipe.dials for line in _settle(recipe, tree, tuple(dial.split(".")), file)]
    kept = []
    for one in recipe.derive(copy.deepcopy(tree.value)):
        path = tuple(one.key.split("."))
        if tree.has(path):
            continue
        value = one.value
        for step in reversed(path):
            value = {step: value}
        tree.merge(Tree(value, {}, {path: Mark(f"derived ({one.formula})")}))
        kept.append(one)
    return kept, overruled


def _settle(recipe: type[Recipe], tree: Tree, dial: tuple, file: Path) -> list[str]:
    """Remove keys of the dial's own section that the dial decides and that were written in a lower layer."""
    section = dial[:-1]
    if not tree.has(dial) or tree.at(dial) is None:
        return []
    alone = copy.deepcopy(tree)
    alone.at(section[:-1])[section[-1]] = {dial[-1]: tree.at(dial)}
    decided = {tuple(one.key.split(".")): one.value for one in recipe.derive(alone.value)}
    size, layer = tree.at(dial), _layer(tree.mark(dial), file)
    replaced, lines = [], []
    for path, value in decided.items():
        if path[: len(section)] != section or not tree.has(path):
            continue
        old, mark, key = tree.at(path), tree.mark(path), ".".join(path)
        if _layer(mark, file) < layer:
            tree.remove(path)
            replaced += [f"{key} = {write_flow(old)} ({mark})"] if old != value else []
        elif old != value:
            at = f"at {mark}" if mark.line is not None else "on the command line"
            lines.append(f"{key} = {write_flow(old)} {at} overrules {dial[-1]} {size}, which has {write_flow(value)}")
    return ([f"{dial[-1]} {size} replaces {', '.join(replaced)}"] if replaced else []) + lines


def _layer(mark: Mark, file: Path) -> int:
    """2 for the command line, 1 for the config's own file, 0 for the one it extends."""
    return 2 if mark.line is None else int(mark.file == file)


def derived_lines(derived: list[Derived]) -> list[str]:
    """`key = value, ...: formula (source)`; neighbours with the same formula and source share a line."""
    groups: list[list[Derived]] = []
    for one in derived:
        if groups and (groups[-1][0].formula, groups[-1][0].source) == (one.formula, one.source):
            groups[-1].append(one)
        else:
            groups.append([one])
    return [
        ", ".join(f"{one.key} = {write_flow(one.value)}" for one in group) + f": {group[0].formula} ({group[0].source})"
        for group in groups
    ]
