"""What the admitted releases of jax name differently: the one place that knows, for everything that reads a jaxpr.

Up to jax 0.10 a `scan` has `num_consts` and `num_carry`; from 0.11 its operands are a tree of three parts (`ft_in`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state, jaxprs_in_params

__all__ = ["get_opaque_trace_state", "is_unreadable", "jaxprs_in_params", "open_jaxpr", "scan_parts"]


def open_jaxpr(jaxpr):
    """The jaxpr with `eqns`, `invars` and `constvars` of one that may be closed; jax 0.11 knows no such difference."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def is_unreadable(error: Exception) -> bool:
    """Whether an error says that a jaxpr holds what its reader does not know.

    What this package raises is meant, and refused memory is for the run to handle.
    """
    ours = type(error).__module__.partition(".")[0] == "aurora_train"
    return not ours and not isinstance(error, MemoryError | jax.errors.JaxRuntimeError)


def scan_parts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a `scan` are the same in every turn, and how many are carried; the others are scanned.

    Args:
        params: of the equation.
    """
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()
    return len(constants), len(carried)
