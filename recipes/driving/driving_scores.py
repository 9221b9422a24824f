"""Scores of forecasts and of driving: displacement, collisions, the edge of the road, red lights, possible motion.

All are numpy on the host, in float64. Every rate is a share of agents, not of steps. None of them is meaningful alone:
`baselines` has the predictors that stand beside a model, and log replay shows what the data themselves score.
"""

from __future__ import annotations

import numpy as np

from driving.scenes import RED, STEP_S, Scene, boxes

MISS_M = 2.0  # Argoverse 2: a forecast is missed if no end point is this near
ROAD_USERS = ("vehicle", "bus", "motorcyclist")  # which belong on the drivable area and obey its lights
MOST_ACCELERATION = 9.81  # m/s2, what dry tyres give
MOST_CURVATURE = 0.3  # 1/m: the rear axle of a small car turns on a circle with a radius of about 3.5 m
YAW_SLACK = 0.15  # rad/s, the heading's noise at standstill


def displacement(predicted: np.ndarray, truth: np.ndarray, valid: np.ndarray, seconds: float, modes: int) -> dict:
    """Forecasts against what happened, up to a horizon, for each of N agents.

    Args:
        predicted: [N, K, T, 2], the most probable mode first; the first `modes` count.
        truth: [N, T, 2]; valid: bool[N, T], where it was observed.

    Returns float64[N] each, nan where nothing was observed: "ade", the least mean distance of a mode over the observed
    steps; "fde", the least distance at the horizon; "miss", 1 where that is above MISS_M, nan if the end is unobserved.
    """
    steps = round(seconds / STEP_S)
    predicted, truth, valid = predicted[:, :modes, :steps], truth[:, :steps], valid[:, :steps]
    if predicted.shape[2] < steps or truth.shape[1] < steps:
        raise ValueError(f"a horizon of {seconds} s needs {steps} steps")
    distance = np.linalg.norm(predicted.astype(np.float64) - truth[:, None].astype(np.float64), axis=-1)
    count = valid.sum(axis=1)
    total = np.where(valid[:, None], distance, 0).sum(axis=-1)
    ade = np.where(count > 0, total.min(axis=1) / np.maximum(count, 1), np.nan)
    fde = np.where(valid[:, -1], distance[..., -1].min(axis=1), np.nan)
    return {"ade": ade, "fde": fde, "miss": np.where(np.isnan(fde), np.nan, fde > MISS_M)}


def forecast_scores(predicted, truth, valid, horizons_s=(3, 6), modes=(1, 6)) -> dict[str, float]:
    """Means of `displacement` over agents: "minADE1_3s", "minFDE1_3s", "miss1_3s" and so on; modes beyond K are left
    out. nan if no agent was observed."""
    scores = {}
    for number in (k for k in modes if k <= predicted.shape[1]):
        for seconds in horizons_s:
            found = displacement(predicted, truth, valid, seconds, number)
            for name, key in (("minADE", "ade"), ("minFDE", "fde"), ("miss", "miss")):
                scores[f"{name}{number}_{seconds}s"] = mean(found[key])
    return scores


