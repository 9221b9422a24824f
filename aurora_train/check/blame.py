"""Turns an error in a user's own recipe into one message that names its line. Bundled recipes keep their traceback."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import traceback
from pathlib import Path

import jax

from aurora_train.config.yaml import show_path
from aurora_train.errors import Stopped, UserError

_HINTS = {
    "TracerBoolConversionError": "a value of the batch cannot choose a branch while the step compiles: use jnp.where",
    "ConcretizationTypeError": "a value of the batch is not known while the step is compiled: use jax.numpy throughout",
    "TracerArrayConversionError": "NumPy cannot take a value that is being compiled: use jax.numpy instead of numpy",
    "TracerIntegerConversionError": "a value of the batch cannot be a Python index while the step is compiled",
}
_OF_THE_MACHINE = (UserError, Stopped, MemoryError, OSError, jax.errors.JaxRuntimeError)
_OF_A_PATH = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)  # of a path in the recipe


@contextlib.contextmanager
def recipe_code(recipe, method: str, given: dict | None = None):
    """In this context, an error of the user's code becomes a UserError at its line. `given`: the batch, for a hint."""
    try:
        yield
    except Exception as error:
        if isinstance(error, _OF_THE_MACHINE) and not isinstance(error, _OF_A_PATH):
            raise
        if recipe.config.recipe_bundled:
            raise
        raise blamed(recipe, method, error, given) from error


def blamed(recipe, method: str, error: Exception, given: dict | None = None) -> UserError:
    """The UserError for an exception from a recipe's `method`: file, line, the line's text, and what to do."""
    files = {str(path.resolve()) for path in recipe.config.recipe_code.values()}
    own = [at for at in traceback.extract_tb(error.__traceback__) if at.filename in files]
    lines = str(error).strip().splitlines() or ["the error has no message"]
    what = f"`{method}` fails: {type(error).__name__}: {lines[0]}"
    if isinstance(error, NotImplementedError) and not own:
        return UserError(f"{type(recipe).__name__} defines no `{method}`", where=place_of(type(recipe)),
                         hint=f"def {method}{_signature(recipe, method)}")  # fmt: skip
    if not own:
        where = place_of(getattr(type(recipe), method, type(recipe)))
        return UserError(what, where=where, hint=f"def {method}{_signature(recipe, method)}")
    last = own[-1]
    hint = _HINTS.get(type(error).__name__)
    if isinstance(error, KeyError) and given is not None:
        hint = f"the batch has: {', '.join(given)}"
    text = linecache.getline(last.filename, last.lineno).strip()
    return UserError(what, where=f"{show_path(Path(last.filename))}:{last.lineno}", why=text or None, hint=hint)


def place_of(thing) -> str:
    """file.py:line of a class, a method or an instance's class."""
    thing = thing if inspect.isclass(thing) or callable(thing) else type(thing)
    try:
        file, (_, line) = inspect.getsourcefile(thing), inspect.getsourcelines(thing)
        return f"{show_path(Path(file))}:{line}"
    except (OSError, TypeError):
        return getattr(thing, "__qualname__", str(thing))


def _signature(recipe, method: str) -> str:
    from aurora_train.recipe import Recipe

    names = list(inspect.signature(getattr(Recipe, method)).parameters)
    return f"({', '.join(names)})"
