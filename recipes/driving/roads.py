"""Roads by seed for the car-following generator: two to four arms that bend, one or two lanes a side, turns, lights.

Traffic keeps to the right. Arms meet in a junction; each lane that enters it has a connector for every turn it allows.
Green goes to one arm after the other, so the paths of cars that have it never cross. With two arms there is no light.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from driving.scenes import GREEN, RED, STEP_S, YELLOW, Lane

FORMAT = 1  # raised whenever a seed means another map
SPACING_M = 0.5  # between the points of a route
SIDE_ACCELERATION = 2.2  # m/s2, how fast drivers take bends
APPROACH_BRAKING = 1.5  # m/s2, how early they slow down for them
YELLOW_S, CLEAR_S = 3.0, 2.0
FOOTPATHS = 6  # rows
SHOULDER_M = 0.4  # of tarmac beyond the outermost lane


@dataclass(frozen=True, eq=False)
class Route:
    """A way through the junction: the approach, the connector and the exit, one after the other.

    Attributes:
        parts: indices of the three lanes in `Roads.lanes`; arm: where it enters.
        path: float64[M, 4] of x, y, heading (unwrapped) and the speed that bends and limit allow, each SPACING_M.
        starts: float64[3], where along the path each part begins; end: its length in metres.
    """

    parts: tuple[int, int, int]
    arm: int
    path: np.ndarray
    starts: np.ndarray
    end: float


@dataclass(frozen=True, eq=False)
class Roads:
    """One map with its routes and lights.

    `governed` are the indices of the lanes with a light, `stops` float32[L, 2] their ends, `light_arms` int[L] their
    arms. `footpaths` are float64[P, 2] lines beside the road, in rows of one on each side of each arm. `green_s` is how
    long an arm has green.
    """

    map_id: str
    lanes: tuple[Lane, ...]
    drivable: tuple[np.ndarray, ...]
    crossings: tuple[np.ndarray, ...]
    routes: tuple[Route, ...]
    footpaths: tuple[tuple[np.ndarray, ...], ...]
    governed: tuple[int, ...]
    stops: np.ndarray
    light_arms: np.ndarray
    num_arms: int
    green_s: float

    @property
    def has_lights(self) -> bool:
        return len(self.governed) > 0

    def arm_lights(self, time_s: float) -> np.ndarray:
        """The light of every arm, int8[arms]: one has green, then yellow, then all have red until it is clear."""
        turn = self.green_s + YELLOW_S + CLEAR_S
        arm, within = divmod(time_s % (turn * self.num_arms), turn)
        lights = np.full(self.num_arms, RED, np.int8)
        if within < self.green_s + YELLOW_S:
            lights[int(arm)] = GREEN if within < self.green_s else YELLOW
        return lights

    def lights(self, first_step: int, steps: int) -> np.ndarray:
        """int8[L, steps]: the state of each light at the given steps of the simulation's clock."""
        over_time = [self.arm_lights((first_step + k) * STEP_S)[self.light_arms] for k in range(steps)]
        return np.stack(over_time, axis=1) if self.has_lights else np.zeros((0, steps), np.int8)


@dataclass(frozen=True)
class _Arm:
    points: np.ndarray  # float64[D, 2], the middle of the road from the junction outwards, each metre
    heading: np.ndarray  # float64[D], outwards

    def beside(self, offset: float, first: int = 0) -> np.ndarray:
        """A line along the arm, to the left of it as one looks out from the junction."""
        left = np.stack([-np.sin(self.heading), np.cos(self.heading)], axis=1)
        return (self.points + offset * left)[first:]