def mean(values: np.ndarray) -> float:
    """The mean of what is not nan; nan of nothing."""
    known = np.asarray(values, np.float64)[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def collisions(states: np.ndarray, sizes: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """bool[A, T]: whether an agent's box overlaps another's. states [A, T, >= 3], sizes [A, 2], valid bool[A, T]."""
    hit = np.zeros(valid.shape, bool)
    states = np.where(valid[..., None], states[..., :3], 0).astype(np.float64)
    reach = np.linalg.norm(sizes, axis=-1) / 2
    first, second = np.triu_indices(len(states), 1)
    # Pairs are few that ever come close: only they are looked at exactly.
    for start in range(0, len(first), 4096):
        a, b = first[start : start + 4096], second[start : start + 4096]
        apart = np.linalg.norm(states[a, :, :2] - states[b, :, :2], axis=-1)
        pair, step = np.nonzero((apart < (reach[a] + reach[b])[:, None]) & valid[a] & valid[b])
        a, b = a[pair], b[pair]
        overlap = boxes_overlap(states[a, step], sizes[a], states[b, step], sizes[b])
        hit[a[overlap], step[overlap]] = hit[b[overlap], step[overlap]] = True
    return hit


def boxes_overlap(one: np.ndarray, one_size: np.ndarray, other: np.ndarray, other_size: np.ndarray) -> np.ndarray:
    """bool[N] of N pairs of boxes, states [N, 3] and sizes [N, 2]: no side of either separates them."""
    corners = np.stack([boxes(one, one_size.astype(np.float64)), boxes(other, other_size.astype(np.float64))])
    overlap = np.ones(len(one), bool)
    for heading in (one[:, 2], other[:, 2], one[:, 2] + np.pi / 2, other[:, 2] + np.pi / 2):
        axis = np.stack([np.cos(heading), np.sin(heading)], axis=-1)
        along = (corners * axis[:, None]).sum(axis=-1)
        low, high = along.min(axis=-1), along.max(axis=-1)
        overlap &= (low[0] < high[1]) & (low[1] < high[0])
    return overlap


def off_road(states: np.ndarray, sizes: np.ndarray, valid: np.ndarray, drivable) -> np.ndarray:
    """bool[A, T]: whether a corner of an agent's box lies in none of the polygons."""
    where = np.nonzero(valid)
    corners = boxes(states[where].astype(np.float64), sizes[where[0]].astype(np.float64)).reshape(-1, 2)
    outside = ~inside_any(corners, drivable).reshape(-1, 4).all(axis=1)
    off = np.zeros(valid.shape, bool)
    off[where] = outside
    return off


def inside_any(points: np.ndarray, polygons) -> np.ndarray:
    """bool[N]: whether each of the points float64[N, 2] lies in one of the polygons (even-odd rule)."""
    inside = np.zeros(len(points), bool)
    for polygon in polygons:
        polygon = np.asarray(polygon, np.float64)
        near = ((points >= polygon.min(axis=0)) & (points <= polygon.max(axis=0))).all(axis=1) & ~inside
        x, y = points[near, 0, None], points[near, 1, None]
        (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
        straddles = (y0 > y) != (y1 > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            crossed = straddles & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        inside[near] = crossed.sum(axis=1) % 2 == 1
    return inside


def ran_red(states: np.ndarray, sizes: np.ndarray, valid: np.ndarray, scene: Scene, lights: np.ndarray) -> np.ndarray:
    """bool[A, T]: whether an agent's front bumper crosses a stop line in its direction while the light is RED.

    `lights` int8[L, T] are the states at the same steps as `states`. The line is as wide as the lane; red must have
    been there a step before, too.
    """
    ran = np.zeros(valid.shape, bool)
    states = states.astype(np.float64)
    heading = np.stack([np.cos(states[..., 2]), np.sin(states[..., 2])], axis=-1)
    front = states[..., :2] + heading * sizes[:, None, :1] / 2
    lanes = {lane.id: lane for lane in scene.lanes}
    for light, (name, stop) in enumerate(zip(scene.light_lanes, scene.light_stops, strict=True)):
        lane = lanes[name]
        nearest = max(int(np.linalg.norm(lane.centre - stop, axis=1).argmin()), 1)
        tangent = (lane.centre[nearest] - lane.centre[nearest - 1]).astype(np.float64)
        tangent /= np.linalg.norm(tangent)
        half = np.linalg.norm(lane.left[-1] - lane.right[-1]) / 2
        ahead = (front - stop) @ tangent
        aside = np.abs((front - stop) @ np.array([-tangent[1], tangent[0]]))
        along = heading @ tangent > 0.5
        crossed = (ahead[:, :-1] <= 0) & (ahead[:, 1:] > 0) & (aside[:, 1:] < half) & along[:, 1:]
        red = (lights[light, :-1] == RED) & (lights[light, 1:] == RED)
        ran[:, 1:] |= crossed & red & valid[:, :-1] & valid[:, 1:]
    return ran


def infeasible(states: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """bool[A, T]: motion that no car makes, from positions and headings [A, T, >= 3] alone.

    A step is impossible if the speed along the heading changes faster than MOST_ACCELERATION, or if the heading turns
    faster than the speed at the sharpest curvature allows. Steps without two valid ones before them are possible.
    """
    states = np.where(valid[..., None], states[..., :3], 0).astype(np.float64)
    moved = np.diff(states[..., :2], axis=1) / STEP_S
    turned = np.diff(states[..., 2], axis=1)
    turned = np.arctan2(np.sin(turned), np.cos(turned))
    middle = states[:, :-1, 2] + turned / 2
    speed = moved[..., 0] * np.cos(middle) + moved[..., 1] * np.sin(middle)
    both = valid[:, 1:] & valid[:, :-1]
    wrong = np.zeros(valid.shape, bool)
    # Half the fastest change of speed within the step: at standstill a car may already be turning.
    fastest = np.linalg.norm(moved, axis=-1) + MOST_ACCELERATION * STEP_S / 2
    wrong[:, 1:] = both & (np.abs(turned) / STEP_S > MOST_CURVATURE * fastest + YAW_SLACK)
    changed = np.abs(np.diff(speed, axis=1)) / STEP_S
    wrong[:, 2:] |= both[:, 1:] & both[:, :-1] & (changed > MOST_ACCELERATION)
    return wrong


def driving_scores(scene: Scene, states, valid, who=None, horizons_s=(3, 6)) -> dict[str, float]:
    """What happens in a rollout of the future of a scene, as shares of its agents, by name and horizon.

    Args:
        states: [A, T, >= 3], T steps after the scene's `observed` ones; valid: bool[A, T].
        who: bool[A], the agents that count (all by default); others are there to be hit.

    Returns "collision_3s", "off_road_3s", "red_light_3s", "infeasible_3s" and so on; nan where nobody counts, or where
    the scene has no map or no lights to go by. Road users alone can leave the road, run a light or turn impossibly.
    """
    counted = np.ones(scene.num_agents, bool) if who is None else who
    counted = counted & valid.any(axis=1)
    drivers = counted & np.isin(scene.kinds, ROAD_USERS) if scene.num_agents else counted
    # The last observed step comes first, so that the first simulated one has something before it.
    last = scene.observed - 1
    before, was = scene.states[:, last : last + 1, : states.shape[-1]], scene.valid[:, last : last + 1]
    states, valid = np.concatenate([before, states], axis=1), np.concatenate([was, valid], axis=1)
    found = {"collision": (collisions(states, scene.sizes, valid), counted)}
    nothing = np.zeros(len(counted), bool)
    off = off_road(states, scene.sizes, valid, scene.drivable)
    found["off_road"] = (off, drivers if scene.drivable else nothing)
    lights = np.zeros((0, valid.shape[1]), np.int8) if scene.lights is None else scene.lights[:, last:]
    ran = ran_red(states, scene.sizes, valid, scene, lights[:, : valid.shape[1]])
    found["red_light"] = (ran, drivers if len(lights) else nothing)
    found["infeasible"] = (infeasible(states, valid), drivers)
    scores = {}
    for seconds in horizons_s:
        for name, (happened, who_counts) in found.items():
            within = happened[:, 1 : 1 + round(seconds / STEP_S)].any(axis=1)
            scores[f"{name}_{seconds}s"] = mean(within[who_counts].astype(float))
    return scores
