"""Traffic on `roads` by the Intelligent Driver Model, as scenes: data for tests and machines without a simulator.

Cars follow routes through a junction, keep their distance, slow down for bends and stop at lights; no car enters a
junction that another arm's cars have not left, so recordings are free of collisions. Everything follows from two seeds,
of the map and of the traffic. Model: Treiber, Hennecke & Helbing 2000, Phys. Rev. E 62, 1805, eqs. 2 and 3, with the
gentler return to the desired speed of Treiber & Kesting 2013, "Traffic Flow Dynamics", eq. 11.19.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from driving.roads import SPACING_M, YELLOW_S, Roads, build_roads
from driving.scenes import GREEN, RED, STEP_S, STEPS, YELLOW, Scene
from driving.tracks import Tracks

FORMAT = 1  # raised whenever a seed means other traffic
WARM_UP_STEPS = 250  # until the roads have filled
FIRM_BRAKING = 3.0  # m/s2; who would need more to stop for a yellow light goes on
HARDEST_BRAKING = 8.0

CAR = np.dtype([
    ("number", int), ("route", int), ("along", float), ("speed", float), ("length", float), ("width", float),
    ("eagerness", float), ("headway_s", float), ("acceleration", float), ("braking", float), ("gap", float),
    ("sway", float), ("phase", float), ("restless", float), ("committed", bool), ("bus", bool),
])  # fmt: skip


def idm_acceleration(speed, desired, gap, closing, headway_s, acceleration, braking, standing_gap):
    """m/s2 of a driver with the given `speed` and `gap` (m, inf without a leader) to a leader approached by `closing`.

    All are arrays that broadcast. The result is at least -HARDEST_BRAKING.
    """
    ratio = speed / np.maximum(desired, 0.1)
    back = -braking * (1 - np.maximum(ratio, 1.0) ** -(4 * acceleration / braking))
    free = np.where(ratio <= 1, acceleration * (1 - np.minimum(ratio, 1.0) ** 4), back)
    wanted = standing_gap + np.maximum(0.0, speed * headway_s + speed * closing / (2 * np.sqrt(acceleration * braking)))
    return np.maximum(free - acceleration * (wanted / np.maximum(gap, 0.1)) ** 2, -HARDEST_BRAKING)


@dataclass
class Traffic:
    """The cars on a map. `step` moves them by 0.1 s; `cars` is a record array with dtype CAR, `number` never reused."""

    roads: Roads
    rng: np.random.Generator
    cars: np.ndarray = field(default_factory=lambda: np.empty(0, CAR))
    clock: int = 0
    arrived: int = 0
    lights: np.ndarray = field(default_factory=lambda: np.empty(0, np.int8))

    def __post_init__(self):
        roads = self.roads
        self.rate_hz = self.rng.uniform(0.04, 0.12)  # of arrivals at each lane
        self.paths = np.stack([_padded(route.path, max(len(r.path) for r in roads.routes)) for route in roads.routes])
        self.arms = np.array([route.arm for route in roads.routes])
        self.starts = np.stack([route.starts for route in roads.routes])
        self.parts = np.array([route.parts for route in roads.routes])
        self.ends = np.array([route.end for route in roads.routes])
        self.offsets, self.until = _overlaps(roads)
        self.lights = roads.arm_lights(0.0)

    @cached_property
    def _entries(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.parts[:, 0] == lane) for lane in np.unique(self.parts[:, 0])]

    def step(self) -> None:
        self._arrive()
        lights = self.roads.arm_lights(self.clock * STEP_S)
        cars = self.cars
        acceleration = self._accelerations(cars, lights)
        speed = np.maximum(cars["speed"] + acceleration * STEP_S, 0.0)
        cars["along"] += (cars["speed"] + speed) / 2 * STEP_S
        cars["speed"] = speed
        self.cars = cars[cars["along"] < self.ends[cars["route"]] - cars["length"] / 2]
        self.lights = lights
        self.clock += 1

    def _arrive(self) -> None:
        for routes in self._entries:
            route = int(self.rng.choice(routes))
            if self.rng.random() > self.rate_hz * STEP_S:
                continue
            ahead = self.cars[self.parts[self.cars["route"], 0] == self.parts[route, 0]]
            nearest = ahead[np.argmin(ahead["along"])] if len(ahead) else None
            car = self._car(route, None if nearest is None else float(nearest["speed"]))
            if nearest is None or nearest["along"] - nearest["length"] / 2 > 14 + 1.2 * car["speed"][0]:
                self.cars = np.concatenate([self.cars, car])
                self.arrived += 1

    def _car(self, route: int, speed_ahead: float | None) -> np.ndarray:
        rng, car = self.rng, np.zeros(1, CAR)
        bus = rng.random() < 0.05
        car["number"], car["route"], car["bus"] = self.arrived, route, bus
        car["length"], car["width"] = (rng.uniform(9, 12), 2.5) if bus else (rng.uniform(3.9, 5.2), rng.uniform(1.7, 2))
        car["along"] = car["length"] / 2 + 0.5
        car["eagerness"] = rng.normal(0.95, 0.1)
        car["headway_s"], car["gap"] = rng.uniform(0.9, 1.9), rng.uniform(1.5, 3.0)
        car["acceleration"], car["braking"] = rng.uniform(1.0, 2.2) * (0.6 if bus else 1), rng.uniform(1.5, 2.5)
        car["sway"], car["phase"] = rng.normal(0, 0.1), rng.uniform(0, 2 * np.pi)
        desired = self.paths[route, 0, 3] * car["eagerness"][0]
        car["speed"] = desired if speed_ahead is None else min(desired, speed_ahead)
        return car

    def _accelerations(self, cars: np.ndarray, lights: np.ndarray) -> np.ndarray:
        desired = self.at(cars)[:, 3] * cars["eagerness"]
        driver = [cars[name] for name in ("headway_s", "acceleration", "braking", "gap")]
        gap, closing = self._leaders(cars)
        following = idm_acceleration(cars["speed"], desired, gap, closing, *driver)
        stop = self._stop_gaps(cars, lights)
        stopping = idm_acceleration(cars["speed"], desired, stop, cars["speed"], *driver)
        # Drivers are not machines: a slow random walk of the pedal, which leaves standing cars alone.
        cars["restless"] = 0.97 * cars["restless"] + self.rng.normal(0, 0.08, len(cars))
        moving = cars["speed"] > 1
        return np.maximum(np.minimum(following, stopping) + moving * cars["restless"], -HARDEST_BRAKING)

    def part(self, cars: np.ndarray) -> np.ndarray:
        """0 on the approach, 1 in the junction, 2 on the exit, by the car's centre."""
        return (cars["along"][:, None] >= self.starts[cars["route"]]).sum(axis=1) - 1

    def _leaders(self, cars: np.ndarray):
        """(gap in metres, inf without one; speed difference) to the next car on each car's own route."""
        if len(cars) == 0:
            return np.empty(0), np.empty(0)
        part = self.part(cars)
        lane = self.parts[cars["route"], part]
        local = cars["along"] - self.starts[cars["route"], part]
        ahead = self.offsets[cars["route"]][:, lane] + local - cars["along"][:, None]
        shared = local - cars["length"] / 2 < self.until[cars["route"]][:, lane]
        ahead = np.where(shared & (ahead > 1e-6), ahead, np.inf)
        leader = ahead.argmin(axis=1)
        gap = ahead.min(axis=1) - (cars["length"] + cars["length"][leader]) / 2
        return gap, cars["speed"] - cars["speed"][leader]

    def _stop_gaps(self, cars: np.ndarray, lights: np.ndarray) -> np.ndarray:
        """Metres from each front bumper to the line where it has to stop, inf where it may go on."""
        if not self.roads.has_lights or len(cars) == 0:
            return np.full(len(cars), np.inf)
        arm, part = self.arms[cars["route"]], self.part(cars)
        left = self.starts[cars["route"], 1] - cars["along"] - cars["length"] / 2
        light = lights[arm]
        turned = (light == YELLOW) & (self.lights[arm] == GREEN)
        needed = cars["speed"] ** 2 / (2 * np.maximum(left, 0.1))
        in_time = left < cars["speed"] * (YELLOW_S - 0.5)
        cars["committed"] = np.where(turned, (needed > FIRM_BRAKING) & in_time, cars["committed"] & (light == YELLOW))
        behind = cars["along"] - cars["length"] / 2 - self.starts[cars["route"], 2]
        inside = (left < 0) & ((part == 1) | (behind < 1))
        occupied = np.bincount(arm[inside], minlength=self.roads.num_arms)
        others = occupied.sum() > occupied[arm]
        must = (light == RED) | ((light == YELLOW) & ~cars["committed"]) | ((light == GREEN) & others)
        return np.where(must & (left > -1) & (part == 0), np.maximum(left, 0.0), np.inf)

    def at(self, cars: np.ndarray) -> np.ndarray:
        """float64[cars, 4] of x, y, heading, speed allowed, in the middle of the lane."""
        place = np.clip(cars["along"] / SPACING_M, 0, self.paths.shape[1] - 1.001)
        index, rest = place.astype(int), (place % 1)[:, None]
        here, there = self.paths[cars["route"], index], self.paths[cars["route"], index + 1]
        return here + (there - here) * rest

    def states(self) -> np.ndarray:
        """float32[cars, 5] as in `Scene.states`: in the lane, but not always in its middle."""
        cars, middle = self.cars, self.at(self.cars)
        wave = 25.0  # metres, from one side of the lane to the other and back is 2 pi times this
        aside = cars["sway"] * np.sin(cars["along"] / wave + cars["phase"])
        heading = middle[:, 2] + np.arctan(cars["sway"] / wave * np.cos(cars["along"] / wave + cars["phase"]))
        xy = middle[:, :2] + aside[:, None] * np.stack([-np.sin(middle[:, 2]), np.cos(middle[:, 2])], axis=1)
        heading_wrapped = np.arctan2(np.sin(heading), np.cos(heading))
        velocity = cars["speed"][:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
        return np.column_stack([xy, heading_wrapped, velocity]).astype(np.float32)


def _padded(path: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([path, np.repeat(path[-1:], length - len(path), axis=0)])


def _overlaps(roads: Roads) -> tuple[np.ndarray, np.ndarray]:
    """For each route and lane: where the lane begins along the route (-inf if it does not touch it), and up to which
    place on the lane a rear bumper is in the way. Connectors of one approach overlap until they are a car apart."""
    offsets = np.full((len(roads.routes), len(roads.lanes)), -np.inf)
    until = np.full(offsets.shape, np.inf)
    for number, route in enumerate(roads.routes):
        offsets[number, list(route.parts)] = route.starts
        mine = roads.lanes[route.parts[1]].centre
        for sibling in {r.parts[1] for r in roads.routes if r.parts[0] == route.parts[0]} - {route.parts[1]}:
            theirs = roads.lanes[sibling].centre
            apart = np.linalg.norm(theirs[:, None] - mine[None], axis=-1).min(axis=1) > 2.9
            steps = np.linalg.norm(np.diff(theirs, axis=0), axis=1)
            first = int(apart.argmax()) if apart.any() else len(steps)
            offsets[number, sibling], until[number, sibling] = route.starts[1], steps[:first].sum()
    return offsets, until


def record(roads: Roads, seed: int, scenes: int) -> list[Scene]:
    """`scenes` of 11 s, one after the other from one recording, of the map's traffic with this seed."""
    rng = np.random.default_rng([0xCA85, FORMAT, seed])
    traffic = Traffic(roads, rng)
    walkers = _Walkers(roads, rng)
    for _ in range(WARM_UP_STEPS):
        traffic.step()
    made = []
    for number in range(scenes):
        first, tracks = traffic.clock, Tracks()
        for step in range(STEPS):
            traffic.step()
            for car, state in zip(traffic.cars, traffic.states(), strict=True):
                kind = "bus" if car["bus"] else "vehicle"
                tracks.add(step, f"{car['number']}", state, kind, (car["length"], car["width"]))
            for name, state in walkers.states(traffic.clock * STEP_S):
                tracks.add(step, name, state, "pedestrian", (0.7, 0.7))
        made.append(Scene(
            identifier=f"{roads.map_id}-{seed}-{number}", map_id=roads.map_id, lanes=roads.lanes,
            drivable=roads.drivable, crossings=roads.crossings, lights=roads.lights(first, STEPS),
            light_lanes=tuple(roads.lanes[lane].id for lane in roads.governed), light_stops=roads.stops,
            city="generated", **tracks.fields(rng),
        ))  # fmt: skip
    return made


def generate(map_seed: int, scenes: int, seed: int = 0) -> list[Scene]:
    """The scenes of the map with this seed."""
    return record(build_roads(map_seed), seed * 1_000_003 + map_seed, scenes)


def simulations(map_seeds: list[int], scenes: int, seed: int) -> Iterator[list[Scene]]:
    """The same for each of several maps in turn."""
    return (generate(number, scenes, seed) for number in map_seeds)


class _Walkers:
    """Pedestrians who walk up and down the footpaths at a steady pace."""

    def __init__(self, roads: Roads, rng):
        count = int(rng.integers(0, len(roads.footpaths) + 1))
        self.lines = [row[int(rng.integers(len(row)))] for row in roads.footpaths[:count]]  # so that none meet
        self.start = rng.uniform(0, 1, count)
        self.speed = rng.uniform(0.9, 1.7, count)

    def states(self, time_s: float):
        for number, line in enumerate(self.lines):
            span = len(line) - 2.0  # points are a metre apart, or very nearly so where the road bends
            walked = (self.start[number] * 2 * span + self.speed[number] * time_s) % (2 * span)
            forward = walked < span
            place = walked if forward else 2 * span - walked
            index = int(place)
            along = (line[index + 1] - line[index]) * (1 if forward else -1)
            xy = line[index] + (line[index + 1] - line[index]) * (place % 1)
            heading = np.arctan2(along[1], along[0])
            yield f"p{number}", np.array([*xy, heading, *along * self.speed[number]], np.float32)
