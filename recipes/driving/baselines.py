"""What stands beside a model: constant velocity, constant turn rate, a car-following driver, and the log itself.

Each moves chosen agents for some steps after the history and takes the others from the log, so one function serves
forecasts (all agents move) and the ego in closed loop (one does).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from driving.car_following import FIRM_BRAKING, idm_acceleration
from driving.driving_scores import ROAD_USERS
from driving.roads import SPACING_M, headings, resample, speeds, unit
from driving.scenes import RED, STEP_S, YELLOW, Scene

NAMES = ("constant velocity", "CTRV", "IDM", "log replay")
TURN_STEPS = 5  # over which the turn rate is measured
LOOK_AHEAD_M = 160.0
LEADER_POINTS = 80  # a metre apart: how far a leader is looked for
USUAL_SPEED = 13.9  # m/s where a map has no limits, as Argoverse 2's
# A driver in the middle of the ranges of the generator.
DRIVER = {"headway_s": 1.4, "acceleration": 1.6, "braking": 2.0, "standing_gap": 2.2}


def rollout(name: str, scene: Scene, steps: int = 60, who=None, lights=None) -> tuple[np.ndarray, np.ndarray]:
    """(states float64[A, steps, 3] of x, y, heading, valid bool[A, steps]) of the steps after the history.

    Args:
        name: one of NAMES.
        who: bool[A], the agents that the baseline moves, of those seen at the end of the history. The others are as in
            the log. By default it is a forecast: all that were seen then move, and nobody knows of who comes later.
        lights: int8[L, steps] for IDM. By default they stay as they were last seen, as a forecaster has to assume.
    """
    seen, is_forecast = scene.valid[:, scene.observed - 1], who is None
    who = seen if is_forecast else seen & who
    states, valid = _log(scene, steps)
    if name == "log replay":
        return states, valid
    if is_forecast:
        states[~seen], valid[~seen] = np.nan, False
    if not who.any():
        return states, valid
    valid[who] = True
    now = scene.states[who, scene.observed - 1].astype(np.float64)
    if name == "constant velocity":
        states[who] = _straight(now, steps)
    elif name == "CTRV":
        states[who] = _turning(now, _turn_rates(scene)[who], steps)
    elif name == "IDM":
        states[who] = _straight(now, steps)
        drivers = np.flatnonzero(who & np.isin(scene.kinds, ROAD_USERS))
        if lights is None and scene.lights is not None:
            lights = np.repeat(scene.lights[:, scene.observed - 1 : scene.observed], steps, axis=1)
        _drive(scene, drivers, states, valid, lights)
    else:
        raise ValueError(f"{name!r} is none of {NAMES}")
    return states, valid


def _log(scene: Scene, steps: int) -> tuple[np.ndarray, np.ndarray]:
    states = np.full((scene.num_agents, steps, 3), np.nan)
    known = scene.states[:, scene.observed : scene.observed + steps, :3]
    states[:, : known.shape[1]] = known
    return states, np.isfinite(states[..., 0])


def _straight(now: np.ndarray, steps: int) -> np.ndarray:
    """[N, steps, 3] from [N, 5] with the velocity kept."""
    time = STEP_S * np.arange(1, steps + 1)[:, None]
    xy = now[:, None, :2] + now[:, None, 3:5] * time
    return np.concatenate([xy, np.repeat(now[:, None, 2:3], steps, axis=1)], axis=-1)


def _turn_rates(scene: Scene) -> np.ndarray:
    """rad/s over the last TURN_STEPS of the history; 0 where an agent was not seen at both ends."""
    last = scene.observed - 1
    first = max(last - TURN_STEPS, 0)
    turned = scene.states[:, last, 2].astype(np.float64) - scene.states[:, first, 2]
    turned = np.arctan2(np.sin(turned), np.cos(turned))
    return np.nan_to_num(turned / (STEP_S * max(last - first, 1)))


def _turning(now: np.ndarray, rate: np.ndarray, steps: int) -> np.ndarray:
    """[N, steps, 3] at constant speed and turn rate (Schubert, Richter & Wanielik 2008, eq. 7 without acceleration)."""
    time = STEP_S * np.arange(1, steps + 1)
    angle = rate[:, None] * time
    # The chord of an arc: sin(a/2)/(a/2) of its length, in the direction of half the turn. sinc is exact at 0.
    chord = time * np.sinc(angle / (2 * np.pi))
    travel = np.arctan2(now[:, 4], now[:, 3])[:, None] + angle / 2
    speed = np.hypot(now[:, 3], now[:, 4])[:, None]
    moved = (speed * chord)[..., None] * np.stack([np.cos(travel), np.sin(travel)], axis=-1)
    heading = now[:, None, 2] + angle
    return np.concatenate([now[:, None, :2] + moved, heading[..., None]], axis=-1)


@dataclass
class _Driver:
    """One agent on its way: the path ahead, each SPACING_M, and how far along it is."""

    agent: int
    path: np.ndarray  # float64[M, 4] of x, y, heading, speed allowed
    aside: float  # metres left of the path at the beginning; none after 20 m
    stops: list[tuple[float, int]]  # (metres along the path, light)
    speed: float
    along: float = 0.0

    def state(self) -> np.ndarray:
        place = min(self.along / SPACING_M, len(self.path) - 1.001)
        index, rest = int(place), place % 1
        x, y, heading, _ = self.path[index] + rest * (self.path[index + 1] - self.path[index])
        aside = self.aside * max(0.0, 1 - self.along / 20)
        return np.array([x - aside * np.sin(heading), y + aside * np.cos(heading), heading])


def _drive(scene: Scene, drivers, states: np.ndarray, valid: np.ndarray, lights) -> None:
    """Fill in the drivers' `states`: they follow lanes, keep their distance to all others and stop at lights."""
    routes = _Routes(scene)
    moving = [routes.driver(int(agent)) for agent in drivers]
    before = scene.states[:, scene.observed - 1, :3].astype(np.float64)
    velocity = np.nan_to_num(scene.states[:, scene.observed - 1, 3:5].astype(np.float64))
    for step in range(states.shape[1]):
        here = before[:, :2]
        for driver in moving:
            acceleration = _pedal(driver, scene.sizes, here, velocity, None if lights is None else lights[:, step])
            speed = max(driver.speed + acceleration * STEP_S, 0.0)
            driver.along += (driver.speed + speed) / 2 * STEP_S
            driver.speed = speed
            states[driver.agent, step] = driver.state()
        now = np.where(valid[:, step, None], states[:, step], np.nan)
        velocity = np.nan_to_num((now[:, :2] - before[:, :2]) / STEP_S)
        before = now


