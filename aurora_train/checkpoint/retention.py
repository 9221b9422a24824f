"""Which checkpoints are kept, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable


def reasons(
    steps: list[int], scores: dict[int, float], *, keep: int, keep_every: int | None, best: int, lower_is_better: bool
) -> dict[int, str]:
    """Step -> why it is kept: the newest `keep`, every `keep_every`-th, the `best` by score. `steps` must ascend."""
    why: dict[int, list[str]] = {}
    scored = [step for step in steps if math.isfinite(scores.get(step, math.nan))]
    ranked = sorted(scored, key=lambda step: scores[step], reverse=not lower_is_better)
    for step in steps[-keep:]:
        why.setdefault(step, []).append("newest" if step == steps[-1] else "rolling")
    for step in steps:
        if keep_every and step % keep_every == 0:
            why.setdefault(step, []).append(f"every {keep_every}")
    for step in ranked[:best]:
        why.setdefault(step, []).append("best")
    return {step: ", ".join(why[step]) for step in sorted(why)}


def is_among_best(score: float, earlier: Iterable[float], best: int, *, lower_is_better: bool = True) -> bool:
    """Whether a score is one of the `best` so far; among equal scores the earlier one is better."""
    sign = 1 if lower_is_better else -1
    return math.isfinite(score) and sum(sign * other <= sign * score for other in earlier) < best
