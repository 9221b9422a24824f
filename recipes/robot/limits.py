"""What a policy must keep to before anyone runs, exports or serves it: the section `limits` of a config.

The numbers are those of the score (`robot.robot_scores`); a server has the latency of its own answers as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import field_validator

from aurora_train.config import Section, setting
from aurora_train.errors import UserError

if TYPE_CHECKING:
    import numpy as np


class Limits(Section):
    """Nothing is limited unless a number is given."""

    success_min: float | None = setting(None, resume="free", ge=0, le=1, help="smallest share of successful episodes")
    action_error_max: float | None = setting(None, resume="free", gt=0, help="largest error of held-out actions")
    action_bound: float | list[float] | None = setting(
        None, resume="free", help="largest size of an action's entries: a number for all, or a list with one for each"
    )
    jerk_max: float | None = setting(None, resume="free", gt=0, help="largest mean jerk in simulation")
    latency_p99_ms: float | None = setting(
        None, resume="free", gt=0, help="milliseconds within which 99 % of all answers are there"
    )

    @field_validator("action_bound")
    @classmethod
    def _above_zero(cls, value):
        bounds = value if isinstance(value, list) else [] if value is None else [value]
        if not all(0 < one < float("inf") for one in bounds):
            raise ValueError("a bound is a finite number above 0")
        return value


# limit -> (number of the score, whether the limit is its largest value)
_OF = {
    "success_min": ("success", False), "action_error_max": ("action_error", True), "jerk_max": ("jerk", True),
    "latency_p99_ms": ("latency_ms_p99", True), "action_bound": ("action_of_bound", True),
}  # fmt: skip


# limit -> whether its number comes from acting in a world, and not from held-out actions
_FROM_ACTING = {"success_min": True, "jerk_max": True, "action_error_max": False}


def refuse_unmeasured(limits: Limits, has_world: bool) -> None:
    """UserError for a limit whose number the score will never have, so that it would count as exceeded at the end."""
    for key, is_from_acting in _FROM_ACTING.items():
        if getattr(limits, key) is not None and is_from_acting != has_world:
            raise UserError(
                "the policy is scored by acting in a world, and not by held-out actions" if has_world else
                "this is measured by acting in a world, and there is none", where=f"limits.{key}",
                hint="limits.success_min" if has_world else "score.world=NAME, or limits.action_error_max",
            )  # fmt: skip


def exceeded(limits: Limits, scores: dict[str, float]) -> list[str]:
    """A line for each limit that these numbers exceed. A number that is missing, or is none, exceeds its limit."""
    lines = []
    for key, (name, is_largest) in _OF.items():
        limit, value = getattr(limits, key), scores.get(name)
        if limit is None:
            continue
        bound = 1.0 if key == "action_bound" else limit  # that score is relative to the bound
        if value is None:
            lines.append(f"limits.{key} is {limit}, and the score has no `{name}`")
        elif not (value <= bound if is_largest else value >= bound):
            than = "more" if is_largest else "less"
            lines.append(f"{name} is {value:.4g}, {than} than limits.{key} ({limit}) allows")
    return lines


def bound_of(limits: Limits, size: int) -> np.ndarray | None:
    """float32[size], the largest size of each entry of an action; None if it is not limited. UserError for a list of
    another length."""
    import numpy as np

    if limits.action_bound is None:
        return None
    bound = np.float32(limits.action_bound)
    if bound.ndim and len(bound) != size:
        raise UserError(f"{len(bound)} bounds, and an action has {size} entries", where="limits.action_bound",
                        hint="one number for all, or one for each")  # fmt: skip
    return np.broadcast_to(bound, (size,))


def of_bound(actions: np.ndarray, limits: Limits) -> dict[str, float]:
    """{"action_of_bound": the largest entry of actions float[..., A] relative to its bound}; {} without a bound."""
    import numpy as np

    bound = bound_of(limits, actions.shape[-1])
    return {} if bound is None else {"action_of_bound": float((np.abs(actions) / bound).max(initial=0.0))}
