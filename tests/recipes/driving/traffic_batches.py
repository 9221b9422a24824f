"""Batches of generated traffic for the tests of the model that drives; made once in a process."""

import functools

import numpy as np

from driving.car_following import generate
from driving.moves import shapes
from driving.scene_batches import as_arrays, cut_lanes

AGENTS, PIECES, LIGHTS = 6, 20, 8


@functools.cache
def scenes():
    """Two scenes each of two maps, of which the first has lights."""
    return [scene for seed in (5, 1) for scene in generate(seed, 2)]


def batch(chosen=None, agents: int = AGENTS, pieces: int = PIECES) -> dict[str, np.ndarray]:
    """The arrays that a model sees of the chosen scenes, all of them by default."""
    rows = [as_arrays(s, cut_lanes(s.lanes, 120.0), agents, pieces, LIGHTS) for s in chosen or scenes()]
    return {name: np.stack([row[name] for row in rows]) for name in shapes(agents, pieces, LIGHTS)}
