"""Where demonstrations come from: a LeRobot dataset, or a world whose own expert is recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from aurora_train.errors import UserError, nearest
from robot.chunks import CAMERA
from robot.episodes import Episodes
from robot.settings import VECTORS, WORLD, DataConfig

RECORDED = 100  # demonstrations of a world, unless the config says how many


def read(data: DataConfig, cache: Path, progress: Callable) -> Episodes:
    """The episodes that the section `data` names, from a store below `cache`, made if need be.

    Raises UserError for a dataset with a fault, a feature it lacks, and more episodes than it has.
    """
    if data.source.startswith(WORLD):
        from robot.demonstrations import record

        return record(data.source.removeprefix(WORLD), data.episodes or RECORDED, data.seed, progress, cache=cache,
                      noise=data.noise, cameras=data.cameras, size=data.image)  # fmt: skip
    from robot import lerobot
    from robot.lerobot_meta import read_meta

    folder = Path(data.source).expanduser()
    there = read_meta(folder).features
    features = [*vectors(data, there), *(CAMERA + name for name in data.cameras), data.action]
    for name in features:
        if name not in there:
            key = "data.cameras" if name.startswith(CAMERA) else "data.action"
            raise UserError(f"the dataset has no feature `{name}`", where=key,
                            hint=nearest(name, there, f"it has: {', '.join(there)}"))  # fmt: skip
    return first(lerobot.read(folder, cache, features, progress), data.episodes)


def vectors(data: DataConfig, there: Iterable[str]) -> list[str]:
    """The vector features that the policy sees. UserError if one is missing, or if it would see nothing."""
    there = list(there)
    for name in data.state or ():
        if name not in there:
            raise UserError(f"the episodes have no feature `{name}`", where="data.state",
                            hint=nearest(name, there, f"they have: {', '.join(there)}"))  # fmt: skip
    state = [name for name in VECTORS if name in there] if data.state is None else list(data.state)
    if not state and not data.cameras:
        raise UserError("the policy would see nothing", where="data.state",
                        hint=f"data.state=[...] or data.cameras=[...] of: {', '.join(there)}")  # fmt: skip
    return state


def first(episodes: Episodes, count: int | None) -> Episodes:
    """The first `count` episodes, or all. UserError if there are fewer."""
    if count is None or count == len(episodes):
        return episodes
    if count > len(episodes):
        raise UserError(f"there are {len(episodes)} episodes, fewer than {count}", where="data.episodes",
                        hint=f"data.episodes={len(episodes)} at most, or leave it out for all")  # fmt: skip
    end = int(episodes.starts[count - 1] + episodes.lengths[count - 1])
    return dataclasses.replace(
        episodes, arrays={name: array[:end] for name, array in episodes.arrays.items()}, tasks=episodes.tasks[:count],
        starts=episodes.starts[:count], lengths=episodes.lengths[:count], notes=episodes.notes[:count],
    )  # fmt: skip


def glimpse(data: DataConfig) -> tuple[dict[str, list[int]], str] | None:
    """(the shapes of what the policy sees and does, by feature, and the instruction) of a world, by resetting it once.

    None for a dataset, which has to be read.
    """
    if not data.source.startswith(WORLD):
        return None
    from robot.worlds import world

    on = world(data.source.removeprefix(WORLD), data.cameras, data.image)
    try:
        seen = {name: list(array.shape) for name, array in on.reset(data.seed).items()}
        shapes = {name: seen[name] for name in vectors(data, seen)}
        shapes |= {name: [data.image, data.image, 3] for name in data.cameras}
        return shapes | {"action": list(on.action_low.shape)}, on.task
    finally:
        on.close()
