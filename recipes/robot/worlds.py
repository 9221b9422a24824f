"""Worlds to act in, simulated: what each of them does, and which one a name means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from aurora_train.errors import UserError, nearest
from robot.chunks import CAMERA

METAWORLD = "metaworld:"


class World(Protocol):
    """One robot in one place. It is used again for the next episode: `reset` forgets everything.

    Attributes:
        fps: frames per second; an action is held for one frame.
        max_steps: frames after which an episode counts as failed.
        action_low, action_high: float32[A], the limits that the world enforces.
        names: the names of the entries of each vector, by feature.
        task: the instruction.
        positions: the entries of "observation.state" that are a place in space, two or three.
        cameras: the names that `render` knows; the first is the one for pictures.
        reward: what the world itself gave for the last step.
        version: of what simulates it; with a seed and the actions it decides every observation.
    """

    fps: float
    max_steps: int
    action_low: np.ndarray
    action_high: np.ndarray
    names: dict[str, tuple[str, ...]]
    task: str
    positions: slice
    cameras: tuple[str, ...]
    reward: float
    version: str

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Begin an episode: the first observation, float32 vectors by feature, a function of the seed alone."""

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], bool]:
        """Hold an action float32[A] for one frame: (the observation, whether the task is done at this instant)."""

    def render(self, size: int = 96, camera: str | None = None) -> np.ndarray:
        """A picture of the present state, uint8[size, size, 3]."""

    def expert(self, observation: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """What a demonstrator would do now, float32[A] within the limits."""

    def close(self) -> None:
        """Give back what is held."""


def world(name: str, cameras: Sequence[str] = (), size: int = 64) -> Seen:
    """The world "two_modes" or "metaworld:TASK", with pictures from each of `cameras`.

    Raises UserError for an unknown name or camera, and MissingExtra if the simulator is not installed.
    """
    if name == "two_modes":
        from robot.two_modes import TwoModes

        made = TwoModes()
    elif name.startswith(METAWORLD):
        from robot.metaworld_worlds import MetaWorld

        made = MetaWorld(name.removeprefix(METAWORLD))
    else:
        known = ("two_modes", "metaworld:pick-place-v3", "metaworld:push-v3")
        raise UserError(f"there is no world `{name}`", hint=nearest(name, known, f"for example {', '.join(known)}"))
    for camera in cameras:
        if camera not in made.cameras:
            raise UserError(f"the world `{name}` has no camera `{camera}`", where="data.cameras",
                            hint=f"it has: {', '.join(made.cameras)}")  # fmt: skip
    return Seen(made, cameras, size)


class Seen:
    """A world with cameras, or with none. Everything else is the world's own."""

    def __init__(self, of: World, cameras: Sequence[str], size: int):
        self.of, self._seen_by, self.size = of, tuple(cameras), size

    def __getattr__(self, name: str):
        return getattr(self.of, name)

    def pictures(self) -> dict[str, np.ndarray]:
        """What the cameras see now: "observation.images.CAMERA", uint8[size, size, 3]."""
        return {CAMERA + one: self.of.render(self.size, one) for one in self._seen_by}
