"""A traffic scene: what every reader and generator of driving data makes, and all that models and scores see of one.

The words are those of Argoverse 2 (Wilson et al. 2021, "Argoverse 2: Next Generation Datasets"). Positions are centres
of boxes in metres, headings are radians counterclockwise from the x axis, and a step is 0.1 s. Maps are immutable and
shared: the scenes of one map hold the same `lanes` and `drivable`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

STEP_S = 0.1
HISTORY, STEPS = 50, 110  # of a whole scene in Argoverse 2: 5 s of history, 6 s of future
# Argoverse 2's object types, in a fixed order: the index is what models see.
KINDS = (
    "vehicle", "pedestrian", "motorcyclist", "cyclist", "bus", "static", "background", "construction",
    "riderless_bicycle", "unknown",
)  # fmt: skip
LANE_KINDS = ("VEHICLE", "BIKE", "BUS")
# States of a traffic light, the values of `Scene.lights`.
UNKNOWN, GREEN, YELLOW, RED = range(4)
# Length and width in metres where the data have none: Argoverse 2's forecasting files hold no sizes.
DEFAULT_SIZES = {
    "vehicle": (4.6, 1.9), "pedestrian": (0.7, 0.7), "motorcyclist": (2.2, 0.9), "cyclist": (1.9, 0.7),
    "bus": (11.5, 2.9), "static": (1.0, 1.0), "background": (1.0, 1.0), "construction": (1.0, 1.0),
    "riderless_bicycle": (1.9, 0.7), "unknown": (1.0, 1.0),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Lane:
    """One segment of a lane.

    Attributes:
        id: unique in its map.
        centre, left, right: float32[P, 2] polylines in the direction of travel; P may differ between them.
        kind: one of LANE_KINDS.
        successors: ids of the lanes that continue it; they may be missing from a map that was cut out of a larger one.
        speed_limit: m/s, nan where the source has none.
    """

    id: str
    centre: np.ndarray
    left: np.ndarray
    right: np.ndarray
    kind: str = "VEHICLE"
    successors: tuple[str, ...] = ()
    speed_limit: float = float("nan")
    is_intersection: bool = False


def _no_stops() -> np.ndarray:
    return np.zeros((0, 2), np.float32)


@dataclass(frozen=True, eq=False)
class Scene:
    """A agents over T steps of 0.1 s, the first `observed` of which are the history.

    Attributes:
        identifier: unique in its data; map_id: scenes with the same value share roads, so splits hold whole maps out.
        track_ids, kinds: A strings each; kinds are words of KINDS.
        states: float32[A, T, 5] of x, y (m), heading (rad), vx, vy (m/s); nan where the agent was not observed.
        sizes: float32[A, 2] of length, width (m).
        focal: index of the agent that is scored alone; -1 in a scene without agents.
        observed: number of steps that a predictor may see (50 in Argoverse 2), at most T.
        lanes, drivable: the map, polygons are float32[P, 2]; both are empty where there is no map.
        lights: int8[L, T] of UNKNOWN, GREEN, YELLOW, RED, or None if lights are not known. Light k governs the lane
            `light_lanes[k]`, before whose stop point `light_stops[k]`, float32[L, 2], cars wait while it is RED.
        origin: float64 world coordinates of (0, 0). Coordinates of a city lose millimetres in float32.
        crossings: pedestrian crossings, float32[4, 2]: the ends of one edge, across the road, then those of the other
            edge backwards.
        city: the source's name of the town.
    """

    identifier: str
    map_id: str
    track_ids: tuple[str, ...]
    kinds: tuple[str, ...]
    states: np.ndarray
    sizes: np.ndarray
    focal: int
    observed: int
    lanes: tuple[Lane, ...] = ()
    drivable: tuple[np.ndarray, ...] = ()
    lights: np.ndarray | None = None
    light_lanes: tuple[str, ...] = ()
    light_stops: np.ndarray = field(default_factory=_no_stops)
    origin: tuple[float, float] = (0.0, 0.0)
    crossings: tuple[np.ndarray, ...] = ()
    city: str = ""

    @property
    def valid(self) -> np.ndarray:
        """bool[A, T]: where an agent was observed."""
        return np.isfinite(self.states[..., 0])

    @property
    def num_agents(self) -> int:
        return len(self.track_ids)

    @property
    def steps(self) -> int:
        return self.states.shape[1]


def boxes(states: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Corners [..., 4, 2] of the boxes with states [..., 5] (or [..., 3]) and sizes [..., 2], counterclockwise."""
    half = sizes[..., None, :] / 2 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], states.dtype)
    cos, sin = np.cos(states[..., None, 2]), np.sin(states[..., None, 2])
    turned = np.stack([half[..., 0] * cos - half[..., 1] * sin, half[..., 0] * sin + half[..., 1] * cos], axis=-1)
    return states[..., None, :2] + turned
