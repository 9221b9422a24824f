"""A policy drives one car among SUMO's, which react to it: closed loop in a simulator that is not the training's own.

Each world is a process, since SUMO has one simulation in a process. After 5 s of SUMO's driving a car becomes the ego.
A policy sees the last 5 s of the scene and plans; the ego follows the plan for half a second, and so on for 6 s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from driving.driving_scores import driving_scores, mean
from driving.scenes import HISTORY, STEPS, Scene
from driving.sumo_process import SumoProcess, unpacked

PLANNED = 5  # steps of a plan that are driven before the next one
Policy = Callable[[list[Scene]], np.ndarray]  # scenes of 50 steps -> float[N, >= PLANNED, 3]: x, y, heading of each ego


class SumoWorld:
    """One simulation and its ego car. Use it in a `with`, which ends its process."""

    def __init__(self, map_seed: int, seed: int):
        self._process = SumoProcess()
        try:
            self._process.ask("open", map_seed, seed)
        except BaseException:
            self._process.close()
            raise

    def __enter__(self) -> SumoWorld:
        return self

    def __exit__(self, *_) -> None:
        self._process.close()

    def observe(self) -> Scene:
        """The last HISTORY steps up to now; `focal` is the ego."""
        return unpacked(self._process.ask("observe"))

    def advance(self, poses: np.ndarray | None) -> None:
        """Move the ego to each of the poses [n, 3] in turn, 0.1 s apart; with None SUMO drives it for PLANNED steps."""
        self._process.ask("advance", [None] * PLANNED if poses is None else list(poses))

    def recorded(self) -> Scene:
        """The scene from the beginning until now."""
        return unpacked(self._process.ask("recorded"))


def drive(policy: Policy | None, map_seeds: list[int], seed: int, progress) -> list[Scene]:
    """One scene of 11 s on each map; from its sixth second on the policy drives the ego, or SUMO does if it is None."""
    turns = (STEPS - HISTORY) // PLANNED
    with ExitStack() as stack:
        worlds = [stack.enter_context(SumoWorld(number, seed)) for number in map_seeds]
        for turn in range(turns):
            progress(turn, turns, "driving among SUMO's cars")
            plans = [None] * len(worlds) if policy is None else policy([world.observe() for world in worlds])
            for world, plan in zip(worlds, plans, strict=True):
                world.advance(None if plan is None else np.asarray(plan, np.float64)[:PLANNED])
        return [world.recorded() for world in worlds]


def reactive_scores(scenes: list[Scene]) -> dict[str, float]:
    """Shares of scenes with each mishap of the ego, as `driving_scores` names them, and how far it came in 6 s.

    SUMO's own driver leaves the world where its route ends: until then it is scored, and its way counted.
    """
    found = []
    for scene in scenes:
        ego = np.arange(scene.num_agents) == scene.focal
        scores = driving_scores(scene, scene.states[:, HISTORY:, :3], scene.valid[:, HISTORY:], ego)
        way = np.linalg.norm(np.diff(scene.states[scene.focal, HISTORY - 1 :, :2], axis=0), axis=1)
        found.append(scores | {"metres_6s": float(np.nansum(way))})
    return {name: mean(np.array([scores[name] for scores in found])) for name in found[0]}
