"""Demonstrations by a world's expert, recorded once and kept.

Noise is added to the expert's actions as they are carried out, and the action that is recorded is the one that the
expert chose. So the demonstrations show how to come back from small errors, which a policy will make (Laskey et al.
2017, DART). The expert's failures are left out and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from aurora_train.data.prepared import key_of
from aurora_train.errors import UserError
from robot.episodes import Episode, Episodes, kept
from robot.rollouts import Expert, Tape, run
from robot.worlds import World, world

VERSION = 1  # of what is recorded here; a change records again


def record(
    name: str, episodes: int, seed: int, progress: Callable, *, cache: Path, noise: float = 0.0,
    cameras: Sequence[str] = (), size: int = 64,
) -> Episodes:  # fmt: skip
    """Successful demonstrations in the world `name`, from the cache or recorded into it.

    Attempt k depends on (seed, k) alone, so fewer demonstrations are the first of more, and a killed recording goes on
    after its last whole episode. `noise` is its standard deviation as a share of the actions' half range.

    Raises UserError if the expert fails too often, and what `worlds.world` raises.
    """
    on = world(name, cameras, size)
    try:
        decisive = {"recorded": VERSION, "world": name, "simulator": on.version, "episodes": episodes, "seed": seed,
                    "noise": noise, "cameras": list(cameras), "size": size if cameras else None}  # fmt: skip
        safe = name.replace(":", "-")
        made = kept(
            Path(cache) / f"demonstrations-{safe}-{key_of(decisive)[:16]}", decisive,
            lambda notes: _attempts(on, episodes, seed, noise, notes), fps=on.fps, names=on.names,
            source={"source": f"demonstrations by the expert of {name}", **decisive}, progress=progress,
            what=f"demonstrations in {name}", total=episodes,
        )  # fmt: skip
    finally:
        on.close()
    tried = made.notes[-1]["attempt"] + 1
    return dataclasses.replace(made, source=made.source | {"attempts": tried, "failures": tried - len(made)})


def _attempts(on: World, episodes: int, seed: int, noise: float, notes: list[dict]) -> Iterator[Episode]:
    done, attempt = len(notes), notes[-1]["attempt"] + 1 if notes else 0
    while done < episodes:
        draws = np.random.SeedSequence([seed, attempt]).generate_state(2)
        tape = Tape(_Shaken(on, noise, int(draws[1])), int(draws[0]), attempt, False)
        run(Expert(seed), [tape], on.max_steps)
        if tape.success:
            made = tape.rollout()
            yield Episode(made.observations | {"action": made.actions}, on.task, {"attempt": attempt})
            done += 1
        attempt += 1
        if attempt >= 20 and attempt > 10 * done:
            raise UserError(f"the expert succeeded in {done} of {attempt} attempts", where="data.noise",
                            hint="less noise" if noise else "choose another world")  # fmt: skip


class _Shaken:
    """A world that adds noise to the actions that it is given."""

    def __init__(self, of: World, noise: float, seed: int):
        self.of, self._draws = of, np.random.default_rng(seed)
        self._scale = noise * (of.action_high - of.action_low) / 2

    def __getattr__(self, name: str):
        return getattr(self.of, name)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], bool]:
        shaken = action + self._scale * self._draws.normal(size=len(action))
        return self.of.step(np.clip(shaken, self.of.action_low, self.of.action_high).astype(np.float32))