def _pedal(driver: _Driver, sizes: np.ndarray, here: np.ndarray, velocity: np.ndarray, lights) -> float:
    """m/s2: the least of what the nearest agent on the path and each light ahead ask for."""
    first = int(driver.along / SPACING_M)
    ahead = driver.path[first : first + LEADER_POINTS * 2 : 2]
    desired = float(ahead[0, 3]) if len(ahead) else 0.1
    gap, closing = np.inf, 0.0
    if len(ahead):
        near = np.hypot(*(here - ahead[0, :2]).T) < LEADER_POINTS + 2  # absent agents are nan, and not near
        near[driver.agent] = False
        others = np.flatnonzero(near)
        apart = np.hypot(ahead[:, 0] - here[others, 0, None], ahead[:, 1] - here[others, 1, None])
        place = apart.argmin(axis=1)
        # A path begins at the driver's centre: whoever is nearest to its beginning is beside or behind.
        blocks = (apart.min(axis=1) < (sizes[others, 1] + sizes[driver.agent, 1]) / 2 + 0.2) & (place > 0)
        if blocks.any():
            gaps = place * 2 * SPACING_M - (sizes[others, 0] + sizes[driver.agent, 0]) / 2
            leader = int(np.where(blocks, gaps, np.inf).argmin())
            direction = ahead[place[leader], 2]
            gap = float(gaps[leader])
            closing = driver.speed - float(velocity[others[leader]] @ [np.cos(direction), np.sin(direction)])
    wanted = float(idm_acceleration(driver.speed, desired, gap, closing, **DRIVER))
    for stop, light in driver.stops if lights is not None else []:
        left = stop - driver.along - sizes[driver.agent, 0] / 2
        can_stop = driver.speed**2 / (2 * max(left, 0.1)) < FIRM_BRAKING
        if left > -1 and (lights[light] == RED or (lights[light] == YELLOW and can_stop)):
            wanted = min(wanted, float(idm_acceleration(driver.speed, desired, left, driver.speed, **DRIVER)))
    return wanted


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over 4.5 m, ends kept: at the corners of lanes of few points no car could turn as fast."""
    return np.convolve(np.pad(values, 4, mode="reflect", reflect_type="odd"), np.full(9, 1 / 9), "valid")


class _Routes:
    """The lanes of a scene as ways ahead."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.lanes = {lane.id: lane for lane in scene.lanes if len(lane.centre) > 1}
        self.light = {lane: number for number, lane in enumerate(scene.light_lanes)}

    def driver(self, agent: int) -> _Driver:
        scene = self.scene
        x, y, heading, vx, vy = scene.states[agent, scene.observed - 1].astype(np.float64)
        here, direction = np.array([x, y]), np.array([np.cos(heading), np.sin(heading)])
        speed = max(float(direction @ [vx, vy]), 0.0)
        line, limits, stops, aside = self._way(here, direction, max(speed, USUAL_SPEED))
        xy, _ = resample(line, SPACING_M)
        along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
        limit = np.interp(np.arange(len(xy)) * SPACING_M, along, limits)
        turn = _smooth(headings(xy))
        return _Driver(agent, np.column_stack([xy, turn, speeds(turn, limit)]), aside, stops, speed)

    def _way(self, here: np.ndarray, direction: np.ndarray, usual: float):
        """(line float64[P, 2] from beside `here` on, speed limit of each point, stops, metres left of it)."""
        lane, place = self._lane_at(here, direction)
        if lane is None:
            line = here + direction * np.linspace(0, LOOK_AHEAD_M, 20)[:, None]
            return line, np.full(len(line), usual), [], 0.0
        points, limits, stops, length, seen = [], [], [], 0.0, set()
        part = lane.centre[place:].astype(np.float64)
        while True:
            points.append(part)
            limits.append(np.full(len(part), usual if np.isnan(lane.speed_limit) else lane.speed_limit))
            length = float(np.linalg.norm(np.diff(np.concatenate(points), axis=0), axis=1).sum())
            if lane.id in self.light:
                stops.append((length, self.light[lane.id]))
            seen.add(lane.id)
            following = [self.lanes[name] for name in lane.successors if name in self.lanes and name not in seen]
            if length > LOOK_AHEAD_M or not following:
                break
            end = unit(lane.centre[-1] - lane.centre[-2])
            lane = max(following, key=lambda one: float(end @ unit(one.centre[-1] - one.centre[0])))
            part = lane.centre[1:].astype(np.float64)
        line, limit = np.concatenate(points), np.concatenate(limits)
        # Where the map ends, the road goes on.
        line = np.concatenate([line, line[-1:] + LOOK_AHEAD_M * unit(line[-1:] - line[-2:-1])])
        tangent = unit(line[1] - line[0])
        back = float((here - line[0]) @ tangent)
        line[0] += back * tangent  # the foot of the agent on the lane
        aside = float((here - line[0]) @ [-tangent[1], tangent[0]])
        return line, np.append(limit, limit[-1]), [(stop - back, light) for stop, light in stops], aside

    def _lane_at(self, here: np.ndarray, direction: np.ndarray):
        """(lane, index of its last point that is not ahead), the nearest within 3 m that leads the same way."""
        best, found = 3.0, (None, 0)
        for lane in self.lanes.values():
            centre = lane.centre.astype(np.float64)
            step = np.diff(centre, axis=0)
            share = ((here - centre[:-1]) * step).sum(axis=1) / np.maximum((step**2).sum(axis=1), 1e-9)
            foot = centre[:-1] + np.clip(share, 0, 1)[:, None] * step
            apart = np.linalg.norm(foot - here, axis=1)
            place = int(apart.argmin())
            if apart[place] < best and unit(step[place]) @ direction > 0.7:
                best, found = apart[place], (lane, place)
        return found
