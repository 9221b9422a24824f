"""The code of a recipe: its file, and the modules that it imports from its own folder.

The imports are read from the source before any of it runs, so that a run can keep and hash all of its code. Recipes
are isolated from each other: a run's folder and the folder it came from may both hold a `layers.py`, and each recipe
must import its own.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from aurora_train.errors import UserError


def files_beside(file: Path) -> dict[str, Path]:
    """Every module that a recipe imports from its own folder, directly or indirectly: relative name -> path.

    Reads all `import` statements; modules imported by a name computed at run time are not detected. The standard
    library takes precedence. UserError for a module that a link places outside of the folder.
    """
    folder, modules, waiting = file.parent, {}, [file]
    while waiting:
        path = waiting.pop()
        for top in _imported(path):
            for name, sibling in _module(folder, top).items():
                if sibling.resolve() == file.resolve() or name in modules:
                    continue
                if not sibling.resolve().is_relative_to(folder.resolve()):
                    raise UserError(f"the module {name} lies outside the recipe's folder", where=str(path))
                modules[name] = sibling
                waiting.append(sibling)
    return dict(sorted(modules.items()))


def code_sha256(file: Path, beside: dict[str, Path]) -> str:
    """sha256 hex of a recipe's file, or of it and the modules beside it if there are any."""
    own = hashlib.sha256(file.read_bytes())
    if not beside:
        return own.hexdigest()
    lines = [f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in beside.items()]
    return hashlib.sha256("\n".join([own.hexdigest(), *lines]).encode()).hexdigest()


def _imported(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []  # running the file reports the error with its line
    tops = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            tops += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            tops += [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]
    return tops


def _module(folder: Path, top: str) -> dict[str, Path]:
    """The files of the module or package `top` in a folder; {} if it has none of that name."""
    if top in sys.stdlib_module_names:
        return {}
    if (folder / top / "__init__.py").is_file():
        return {path.relative_to(folder).as_posix(): path for path in sorted((folder / top).rglob("*.py"))}
    if (folder / f"{top}.py").is_file():
        return {f"{top}.py": folder / f"{top}.py"}
    modules = sorted((folder / top).rglob("*.py")) if (folder / top).is_dir() else []
    if not modules or importlib.util.find_spec(top) is not None:  # a data folder may share a library's name
        return {}
    return {path.relative_to(folder).as_posix(): path for path in modules}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `<recipe's module>.<sibling>` in that recipe's folder."""

    def __init__(self):
        self.builtins: dict[str, dict] = {}  # by the name of a recipe's module

    def find_spec(self, fullname, path, target=None):
        owned = self.builtins.get(fullname.partition(".")[0])
        if owned is None or path is None:
            return None
        base = Path(list(path)[0]) / fullname.rpartition(".")[2]
        package = (base / "__init__.py").is_file()
        file = base / "__init__.py" if package else base.with_suffix(".py")
        if not file.is_file() and base.is_dir():  # a package without an __init__.py
            spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(base)]
            return spec
        if not file.is_file():
            return None
        places = {"submodule_search_locations": [str(base)]} if package else {}
        loader = _Loader(fullname, str(file), owned)
        return importlib.util.spec_from_file_location(fullname, file, loader=loader, **places)


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a sibling with its recipe's own `import`, from source and never from cached bytecode."""

    def __init__(self, fullname, path, owned):
        super().__init__(fullname, path)
        self._owned = owned

    def get_code(self, fullname):
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module):
        module.__dict__["__builtins__"] = self._owned
        super().exec_module(module)


_finder = _Finder()


def let_import_beside(module, folder: Path) -> None:
    """Let `import layers` and `from .layers import Block` in a recipe's module load the `layers.py` beside it."""
    name = module.__name__

    def import_(wanted, globals=None, locals=None, fromlist=(), level=0):
        top = wanted.partition(".")[0]
        if level or not _module(folder, top):
            return builtins.__import__(wanted, globals, locals, fromlist, level)
        sibling = importlib.__import__(f"{name}.{wanted}", globals, locals, fromlist, 0)
        return sibling if fromlist else sys.modules[f"{name}.{top}"]

    module.__path__, module.__package__ = [str(folder)], name
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}
    _finder.builtins[name] = module.__dict__["__builtins__"]
    for loaded in [key for key in sys.modules if key.startswith(f"{name}.")]:
        del sys.modules[loaded]
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
