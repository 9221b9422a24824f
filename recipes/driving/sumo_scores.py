"""A model that drives among SUMO's cars, beside baselines and SUMO itself, in the same situations."""

from __future__ import annotations

import functools

import numpy as np

from driving import baselines
from driving.generated import FIRST_MAP
from driving.moves import Moves, blind
from driving.scene_batches import as_arrays, cut_lanes
from driving.scenes import Scene
from driving.sumo_driving import PLANNED, drive, reactive_scores

TITLE = "Among SUMO's cars, which react: the share of situations in which the ego car does this, and how far it comes"
AT_ONCE = 8  # simulations, each a process


def reactive(predict, source: Moves, config, key, progress) -> dict[str, dict]:
    """Rates of the ego car's mishaps on `config.sumo_maps` maps of SUMO, by who drives it. `config`: `rollout`."""
    model = _Planner(predict, source, config, key)
    drivers = {"SUMO": None, "constant velocity": functools.partial(_baseline, "constant velocity"),
               "IDM": functools.partial(_baseline, "IDM"), "the model": model}  # fmt: skip
    maps = [FIRST_MAP["test"] + number for number in range(config.sumo_maps)]
    rates = {}
    for name, policy in drivers.items():
        scenes: list[Scene] = []
        for start in range(0, len(maps), AT_ONCE):
            model.start = start
            scenes += drive(policy, maps[start : start + AT_ONCE], 0, progress)
        rates[name] = reactive_scores(scenes)
    return rates


def _baseline(name: str, scenes: list[Scene]) -> np.ndarray:
    return np.stack([baselines.rollout(name, scene, PLANNED)[0][scene.focal] for scene in scenes])


class _Planner:
    """A policy: the ego follows the model's tokens as a car, while the model expects the others to follow theirs."""

    def __init__(self, predict, source: Moves, config, key):
        self.predict, self.source, self.config, self.key = predict, source, config, key
        self.turn, self.start, self.pieces = 0, 0, {}

    def __call__(self, scenes: list[Scene]) -> np.ndarray:
        import jax

        from driving.rollouts import in_batches

        rows = [as_arrays(scene, self._pieces_of(scene), *self.source.shape) for scene in scenes]
        batch = blind({name: np.stack([row[name] for row in rows]) for name in self.source.names})
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(self.key, self.start), self.turn), len(scenes))
        cast = {"replayed": np.zeros(batch["valid"].shape[:2], bool), "steered": np.ones(len(scenes), bool)}
        found = in_batches(self.predict, batch | cast | {"key": keys}, self.config.batch, _quiet, "planning")
        self.turn += 1
        origins = np.stack([[*row["origin"], 0] for row in rows])
        return found["states"][:, 0, :PLANNED, :3] + origins[:, None]

    def _pieces_of(self, scene: Scene) -> dict:
        if scene.map_id not in self.pieces:
            self.pieces[scene.map_id] = cut_lanes(scene.lanes, self.source.piece_m)
        return self.pieces[scene.map_id]


def _quiet(*_) -> None:
    pass
