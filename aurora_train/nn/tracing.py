"""What steers how a model is traced, in one context: the platform, the forms of its operations, 8-bit products.

`Rehearsal.here` sets it once for a run. Models, plans and recipes know neither forms nor platforms: a layer asks for
`forms()` as it is traced, and passes the module to its own backward rule.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import jax

from aurora_train.nn import plain
from aurora_train.nn.cpu import forms as cpu

FORMS = {"plain": plain, "cpu": cpu}


class Tracing(NamedTuple):
    """How models are traced in the current context."""

    target: str | None = None  # the platform of a machine that is not here, whose devices cannot be probed
    forms: str = "auto"  # `train.forms`: "auto" is the platform's own; a name of `FORMS` is taken on any platform
    fp8_ends: int | None = None  # units at either end of a stack that stay in bfloat16 in an fp8 step; None: no fp8
    in_8_bits: bool = False  # whether a unit is being traced that multiplies in 8 bits
    decoding: bool = False  # whether texts are continued: few rows read all weights, and nothing is differentiated
    rows: Any = None  # the sharding of what has a row for each example (`by_rows`); None on a single device
    adapters: bool = True  # False: as the frozen base alone, without what low-rank adapters add (`nn.lora`)


# Part of jax's cache key: what was traced in another context is not reused.
_current = jax.make_user_context(Tracing())


def tracing(**changes):
    """In this context, models are traced with these fields of `Tracing` changed."""
    return _current(_current.value._replace(**changes))


def current() -> Tracing:
    """How models are traced here."""
    return _current.value


def by_rows(tree):
    """Arrays whose first axis is the examples, cut by it as the batch is.

    Left to itself, the compiler may cut activations by their width as the weights are, and move them for every product.
    """
    rows = current().rows
    if rows is None:
        return tree
    ways = math.prod(rows.mesh.shape[axis] for axis in rows.spec[0])
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, rows) if a.shape[0] % ways == 0 else a, tree)


def platform() -> str:
    """The platform for which layers are written: "cpu", "gpu" or "tpu"."""
    return _current.value.target or jax.default_backend()


def form_name() -> str:
    """The name of the current forms, "plain" or "cpu"."""
    asked = _current.value.forms
    return asked if asked != "auto" else "cpu" if platform() == "cpu" else "plain"


def forms() -> ModuleType:
    """The module with the current forms: `nn.plain` or `nn.cpu.forms`."""
    return FORMS[form_name()]
