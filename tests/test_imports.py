"""Imports go down: what is read first knows nothing of what is built on it. Read from the source, not from a run."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# From the top down; what stands on one line may use each other. The files of the last line are the base.
ORDER = [
    {"recipes"},
    {"aurora_train", "__main__"},
    {"cli"},
    {"loading"},
    {"watch"},
    {"tools"},
    {"serve", "evals", "gates"},
    {"train"},
    {"boxes"},
    {"lineage"},
    {"always_on", "energy", "score"},
    {"origin"},
    {"check"},
    {"interop"},
    {"run"},
    {"generate"},
    {"plan"},
    {"checkpoint"},
    {"record"},
    {"optimizer"},
    {"nn"},
    {"data"},
    {"mesh"},
    {"machine"},
    {"config"},
    {"sources"},
    {"recipe"},
    {"bundled", "compat", "errors", "facts", "files", "learning_rate", "random", "units"},
]
# (from, to) that others are about to remove, with the reason.
EXCEPTIONS: dict[tuple[str, str], str] = {}


class Import(NamedTuple):
    """`at_once`: done when the importing module is imported, not in a function called later."""

    by: str
    of: str
    at_once: bool


@cache
def modules() -> dict[str, Path]:
    """Every module by its dotted name; a recipe and its kit by where they lie below `recipes`."""
    files = [path for top in ("aurora_train", "recipes") for path in (ROOT / top).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def place(module: str) -> str:
    """The folder, or the file beside the folders, that the order is about."""
    top, _, rest = module.partition(".")
    return top if top == "recipes" or not rest else rest.partition(".")[0]


@cache
def imports() -> list[Import]:
    """Every import of one of our modules by another, those inside functions included."""
    return [one for name, path in modules().items() for one in _imports_of(name, ast.parse(path.read_bytes()))]


def _imports_of(name: str, tree: ast.AST) -> list[Import]:
    found = []

    def walk(node: ast.AST, at_once: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return  # for readers of types, and never done
        if isinstance(node, ast.Import):
            found.extend(Import(name, _ours(alias.name), at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name, which this test does not follow"
            found.extend(Import(name, _ours(f"{node.module}.{alias.name}"), at_once) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child, at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(tree, True)
    return [one for one in found if one.of not in ("", name)]


def _ours(dotted: str) -> str:
    """Our module that a dotted name means: itself, or the one that holds it; "" for a library's."""
    for name in (dotted, f"recipes.{dotted}"):  # a recipe imports its kit by the name beside itself
        while name and name not in modules():
            name = name.rpartition(".")[0]
        if name:
            return name
    return ""


def test_every_place_stands_in_the_order_once():
    places = [name for line in ORDER for name in line]
    assert sorted(places) == sorted(set(map(place, modules())))


def test_imports_go_down_only():
    level = {name: depth for depth, line in enumerate(ORDER) for name in line}
    upwards = {
        (place(one.by), place(one.of)): f"{one.by} imports {one.of}"
        for one in imports() if level[place(one.by)] > level[place(one.of)]
    }  # fmt: skip
    assert {pair: said for pair, said in upwards.items() if pair not in EXCEPTIONS} == {}
    assert EXCEPTIONS.keys() <= upwards.keys(), "an exception that nobody needs any more"


def test_the_core_does_not_know_the_recipes():
    assert [one for one in imports() if place(one.of) == "recipes" != place(one.by)] == []


def test_no_modules_import_each_other_while_they_are_imported():
    needs = {name: {one.of for one in imports() if one.at_once and one.by == name} for name in modules()}
    assert needs["aurora_train.train.loop"] and needs["aurora_train.cli.main"]  # else nothing was read
    while leaves := [name for name, of in needs.items() if not of & needs.keys()]:
        for name in leaves:
            del needs[name]
    assert needs == {}, "these import each other in a circle"


def test_an_import_is_seen_wherever_it_stands():
    text = "from aurora_train import files\ndef f():\n import neural.spikes\n from aurora_train.nn.stack import Stack\n"
    assert _imports_of("x", ast.parse(text)) == [
        Import("x", "aurora_train.files", True), Import("x", "recipes.neural.spikes", False),
        Import("x", "aurora_train.nn.stack", False),
    ]  # fmt: skip


def test_no_two_test_files_have_one_name():
    """pytest cannot collect the second one in a process that has the first."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
