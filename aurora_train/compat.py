"""The differences between supported releases of jax, in one place, for everything that reads a jaxpr.

Up to jax 0.10 a `scan` has `num_consts` and `num_carry`; from 0.11 its operands are a tree of three parts (`ft_in`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

__all__ = ["is_unreadable", "jaxprs_in_params", "open_jaxpr", "scan_parts"]


def open_jaxpr(jaxpr):
    """The jaxpr itself (`eqns`, `invars`, `constvars`) if it is closed; jax 0.11 no longer makes that distinction."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def is_unreadable(error: Exception) -> bool:
    """Whether an error means that a jaxpr contains something its reader does not know.

    Errors raised by this package are intentional, and the run handles those for lack of memory.
    """
    ours = type(error).__module__.partition(".")[0] == "aurora_train"
    return not ours and not isinstance(error, MemoryError | jax.errors.JaxRuntimeError)


def scan_parts(params: Mapping[str, Any]) -> tuple[int, int]:
    """(number of constant operands, number of carried operands) of a `scan`; the others are scanned over.

    Args:
        params: the parameters of the equation.
    """
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()
    return len(constants), len(carried)
