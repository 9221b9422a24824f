"""Scenes from SUMO, the traffic simulator (Lopez et al. 2018, "Microscopic Traffic Simulation using SUMO").

A map is a grid of one to three junctions that SUMO's own netgenerate draws by a seed; SUMO drives. Three conventions
differ from a scene's: a position is that of the front bumper, an angle is in degrees clockwise from north, and cars
change lanes in no time, which `--lanechange.duration` changes. A second simulation in one process silently replaces the
first, so `sumo_process` gives each a process.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from aurora_train.errors import MissingExtra, UserError
from driving.roads import headings
from driving.scenes import GREEN, RED, STEP_S, STEPS, UNKNOWN, YELLOW, Lane, Scene
from driving.tracks import Tracks

FORMAT = 1  # raised whenever a seed means other scenes
WARM_UP_S = 25
KINDS = {"passenger": "vehicle", "bus": "bus", "motorcycle": "motorcyclist", "bicycle": "cyclist"}
# Of the states of SUMO's links: g has to yield, u is red and yellow, before green.
LIGHTS = {"G": GREEN, "g": GREEN, "y": YELLOW, "Y": YELLOW, "r": RED, "u": RED}


def sumo_version() -> str:
    """The version of SUMO. Raises MissingExtra."""
    try:
        if find_spec("libsumo") is not None:
            return version("eclipse-sumo")
    except PackageNotFoundError:
        pass
    raise MissingExtra("eclipse-sumo", "driving", "scenes from SUMO")


def simulate_here(map_seed: int, scenes: int, seed: int) -> list[Scene]:
    """`scenes` of 11 s, one after the other, on the map with this seed; this process's only simulation."""
    rng = np.random.default_rng([0x5030, FORMAT, map_seed, seed])
    with running(map_seed, seed, scenes * STEPS * STEP_S, rng) as (libsumo, road):
        return [_record(libsumo, road, f"{road.map_id}-{seed}-{number}", rng) for number in range(scenes)]


@contextlib.contextmanager
def running(map_seed: int, seed: int, seconds: float, rng):
    """(libsumo, Road) of a simulation whose roads have filled, with traffic for so many seconds.

    It is this process's only one. Cars that touch drive on: by default SUMO would lift one of them out of the world.
    """
    import libsumo
    import sumo

    with tempfile.TemporaryDirectory() as folder:
        net = _draw_map(Path(sumo.SUMO_HOME), Path(folder), map_seed)
        routes = _demand(net, Path(folder), WARM_UP_S + seconds, rng)
        libsumo.start([
            "sumo", "-n", str(net), "-r", str(routes), "--step-length", str(STEP_S), "--seed", str(seed),
            "--lanechange.duration", "3", "--time-to-teleport", "-1", "--collision.action", "warn",
            "--no-step-log", "--no-warnings",
        ])  # fmt: skip
        try:
            for _ in range(round(WARM_UP_S / STEP_S)):
                libsumo.simulationStep()
            yield libsumo, Road(libsumo, f"sumo-{FORMAT}-{map_seed}")
        finally:
            libsumo.close()