def build_roads(seed: int) -> Roads:
    """The map of a seed: the same on every machine with the same numpy."""
    rng = np.random.default_rng([0x20AD, FORMAT, seed])
    num_arms = int(rng.choice([2, 3, 4], p=[0.15, 0.35, 0.5]))
    lanes_a_side = int(rng.choice([1, 2], p=[0.6, 0.4]))
    width = float(rng.uniform(3.3, 3.7))
    limit = float(rng.choice([30, 40, 50, 60])) / 3.6
    apart = {2: 180, 3: 105, 4: 90}[num_arms]
    angles = np.radians(rng.uniform(0, 360) + np.arange(num_arms) * apart + rng.uniform(-12, 12, num_arms))
    radius = lanes_a_side * width / np.tan(np.radians((apart - 24) / 2)) + (6.0 if num_arms > 2 else 12.0)
    arms = [_arm(rng, angle, radius) for angle in angles]
    lanes, ends = _arm_lanes(arms, lanes_a_side, width, limit)
    routes = _connect(lanes, ends, num_arms, lanes_a_side, width, limit)
    half = lanes_a_side * width
    entering = [(arm, lane) for (arm, side, _), lane in ends.items() if side == "in"] if num_arms > 2 else []
    return Roads(
        map_id=f"roads-{FORMAT}-{seed}",
        lanes=tuple(lanes),
        drivable=_drivable(arms, half + SHOULDER_M),
        crossings=tuple(_crossing(arm, half) for arm in arms) if num_arms > 2 else (),
        routes=tuple(routes),
        footpaths=tuple(tuple(arm.beside(side * (half + 1.5 + 0.9 * row)) for arm in arms for side in (1, -1))
                        for row in range(FOOTPATHS)),
        governed=tuple(lane for _, lane in entering),
        stops=np.array([lanes[lane].centre[-1] for _, lane in entering], np.float32).reshape(-1, 2),
        light_arms=np.array([arm for arm, _ in entering], int),
        num_arms=num_arms,
        green_s=float(rng.uniform(6, 12)),
    )


def _arm(rng, angle: float, radius: float) -> _Arm:
    length = int(rng.integers(70, 110))
    heading = angle + rng.uniform(-1 / 130, 1 / 130) * np.arange(length + 1.0)
    steps = np.stack([np.cos(heading[:-1]), np.sin(heading[:-1])], axis=1)
    start = radius * np.array([np.cos(angle), np.sin(angle)])
    return _Arm(start + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)]), heading)


def _arm_lanes(arms, lanes_a_side: int, width: float, limit: float):
    """The lanes of all arms, and the index of each by (arm, "in" or "out", lane counted from the middle)."""
    lanes, ends = [], {}
    for number, arm in enumerate(arms):
        for lane in range(lanes_a_side):
            middle = (lane + 0.5) * width
            # Inner boundary left, outer boundary right, in both directions of travel.
            offsets = np.array([middle, middle - width / 2, middle + width / 2])
            for side, sign in (("in", 1), ("out", -1)):
                lines = [arm.beside(sign * offset)[::-sign] for offset in offsets]
                ends[number, side, lane] = len(lanes)
                lanes.append(_lane(f"{100 * (number + 1) + 50 * (side == 'out') + lane}", lines, limit))
    return lanes, ends


def _lane(name: str, lines, limit: float, **more) -> Lane:
    centre, left, right = (np.asarray(line, np.float32) for line in lines)
    return Lane(name, centre, left, right, speed_limit=limit, **more)


def _connect(lanes: list[Lane], ends: dict, num_arms: int, lanes_a_side: int, width: float, limit: float):
    """Append the connectors to `lanes`, name the successors, and return the routes."""
    routes, successors = [], {}
    for (arm, side, lane), entry in ends.items():
        if side == "out":
            continue
        for target in (k for k in range(num_arms) if k != arm):
            if not _allowed(lane, (target - arm) % num_arms, num_arms, lanes_a_side):
                continue
            leaving = ends[target, "out", lane]
            centre = _curve(lanes[entry].centre, lanes[leaving].centre)
            left = np.stack([-np.sin(headings(centre)), np.cos(headings(centre))], axis=1) * width / 2
            name = f"{1000 + len(lanes)}"
            successors.setdefault(entry, []).append(name)
            more = {"successors": (lanes[leaving].id,), "is_intersection": num_arms > 2}
            lanes.append(_lane(name, (centre, centre + left, centre - left), limit, **more))
            routes.append(_route(lanes, (entry, len(lanes) - 1, leaving), arm, limit))
    for entry, names in successors.items():
        old = lanes[entry]
        lanes[entry] = Lane(old.id, old.centre, old.left, old.right, old.kind, tuple(names), old.speed_limit)
    return routes


