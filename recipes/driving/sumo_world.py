"""The side of SUMO in closed loop: the simulation, in its own process, and the car that is moved from outside."""

from __future__ import annotations

import numpy as np

from driving.scenes import HISTORY, STEP_S, STEPS, Scene
from driving.sumo_scenes import add_vehicles
from driving.tracks import Tracks


class World:
    """The running simulation, after HISTORY steps in which SUMO drove all cars."""

    def __init__(self, libsumo, road, identifier: str, rng):
        self.libsumo, self.road, self.identifier = libsumo, road, identifier
        self.tracks, self.lights, self.now = Tracks(), np.zeros((len(road.links), STEPS), np.int8), 0
        for _ in range(HISTORY):
            self._step()
        self.ego = self._choose(rng)  # "" if no car was there throughout

    def _step(self) -> None:
        self.lights[:, self.now] = self.road.lights(self.libsumo)
        self.libsumo.simulationStep()
        add_vehicles(self.libsumo, self.tracks, self.now)
        self.now += 1

    def _choose(self, rng) -> str:
        """A car that was seen throughout, and one that moves if there is any; "" without a car."""
        whole = [name for name, track in self.tracks.states.items() if np.isfinite(track[:HISTORY, 0]).all()]
        moving = [name for name in whole if np.hypot(*self.tracks.states[name][HISTORY - 1, 3:]) > 2]
        return str(rng.choice(moving or whole)) if whole else ""

    def advance(self, poses: list) -> None:
        """A step for each pose float64[3] of the ego, or None where SUMO drives it."""
        for pose in poses:
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

    def observed(self) -> Scene:
        """The last HISTORY steps."""
        return self.scene(self.now - HISTORY)

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
