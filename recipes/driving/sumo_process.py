"""SUMO in a process of its own, asked and answered by pickles of plain values through its pipes.

The process is a fresh Python that finds this kit by its folder. The modules of a recipe have another name in the one
that loaded the recipe, so neither functions nor objects of ours are sent: a scene travels as a dictionary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from aurora_train.errors import UserError
from driving.scenes import STEP_S, STEPS, Lane, Scene
from driving.sumo_scenes import running, simulate_here, sumo_version
from driving.sumo_world import World

PATIENCE = 4  # stretches of 5 s in which an ego car is looked for
SERVE = "from driving.sumo_process import serve; serve()"


class SumoProcess:
    """A process for one simulation. Raises MissingExtra without SUMO."""

    def __init__(self):
        sumo_version()
        places = [str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def ask(self, request: str, *arguments):
        """The answer of `serve`. Raises the UserError that the other side raised, RuntimeError if it ended."""
        try:
            pickle.dump((request, *arguments), self._process.stdin)
            self._process.stdin.flush()
            kind, answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(f"the process of SUMO ended with status {self._process.wait()}") from error
        if kind == "refused":
            raise UserError(answer["what"], where=answer["where"], why=answer["why"], hint=answer["hint"])
        return answer

    def close(self) -> None:
        """End the process, which does so once nothing can be asked any more."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def simulations(map_seeds: list[int], scenes: int, seed: int) -> Iterator[list[Scene]]:
    """For each map in turn: `scenes` of 11 s, one after the other."""
    for number in map_seeds:
        process = SumoProcess()
        try:
            yield [unpacked(one) for one in process.ask("simulate", number, scenes, seed)]
        finally:
            process.close()


def serve() -> None:
    """In the other process: answer requests until nobody asks. What SUMO prints does not get among the answers."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with contextlib.ExitStack() as stack:
        world = None
        while True:
            try:
                request, *arguments = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                if request == "open":
                    world = _opened(stack, *arguments)
                answer = ("answered", _answer(world, request, arguments))
            except UserError as refused:
                answer = ("refused", {name: getattr(refused, name) for name in ("what", "where", "why", "hint")})
            pickle.dump(answer, answers)
            answers.flush()


def _opened(stack: contextlib.ExitStack, map_seed: int, seed: int) -> World:
    rng = np.random.default_rng([0xD21, map_seed, seed])
    libsumo, road = stack.enter_context(running(map_seed, seed, STEPS * STEP_S, rng))
    identifier = f"{road.map_id}-{seed}-driven"
    for _ in range(PATIENCE):  # on quiet roads the first 5 s may be those of nobody
        world = World(libsumo, road, identifier, rng)
        if world.ego:
            return world
    raise UserError("no car of SUMO's stays for 5 s", where=identifier, why=f"{PATIENCE} times 5 s were looked at",
                    hint="a smaller rollout.sumo_maps leaves this map out")  # fmt: skip


def _answer(world: World | None, request: str, arguments: list):
    if request == "simulate":
        return [packed(scene) for scene in simulate_here(*arguments)]
    if request == "observe":
        return packed(world.observed())
    if request == "recorded":
        return packed(world.scene(0))
    return world.advance(*arguments) if request == "advance" else None


def packed(scene: Scene) -> dict:
    """A scene as plain values."""
    plain = {field.name: getattr(scene, field.name) for field in dataclasses.fields(Scene)}
    names = [field.name for field in dataclasses.fields(Lane)]
    return plain | {"lanes": [{name: getattr(lane, name) for name in names} for lane in scene.lanes]}


def unpacked(plain: dict) -> Scene:
    """The scene of `packed`."""
    return Scene(**plain | {"lanes": tuple(Lane(**lane) for lane in plain["lanes"])})
