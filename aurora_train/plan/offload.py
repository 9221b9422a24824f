"""Decides whether, and which, kept tensors may wait in the processor's memory.

Offloading frees memory only if the device has its own. A moved tensor crosses the link to the processor twice; the
planner assumes that nothing runs meanwhile, which is an upper bound on the cost.
"""

from __future__ import annotations

from aurora_train.errors import UserError
from aurora_train.nn.saving import UNIT_INPUT, can_offload
from aurora_train.plan.residuals import Score, UnitGraph, frontier, offloaded
from aurora_train.units import size


def tags_of(stack) -> tuple[str, ...]:
    """The names of a Stack's tensors that can be offloaded."""
    return (UNIT_INPUT, *(tag for tag in stack.tags if can_offload(tag)))


def named(config, stacks, *, apart: bool) -> tuple[str, ...]:
    """The tags that `memory.offload` names, () for none and for auto; UserError if they cannot be offloaded.

    Args:
        stacks: all Stacks of the model, which may be abstract.
        apart: whether the device has its own memory.
    """
    wish = config.memory.offload
    if isinstance(wish, str) or not wish:  # none, auto
        return ()
    where = "memory.offload"
    if not apart:
        raise UserError(
            "processor and accelerator share their memory here, so moving a tensor frees nothing", where=where,
            hint="memory.offload=none; memory.save=auto frees memory by recomputing tensors instead of keeping them",
        )  # fmt: skip
    known = dict.fromkeys(tag for stack in stacks for tag in tags_of(stack))
    for tag in wish:
        if tag not in known:
            raise UserError(
                f"the model has no tensor {tag!r} that can be offloaded", where=where,
                hint=f"those that can: {', '.join(known) or 'none'}",
            )  # fmt: skip
    return tuple(dict.fromkeys(wish))


def refuse_idle(tags: tuple[str, ...], graphs) -> None:
    """UserError if one of the `tags` keeps nothing in any of the UnitGraphs: moving it would free nothing."""
    for tag in tags:
        save = () if tag == UNIT_INPUT else (tag,)
        if not any(graph.kept_by_name(save).get(tag) for graph in graphs):
            raise UserError(
                f"the backward pass reads nothing under {tag!r}, so offloading it frees nothing",
                where="memory.offload", hint=f"leave {tag} out",
            )  # fmt: skip


def refuse_overflow(needed: int, free: int | None) -> None:
    """UserError if offloaded tensors do not fit in the processor's memory; both figures are bytes for one device."""
    if free is not None and needed > free:
        raise UserError(
            f"the processor's memory has no room: offloaded tensors need {size(needed)} of {size(free)} per device",
            where="memory.offload", hint="memory.offload=auto takes no more than is free; memory.offload=none",
        )  # fmt: skip


def with_offload(graph: UnitGraph, scores: list[Score], wish, tags: tuple[str, ...], apart: bool) -> list[Score]:
    """The scores of a search where tensors may (`wish` "auto") or must (`tags`) be offloaded.

    With auto, save-sets that are not on the frontier of bytes and FLOPs are left alone: moving part of one cannot beat
    moving the same part of another that is smaller and faster.
    """
    if wish == "auto" and apart:
        return [*scores, *(moved for score in frontier(scores) for moved in graph.offloads(score) if moved.offload)]
    if not tags:
        return scores
    forced = [score_of(graph, score.save, tags) for score in scores]
    return list({score.used: score for score in forced}.values())


def score_of(graph: UnitGraph, save: tuple[str, ...] | None, tags: tuple[str, ...]) -> Score:
    """The score of a segment that keeps `save` and `tags`, the latter in the processor's memory."""
    if save is None:
        return graph.score(None)
    whole = graph.score((*save, *(tag for tag in tags if tag != UNIT_INPUT)))
    return offloaded(whole, tags, graph.kept_by_name(whole.save))
