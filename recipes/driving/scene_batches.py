"""Scenes as arrays of fixed shape, the `Source` that a model trains on: agents, pieces of lanes, lights.

Agents are sorted: the focal one first, then by their distance to it at the last step of the history. Coordinates are
relative to where the focal agent is then, but not turned. What is beyond the fixed numbers is left out, the farthest
first, and what is absent has `valid` False and zeros.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

from driving.roads import resample
from driving.scene_store import SceneStore
from driving.scenes import HISTORY, KINDS, LANE_KINDS, STEPS, Lane, Scene

PIECE_M, PIECE_POINTS = 20.0, 11  # a lane is cut into pieces of at most this length, each with so many points


class SceneBatches:
    """A `Source` over the scenes of one split.

    `take` returns, for B scenes, A agents, T = 110 steps, L pieces of lanes and G lights:
        states float32[B, A, T, 5] as in `Scene`, valid bool[B, A, T], sizes float32[B, A, 2], kinds int8[B, A] (index
        into KINDS), agents int32[B, A] (index into the scene's agents, -1 where there is none);
        pieces float32[B, L, 11, 2], pieces_valid bool[B, L], pieces_kind int8[B, L] (index into LANE_KINDS),
        pieces_about float32[B, L, 2] (speed limit in m/s or 0, whether in a junction), pieces_light int8[B, L] (which
        of the G lights governs it at its end, -1 for none);
        lights int8[B, G, T], lights_valid bool[B, G], stops float32[B, G, 3] (x, y, heading of the lane);
        origin float64[B, 2], what was subtracted from the scene's coordinates.
    """

    def __init__(self, store: SceneStore, split: str, agents=32, pieces=96, lights=8, piece_m: float = PIECE_M):
        self.store, self.split, self.shape, self.piece_m = store, split, (agents, pieces, lights), piece_m
        decisive = f"scenes 1 {store.fingerprint} {split} {self.shape} {piece_m:g}"
        self.fingerprint = hashlib.sha256(decisive.encode()).hexdigest()

    def __len__(self) -> int:
        return self.store.count(self.split)

    def scene(self, index: int) -> Scene:
        return self.store.scene(self.split, int(index))

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = [self._row(int(index)) for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def describe(self) -> dict:
        known = self.store.describe()
        about = {name: known[name] for name in ("source", "licence") if name in known}
        return about | {"scenes": len(self), "agents": known["agents"][self.split], "maps": known["maps"]}

    @cached_property
    def _pieces(self) -> dict[int, dict]:
        return {}

    def _row(self, index: int) -> dict[str, np.ndarray]:
        scene, number = self.scene(index), self.store.map_number(self.split, index)
        if number not in self._pieces:
            self._pieces[number] = cut_lanes(scene.lanes, self.piece_m)
        return as_arrays(scene, self._pieces[number], *self.shape)


def cut_lanes(lanes: tuple[Lane, ...], piece_m: float = PIECE_M) -> dict[str, np.ndarray]:
    """The pieces of a map's lanes: points float32[N, 11, 2], kind int8[N], about float32[N, 2], lane int[N] (which lane
    a piece ends, -1 if it ends within one), middle float32[N, 2]."""
    points, kind, about, ends = [], [], [], []
    for number, lane in enumerate(lanes):
        line, length = resample(lane.centre.astype(float), 0.5)
        line = np.concatenate([line, lane.centre[-1:]])
        count = max(int(np.ceil(length / piece_m)), 1)
        places = np.linspace(0, len(line) - 1, count * (PIECE_POINTS - 1) + 1).round().astype(int)
        for piece in range(count):
            first = piece * (PIECE_POINTS - 1)
            points.append(line[places[first : first + PIECE_POINTS]])
            kind.append(LANE_KINDS.index(lane.kind))
            about.append((np.nan_to_num(lane.speed_limit), lane.is_intersection))
            ends.append(number if piece == count - 1 else -1)
    points = np.array(points, np.float32).reshape(-1, PIECE_POINTS, 2)
    return {
        "points": points, "middle": points[:, PIECE_POINTS // 2], "kind": np.array(kind, np.int8),
        "about": np.array(about, np.float32).reshape(-1, 2), "lane": np.array(ends, int),
    }  # fmt: skip


def as_arrays(scene: Scene, pieces: dict, agents: int, most_pieces: int, most_lights: int) -> dict[str, np.ndarray]:
    """One scene as `SceneBatches.take` returns it, without the leading axis. `pieces` are `cut_lanes(scene.lanes)`."""
    centre = _centre(scene)
    order = _nearest_agents(scene, centre, agents)
    states, valid = _aligned(scene.states[order], scene.observed), _aligned(scene.valid[order], scene.observed)
    states = np.where(valid[..., None], states - np.array([*centre, 0, 0, 0], np.float32), 0)
    kinds = np.array([KINDS.index(scene.kinds[k]) for k in order], np.int8)
    near = np.argsort(np.linalg.norm(pieces["middle"] - centre, axis=1), kind="stable")[:most_pieces]
    lights, stops, light_of_lane = _lights(scene, centre, most_lights)
    governed = np.array([light_of_lane.get(int(lane), -1) for lane in pieces["lane"][near]], np.int8)
    return {
        "states": _filled(states.astype(np.float32), agents), "valid": _filled(valid, agents),
        "sizes": _filled(scene.sizes[order].astype(np.float32), agents), "kinds": _filled(kinds, agents),
        "agents": _filled(order.astype(np.int32), agents, -1),
        "pieces": _filled(pieces["points"][near] - centre.astype(np.float32), most_pieces),
        "pieces_valid": _filled(np.ones(len(near), bool), most_pieces),
        "pieces_kind": _filled(pieces["kind"][near], most_pieces),
        "pieces_about": _filled(pieces["about"][near], most_pieces),
        "pieces_light": _filled(governed, most_pieces, -1),
        "lights": _filled(lights, most_lights), "lights_valid": _filled(np.ones(len(lights), bool), most_lights),
        "stops": _filled(stops, most_lights), "origin": centre.astype(np.float64),
    }  # fmt: skip


def _filled(array: np.ndarray, length: int, value=0) -> np.ndarray:
    """`array` with its first axis extended to `length`."""
    return np.concatenate([array, np.full((length - len(array), *array.shape[1:]), value, array.dtype)])


def _aligned(array: np.ndarray, observed: int) -> np.ndarray:
    """[A, T, ...] with the history's last step at HISTORY - 1 and STEPS steps; absent steps are zero or False."""
    result = np.zeros((array.shape[0], STEPS, *array.shape[2:]), array.dtype)
    shift = HISTORY - observed
    first, last = max(shift, 0), min(shift + array.shape[1], STEPS)
    result[:, first:last] = array[:, first - shift : last - shift]
    return result