def _draw_map(home: Path, folder: Path, seed: int) -> Path:
    rng = np.random.default_rng([0x3A9, FORMAT, seed])
    net = folder / "net.xml"
    command = [
        home / "bin" / "netgenerate", "--grid", "--grid.x-number", rng.integers(1, 4), "--grid.y-number", 1,
        "--grid.length", rng.integers(100, 160), "--grid.attach-length", rng.integers(80, 120),
        "--default.lanenumber", rng.integers(1, 3), "--default.speed", rng.choice([30, 40, 50, 60]) / 3.6,
        "--perturb-x", "norm(0,10)", "--perturb-y", "norm(0,10)", "--tls.guess", "true", "--tls.guess.threshold", 1,
        "--no-turnarounds", "true", "--seed", seed, "-o", net,
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode or not net.exists():
        raise UserError("SUMO's netgenerate drew no map", where=f"map seed {seed}", why=done.stderr.strip()[-500:])
    return net


def _demand(net: Path, folder: Path, seconds: float, rng) -> Path:
    """Trips between the ends of roads, at random times; drivers differ by type, and within a type in nothing."""
    junctions = {j.get("id"): j.get("type") for j in ElementTree.parse(net).iter("junction")}
    edges = [edge for edge in ElementTree.parse(net).iter("edge") if edge.get("function") != "internal"]
    entries = [edge for edge in edges if junctions[edge.get("from")] == "dead_end"]
    exits = [edge for edge in edges if junctions[edge.get("to")] == "dead_end"]
    root = ElementTree.Element("routes")
    types = []
    for number in range(8):
        bus = number == 7
        values = {
            "id": f"type{number}", "vClass": "bus" if bus else "passenger", "speedDev": 0, "sigma": 0.3,
            "length": rng.uniform(9, 12) if bus else rng.uniform(3.9, 5.2), "width": 2.5 if bus else 1.85,
            "speedFactor": rng.uniform(0.85, 1.1), "tau": rng.uniform(0.9, 1.6), "accel": rng.uniform(1.2, 2.6),
        }  # fmt: skip
        types.append(values["id"])
        ElementTree.SubElement(root, "vType", {name: str(value) for name, value in values.items()})
    times = np.sort(rng.uniform(0, seconds, int(seconds * len(entries) * rng.uniform(0.06, 0.14))))
    for number, time in enumerate(times):
        entry = entries[rng.integers(len(entries))]
        leaving = [edge for edge in exits if edge.get("to") != entry.get("from")]
        trip = {
            "id": number, "type": types[rng.integers(len(types))], "depart": f"{time:.1f}", "from": entry.get("id"),
            "to": leaving[rng.integers(len(leaving))].get("id"), "departLane": "best", "departSpeed": "max",
        }  # fmt: skip
        ElementTree.SubElement(root, "trip", {name: str(value) for name, value in trip.items()})
    path = folder / "trips.xml"
    ElementTree.ElementTree(root).write(path)
    return path


class Road:
    """The map of the running simulation. A light governs a lane: it is RED if every way on from there is."""

    def __init__(self, libsumo, map_id: str):
        self.map_id = map_id
        names = [n for n in sorted(libsumo.lane.getIDList()) if "passenger" in libsumo.lane.getAllowed(n)]
        number = {name: f"{k + 1}" for k, name in enumerate(names)}
        self.lanes = tuple(self._lane(libsumo, name, number) for name in names)
        place = dict(zip(names, self.lanes, strict=True))
        junctions = [np.array(libsumo.junction.getShape(j), np.float32)
                     for j in sorted(libsumo.junction.getIDList()) if not j.startswith(":")]  # fmt: skip
        strips = tuple(np.concatenate([lane.left, lane.right[::-1]]) for lane in self.lanes)
        self.drivable = strips + tuple(shape for shape in junctions if len(shape) > 2)
        self.links: dict[str, list[tuple[str, int]]] = {}
        for light in sorted(libsumo.trafficlight.getIDList()):
            for index, link in enumerate(libsumo.trafficlight.getControlledLinks(light)):
                for incoming, _, _ in link:
                    self.links.setdefault(incoming, []).append((light, index))
        self.light_lanes = tuple(number[name] for name in self.links)
        stops = [place[name].centre[-1] for name in self.links]
        self.light_stops = np.array(stops, np.float32).reshape(-1, 2)

    @staticmethod
    def _lane(libsumo, name: str, number: dict[str, str]) -> Lane:
        centre = np.array(libsumo.lane.getShape(name), np.float64)
        heading = headings(centre)
        left = np.stack([-np.sin(heading), np.cos(heading)], axis=1) * libsumo.lane.getWidth(name) / 2
        following = [link[4] or link[0] for link in libsumo.lane.getLinks(name)]  # the way through the junction first
        successors = tuple(number[one] for one in following if one in number)
        lines = [line.astype(np.float32) for line in (centre, centre + left, centre - left)]
        return Lane(number[name], *lines, successors=successors, speed_limit=libsumo.lane.getMaxSpeed(name),
                    is_intersection=name.startswith(":"))  # fmt: skip

    def fields(self) -> dict:
        """The fields of a `Scene` that the map decides."""
        return {"map_id": self.map_id, "lanes": self.lanes, "drivable": self.drivable, "city": "SUMO",
                "light_lanes": self.light_lanes, "light_stops": self.light_stops}  # fmt: skip

    def lights(self, libsumo) -> list[int]:
        """The state of each light now."""
        signals = libsumo.trafficlight
        words = {light: signals.getRedYellowGreenState(light) for light in signals.getIDList()}
        states = []
        for links in self.links.values():
            ways = {LIGHTS.get(words[light][index], UNKNOWN) for light, index in links}
            states.append(next(state for state in (GREEN, YELLOW, UNKNOWN, RED) if state in ways))
        return states


def _record(libsumo, road: Road, identifier: str, rng) -> Scene:
    tracks, lights = Tracks(), np.zeros((len(road.links), STEPS), np.int8)
    for step in range(STEPS):
        lights[:, step] = road.lights(libsumo)
        libsumo.simulationStep()
        add_vehicles(libsumo, tracks, step)
    return Scene(identifier=identifier, lights=lights, **road.fields(), **tracks.fields(rng))


def add_vehicles(libsumo, tracks: Tracks, step: int) -> None:
    """Add all vehicles as they are now, as the tracks' step `step`."""
    for name in sorted(libsumo.vehicle.getIDList(), key=int):
        size = (libsumo.vehicle.getLength(name), libsumo.vehicle.getWidth(name))
        kind = KINDS.get(libsumo.vehicle.getVehicleClass(name), "unknown")
        state = box_state(libsumo.vehicle.getPosition(name), libsumo.vehicle.getAngle(name),
                          libsumo.vehicle.getSpeed(name), size[0])  # fmt: skip
        tracks.add(step, name, state, kind, size)


def box_state(front, angle_degrees: float, speed: float, length: float) -> np.ndarray:
    """A row of `Scene.states` from SUMO's: front bumper (x, y), degrees clockwise from north, m/s, metres."""
    heading = np.radians(90 - angle_degrees)
    heading = np.arctan2(np.sin(heading), np.cos(heading))
    direction = np.array([np.cos(heading), np.sin(heading)])
    return np.array([*(np.asarray(front) - direction * length / 2), heading, *direction * speed])
