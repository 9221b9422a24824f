"""Tracks as a simulator makes them, step by step, and the agent of a scene that is scored alone."""

from __future__ import annotations

import numpy as np

from driving.scenes import HISTORY, STEPS


class Tracks:
    """The agents of one scene of STEPS steps."""

    def __init__(self):
        self.states: dict[str, np.ndarray] = {}
        self.kinds: dict[str, str] = {}
        self.sizes: dict[str, tuple[float, float]] = {}

    def add(self, step: int, name: str, state: np.ndarray, kind: str, size: tuple[float, float]) -> None:
        """One agent at one step: x, y, heading, vx, vy as in `Scene.states`, length and width in metres."""
        if name not in self.states:
            self.states[name] = np.full((STEPS, 5), np.nan, np.float32)
            self.kinds[name], self.sizes[name] = kind, size
        self.states[name][step] = state

    def fields(self, rng: np.random.Generator) -> dict:
        """The fields of a `Scene` that tracks decide. `rng` draws the focal agent."""
        names = list(self.states)
        states = np.stack([self.states[name] for name in names]) if names else np.zeros((0, STEPS, 5), np.float32)
        kinds = tuple(self.kinds[name] for name in names)
        sizes = np.array([self.sizes[name] for name in names], np.float32).reshape(-1, 2)
        return {"track_ids": tuple(names), "kinds": kinds, "states": states, "sizes": sizes, "observed": HISTORY,
                "focal": choose_focal(states, kinds, rng)}  # fmt: skip


def choose_focal(states: np.ndarray, kinds, rng: np.random.Generator) -> int:
    """A vehicle seen throughout, and, as in Argoverse 2, one that goes somewhere if there is any; -1 without agents."""
    if not len(kinds):
        return -1
    seen = np.isfinite(states[..., 0])
    whole = np.array([kind != "pedestrian" for kind in kinds]) & seen.all(axis=1)
    moved = whole & (np.linalg.norm(states[:, -1, :2] - states[:, HISTORY, :2], axis=-1) > 5)
    for candidates in (moved, whole, seen[:, HISTORY - 1]):
        if candidates.any():
            return int(rng.choice(np.flatnonzero(candidates)))
    return int(seen.sum(axis=1).argmax())