def _allowed(lane: int, turn: int, num_arms: int, lanes_a_side: int) -> bool:
    """Arms are numbered counterclockwise, so `turn` 1 is right and `num_arms - 1` left. The inner lane does not turn
    right, the outer one does not turn left."""
    if lanes_a_side == 1 or num_arms == 2:
        return True
    return turn != (1 if lane == 0 else num_arms - 1)


def _curve(incoming: np.ndarray, outgoing: np.ndarray) -> np.ndarray:
    """A cubic Hermite curve from the end of one line to the beginning of another, with their directions."""
    begin, end = incoming[-1].astype(float), outgoing[0].astype(float)
    chord = np.linalg.norm(end - begin)
    first, last = ((line[1] - line[0]).astype(float) for line in (incoming[-2:], outgoing[:2]))
    t = np.linspace(0, 1, max(int(chord / SPACING_M), 4) + 1)[:, None]
    shapes = (2 * t**3 - 3 * t**2 + 1, t**3 - 2 * t**2 + t, 3 * t**2 - 2 * t**3, t**3 - t**2)
    scale = 1.2 * chord
    return shapes[0] * begin + shapes[1] * scale * unit(first) + shapes[2] * end + shapes[3] * scale * unit(last)


def _route(lanes, parts, arm: int, limit: float) -> Route:
    lines = [lanes[part].centre.astype(float) for part in parts]
    lengths = [np.linalg.norm(np.diff(line, axis=0), axis=1).sum() for line in lines]
    line = np.concatenate([lines[0], lines[1][1:], lines[2][1:]])
    xy, end = resample(line, SPACING_M)
    heading = headings(xy)
    path = np.column_stack([xy, heading, speeds(heading, limit)])
    return Route(parts, arm, path, np.cumsum([0.0, *lengths[:2]]), end)


def resample(line: np.ndarray, spacing: float) -> tuple[np.ndarray, float]:
    """Points of a polyline float64[P, 2] at equal distances along it, and its length."""
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    at = np.arange(0, along[-1], spacing)
    return np.stack([np.interp(at, along, line[:, axis]) for axis in (0, 1)], axis=1), float(along[-1])


def speeds(heading: np.ndarray, limit) -> np.ndarray:
    """m/s that drivers allow themselves at points SPACING_M apart; `limit` is one number or float64[P] as `heading`."""
    bend = np.abs(np.gradient(heading, SPACING_M))
    smooth = np.convolve(np.pad(bend, 4, mode="edge"), np.full(9, 1 / 9), "valid")
    speed = np.minimum(limit, np.sqrt(SIDE_ACCELERATION / np.maximum(smooth, 1e-4)))
    for k in range(len(speed) - 2, -1, -1):  # as fast as one may go here and still be slow enough there
        speed[k] = min(speed[k], np.sqrt(speed[k + 1] ** 2 + 2 * APPROACH_BRAKING * SPACING_M))
    return speed


def headings(line: np.ndarray) -> np.ndarray:
    """float64[P], unwrapped, of a polyline [P, 2] with P of at least 2."""
    tangent = np.gradient(line, axis=0)
    return np.unwrap(np.arctan2(tangent[:, 1], tangent[:, 0]))


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-9)


def _drivable(arms, half: float) -> tuple[np.ndarray, ...]:
    """A strip for each arm and the hull of the junction, which reaches two metres into each arm: no gap is left."""
    corners = np.concatenate([arm.beside(sign * half)[:3] for arm in arms for sign in (1, -1)])
    strips = [_strip(arm.beside(half), arm.beside(-half)) for arm in arms]
    return (*strips, _hull(corners).astype(np.float32))


def _crossing(arm: _Arm, half: float) -> np.ndarray:
    near, far = ([arm.beside(side * half)[metres] for side in (1, -1)] for metres in (0, 3))
    return _strip(np.array(near), np.array(far))


def _strip(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.concatenate([left, right[::-1]]).astype(np.float32)


def _hull(points: np.ndarray) -> np.ndarray:
    """Convex hull, counterclockwise."""
    from scipy.spatial import ConvexHull

    return points[ConvexHull(points).vertices]
