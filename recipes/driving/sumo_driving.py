"""A policy drives one car among SUMO's, which react to it: closed loop in a simulator that is not the training's own.

Each world is a process, since SUMO has one simulation in a process. After 5 s of SUMO's driving a car becomes the ego.
A policy sees the last 5 s of the scene and plans; the ego follows the plan for half a second, and so on for 6 s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np

from driving.driving_scores import driving_scores, mean
from driving.scenes import HISTORY, STEP_S, STEPS, Scene
from driving.sumo_scenes import add_vehicles, running, sumo_version
from driving.tracks import Tracks

PLANNED = 5  # steps of a plan that are driven before the next one
Policy = Callable[[list[Scene]], np.ndarray]  # scenes of 50 steps -> float[N, >= PLANNED, 3]: x, y, heading of each ego


class SumoWorld:
    """One simulation and its ego car."""

    def __init__(self, map_seed: int, seed: int):
        sumo_version()
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, map_seed, seed), daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> SumoWorld:
        return self

    def __exit__(self, *_) -> None:
        self._pipe.close()  # the process ends with it
        self._process.join()

    def observe(self) -> Scene:
        """The last HISTORY steps up to now; `focal` is the ego."""
        return self._ask("observe")

    def advance(self, poses: np.ndarray | None) -> None:
        """Move the ego to each of the poses [n, 3] in turn, 0.1 s apart; with None SUMO drives it for PLANNED steps."""
        self._ask(("advance", poses))

    def recorded(self) -> Scene:
        """The scene from the beginning until now."""
        return self._ask("recorded")

    def _ask(self, request):
        self._pipe.send(request)
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def drive(policy: Policy | None, map_seeds: list[int], seed: int, progress) -> list[Scene]:
    """One scene of 11 s on each map; from its sixth second on the policy drives the ego, or SUMO does if it is None."""
    turns = (STEPS - HISTORY) // PLANNED
    with ExitStack() as stack:
        worlds = [stack.enter_context(SumoWorld(number, seed)) for number in map_seeds]
        for turn in range(turns):
            progress(turn, turns, "driving among SUMO's cars")
            plans = [None] * len(worlds) if policy is None else policy([world.observe() for world in worlds])
            for world, plan in zip(worlds, plans, strict=True):
                world.advance(None if plan is None else np.asarray(plan, np.float64)[:PLANNED])
        return [world.recorded() for world in worlds]


def reactive_scores(scenes: list[Scene]) -> dict[str, float]:
    """Shares of scenes with each mishap of the ego, as `driving_scores` names them, and how far it came in 6 s."""
    found = []
    for scene in scenes:
        ego = np.arange(scene.num_agents) == scene.focal
        scores = driving_scores(scene, scene.states[:, HISTORY:, :3], scene.valid[:, HISTORY:], ego)
        way = np.linalg.norm(np.diff(scene.states[scene.focal, HISTORY - 1 :, :2], axis=0), axis=1)
        found.append(scores | {"metres_6s": float(way.sum())})
    return {name: mean(np.array([scores[name] for scores in found])) for name in found[0]}


class _World:
    """The simulation, in its own process."""

    def __init__(self, libsumo, road, identifier: str, rng):
        self.libsumo, self.road, self.identifier = libsumo, road, identifier
        self.tracks, self.lights, self.now = Tracks(), np.zeros((len(road.links), STEPS), np.int8), 0
        for _ in range(HISTORY):
            self._step()
        self.ego = self._choose(rng)

    def _step(self) -> None:
        self.lights[:, self.now] = self.road.lights(self.libsumo)
        self.libsumo.simulationStep()
        add_vehicles(self.libsumo, self.tracks, self.now)
        self.now += 1

    def _choose(self, rng) -> str:
        """A car that was seen throughout, and one that moves if there is any."""
        whole = [name for name, track in self.tracks.states.items() if np.isfinite(track[:HISTORY, 0]).all()]
        moving = [name for name in whole if np.hypot(*self.tracks.states[name][HISTORY - 1, 3:]) > 2]
        if not whole:
            raise RuntimeError(f"{self.identifier}: no car stays for 5 s")
        return str(rng.choice(moving or whole))

    def advance(self, poses) -> None:
        for pose in [None] * PLANNED if poses is None else poses:
            if pose is not None:
                self._place(pose)
            self._step()
            if pose is not None:
                self._note(pose)

    def _place(self, pose: np.ndarray) -> None:
        """Put the ego there with the next step. Where its route has ended SUMO has taken it away, and it drives on."""
        vehicles = self.libsumo.vehicle
        if self.ego not in vehicles.getIDList():
            return
        x, y, heading = (float(value) for value in pose)
        half = self.tracks.sizes[self.ego][0] / 2
        front = x + half * np.cos(heading), y + half * np.sin(heading)
        vehicles.moveToXY(self.ego, "", -1, *front, angle=(90 - np.degrees(heading)) % 360, keepRoute=2)

    def _note(self, pose: np.ndarray) -> None:
        """The ego's track is what the policy did: SUMO rounds, and loses a car that leaves its road."""
        track = self.tracks.states[self.ego]
        moved = (pose[:2] - track[self.now - 2, :2]) / STEP_S
        track[self.now - 1] = [*pose, *moved]

    def scene(self, first: int) -> Scene:
        """The steps from `first` until now."""
        fields = self.tracks.fields(np.random.default_rng(0))
        states = fields["states"][:, first : self.now]
        there = np.flatnonzero(np.isfinite(states[..., 0]).any(axis=1))
        names = [fields["track_ids"][k] for k in there]
        fields |= {
            "states": states[there], "sizes": fields["sizes"][there], "track_ids": tuple(names),
            "kinds": tuple(fields["kinds"][k] for k in there), "focal": names.index(self.ego),
        }  # fmt: skip
        lights = self.lights[:, first : self.now]
        return Scene(identifier=self.identifier, lights=lights, **self.road.fields(), **fields)


def _serve(pipe: Connection, map_seed: int, seed: int) -> None:
    """Answer requests until the other side closes. An error is an answer, too."""
    rng = np.random.default_rng([0xD21, map_seed, seed])
    try:
        with running(map_seed, seed, STEPS * STEP_S, rng) as (libsumo, road):
            world = _World(libsumo, road, f"{road.map_id}-{seed}-driven", rng)
            while True:
                request = pipe.recv()
                if request == "observe":
                    pipe.send(world.scene(world.now - HISTORY))
                elif request == "recorded":
                    pipe.send(world.scene(0))
                else:
                    world.advance(request[1])
                    pipe.send(None)
    except EOFError:
        return
    except Exception as error:
        pipe.send(error)