def _centre(scene: Scene) -> np.ndarray:
    """float32[2]: where the focal agent was last seen in the history; else, where anything of the scene is."""
    if scene.focal >= 0:
        seen = np.flatnonzero(scene.valid[scene.focal, : scene.observed])
        if len(seen):
            return scene.states[scene.focal, seen[-1], :2]
    if scene.valid.any():
        return scene.states[scene.valid][0, :2]
    return scene.lanes[0].centre[0] if scene.lanes else np.zeros(2, np.float32)


def _nearest_agents(scene: Scene, centre: np.ndarray, most: int) -> np.ndarray:
    """int[<= most]: the focal agent, then those seen at the end of the history by distance, then the other ones."""
    if scene.num_agents == 0:
        return np.zeros(0, int)
    now = scene.valid[:, scene.observed - 1]
    distance = np.linalg.norm(scene.states[:, scene.observed - 1, :2] - centre, axis=1)
    rank = np.where(now, distance, 1e9 - scene.valid[:, : scene.observed].sum(axis=1))
    if scene.focal >= 0:
        rank[scene.focal] = -1
    return np.argsort(rank, kind="stable")[:most]


def _lights(scene: Scene, centre: np.ndarray, most: int):
    """(states int8[G, T], stops float32[G, 3], number of the light of each governed lane), the nearest lights."""
    if scene.lights is None or len(scene.lights) == 0:
        return np.zeros((0, STEPS), np.int8), np.zeros((0, 3), np.float32), {}
    near = np.argsort(np.linalg.norm(scene.light_stops - centre, axis=1), kind="stable")[:most]
    place = {lane.id: number for number, lane in enumerate(scene.lanes)}
    governed = [place[scene.light_lanes[light]] for light in near]
    ends = np.stack([scene.lanes[lane].centre[-2:] for lane in governed])
    heading = np.arctan2(*(ends[:, 1] - ends[:, 0]).T[::-1])
    stops = np.column_stack([scene.light_stops[near] - centre, heading]).astype(np.float32)
    states = _aligned(scene.lights[near], scene.observed)
    return states, stops, {lane: number for number, lane in enumerate(governed)}
