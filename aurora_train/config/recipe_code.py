"""The code of a recipe: its file, and the modules that it imports from its own folder.

The imports are read from the source before any of it runs, so that a run can keep and hash all of its code. Recipes
are isolated from each other: a run's folder and the folder it came from may both hold a `layers.py`, and each recipe
must import its own.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from aurora_train import bundled
from aurora_train.errors import UserError


def home_of(file: Path) -> Path:
    """The folder whose modules a recipe may import: its own; for a bundled recipe `recipes/`, which holds the kits."""
    return bundled.recipes_folder() if _is_bundled(file) else file.parent


def _is_bundled(file: str | Path) -> bool:
    return Path(file).resolve().is_relative_to(bundled.recipes_folder())


def files_beside(file: Path) -> dict[str, Path]:
    """Every module that a recipe imports from its `home_of`, directly or indirectly: relative name -> path.

    Reads all `import` statements; modules imported by a name computed at run time are not detected. Therefore a package
    beside a user's recipe is taken whole, because its modules may import each other that way. Bundled recipes share
    their kits and compute no names: of a kit, a recipe has only the modules that it imports. The standard library takes
    precedence. UserError for a module that a link places outside of the folder.
    """
    home, modules, seen = home_of(file), {}, set()
    follow, own, inside = _is_bundled(file), file.resolve(), home.resolve()
    waiting = [own if follow else file]
    while waiting:
        path = waiting.pop()
        wanted = [name for name in _imported(path, home) if name not in seen]
        seen.update(wanted)
        for sibling in [one for name in wanted for one in _files(home, name, follow)]:
            name = sibling.relative_to(home).as_posix()
            if name in modules or sibling.resolve() == own:
                continue
            if not sibling.resolve().is_relative_to(inside):
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


def _imported(path: Path, home: Path) -> list[str]:
    """The dotted names that a file imports, as seen from `home`. `from a.b import c` gives `a.b.c`, module or not."""
    return _imports_of(path.read_bytes(), path.parent.relative_to(home).parts)


@functools.lru_cache(maxsize=256)
def _imports_of(source: bytes, package: tuple[str, ...]) -> list[str]:
    """The dotted names that a module of `package` imports. Kept, because parsing is most of the time of a `load`."""
    try:
        waiting: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError):
        return []  # running the file reports the error with its line
    names = []
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = [*above, *filter(None, [node.module])]
            names += [".".join([*base, alias.name]) for alias in node.names]
        # Only statements hold imports. `ast.walk` would visit every expression as well, which takes ten times as long.
        for nested in ("body", "orelse", "finalbody", "handlers", "cases"):
            statements = getattr(node, nested, None)
            waiting += statements if isinstance(statements, list) else ()
    return names


def _files(home: Path, name: str, follow: bool) -> list[Path]:
    """The files of ours behind a dotted name: a module or a whole package; with `follow`, only what its import runs."""
    top = _own(home, name.partition(".")[0])
    if top is None or top.is_file():
        return [top] if top else []
    if not follow:
        return sorted(top.rglob("*.py"))
    files, place = [], home
    for part in name.split("."):
        place = place / part
        files.append(place / "__init__.py" if place.is_dir() else place.with_suffix(".py"))
        if not place.is_dir():
            break  # what follows are names in that module
    return [file for file in files if file.is_file()]


def _own(home: Path, top: str) -> Path | None:
    """The folder of the package, or the file of the module, that `import top` finds at home; None if it finds none."""
    package, module = home / top, home / f"{top}.py"
    if top in sys.stdlib_module_names:
        return None
    if (package / "__init__.py").is_file():
        return package
    if module.is_file():
        return module
    # A folder of data may have a library's name, or hold no code.
    is_package = any(package.rglob("*.py")) and importlib.util.find_spec(top) is None
    return package if is_package else None


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `<recipe's module>.<sibling>` in that recipe's home."""

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
    """Runs a sibling with its recipe's own `import`. A user's runs from source, as hashed, not from cached bytecode."""

    def __init__(self, fullname, path, owned):
        super().__init__(fullname, path)
        self._owned = owned

    def get_code(self, fullname):
        if _is_bundled(self.path):
            return super().get_code(fullname)
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module):
        module.__dict__["__builtins__"] = self._owned
        super().exec_module(module)


_finder = _Finder()


def let_import_beside(module) -> None:
    """Let `import layers` and `from .layers import Block` in a recipe's module load the `layers.py` beside it."""
    name, home = module.__name__, home_of(Path(module.__file__))

    def import_(wanted, globals=None, locals=None, fromlist=(), level=0):
        top = wanted.partition(".")[0]
        if level or _own(home, top) is None:
            return builtins.__import__(wanted, globals, locals, fromlist, level)
        sibling = importlib.__import__(f"{name}.{wanted}", globals, locals, fromlist, 0)
        return sibling if fromlist else sys.modules[f"{name}.{top}"]

    module.__path__, module.__package__ = [str(home)], name
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}
    _finder.builtins[name] = module.__dict__["__builtins__"]
    for loaded in [key for key in sys.modules if key.startswith(f"{name}.")]:
        del sys.modules[loaded]
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
