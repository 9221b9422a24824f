"""Episodes in simulation: many worlds in lock step, so that a policy is asked for all of them at once.

There is one loop for demonstrations, experts and trained policies; they differ in what chooses the actions. An episode
ends at its first success, or fails after the world's number of steps. The same seeds give the same episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from aurora_train.errors import UserError
from robot.worlds import World, world

AT_ONCE = 10  # worlds in lock step
FILM_RATE = 20.0  # pictures a second of simulated time
FILM_SIZE = 160  # pixels of their edges


@dataclass(frozen=True)
class Rollout:
    """One episode of T steps, as it ran.

    Attributes:
        seed: of the world.
        success: whether the task was done at any step; then the last one.
        observations: float32[T, ...] or uint8[T, ...] by feature, each before its action.
        actions: float32[T, A], as they were chosen; the world cuts them to its limits.
        rewards: float64[T], the world's own.
        last: the observation after the last action.
        film: uint8[H, W, 3] pictures, FILM_RATE a second, if the episode was filmed.
    """

    seed: int
    success: bool
    observations: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    last: dict[str, np.ndarray]
    film: tuple[np.ndarray, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.actions)


class Tape:
    """An episode while it runs. Without `keeps_images` its rollout has the observed vectors alone."""

    def __init__(self, on: World, seed: int, number: int, is_filmed: bool, keeps_images: bool = True):
        self.world, self.seed, self.number, self.is_filmed = on, seed, number, is_filmed
        self.keeps_images = keeps_images
        self._vectors, self._pictures, self.success = on.reset(seed), None, False
        self.seen, self.actions, self.rewards, self.film = [], [], [], []

    @property
    def observation(self) -> dict[str, np.ndarray]:
        """What is observed now. Pictures are drawn when they are first looked at: one costs as much as many steps."""
        if self._pictures is None:
            self._pictures = self.world.pictures()
        return self._vectors | self._pictures

    def act(self, action: np.ndarray) -> None:
        every = max(round(self.world.fps / FILM_RATE), 1)
        if self.is_filmed and len(self.actions) % every == 0:
            self.film.append(self.world.render(FILM_SIZE))
        self.seen.append(self._kept())
        self.actions.append(np.asarray(action, np.float32))
        self._vectors, self.success = self.world.step(action)
        self._pictures = None
        self.rewards.append(self.world.reward)
        if self.is_filmed and self.success:
            self.film.append(self.world.render(FILM_SIZE))

    def rollout(self) -> Rollout:
        seen = {name: np.stack([one[name] for one in self.seen]) for name in self.seen[0]}
        return Rollout(self.seed, self.success, seen, np.stack(self.actions), np.array(self.rewards), self._kept(),
                       tuple(self.film))  # fmt: skip

    def _kept(self) -> dict[str, np.ndarray]:
        return self.observation if self.keeps_images else self._vectors


def rollouts(
    choose: Callable[[list[Tape], int], np.ndarray], name: str, seeds: Sequence[int], *, cameras: Sequence[str] = (),
    size: int = 64, at_once: int = AT_ONCE, max_steps: int | None = None, filmed: int = 0,
    progress: Callable = lambda done, total, what: None, what: str = "episodes in simulation",
) -> list[Rollout]:  # fmt: skip
    """One episode for each seed, in their order, without the images that the policy saw: those of long episodes would
    fill the memory.

    Args:
        choose: actions float32[n, A] for the observations of n episodes at a step; row i is for the i-th of them.
        name: the world's; `cameras` and `size` as in `worlds.world`.
        max_steps: fewer steps than the world's own limit.
        filmed: how many episodes, the first ones, are filmed.
    """
    worlds = [world(name, cameras, size) for _ in range(min(at_once, len(seeds)))]
    made: list[Rollout] = []
    try:
        for first in range(0, len(seeds), len(worlds)):
            numbers = range(first, min(first + len(worlds), len(seeds)))
            tapes = [Tape(on, int(seeds[n]), n, n < filmed, False) for on, n in zip(worlds, numbers, strict=False)]
            run(choose, tapes, max_steps or worlds[0].max_steps)
            made += [tape.rollout() for tape in tapes]
            progress(len(made), len(seeds), what)
    finally:
        for on in worlds:
            on.close()
    return made


def run(choose: Callable[[list[Tape], int], np.ndarray], tapes: list[Tape], max_steps: int) -> None:
    """Let episodes run until each has succeeded or failed. Those that have ended are still shown to `choose`."""
    for step in range(max_steps):
        if all(tape.success for tape in tapes):
            return
        for tape, action in zip(tapes, choose(tapes, step), strict=True):
            if not tape.success:
                tape.act(action)


class Chunked:
    """The actions of a policy that answers with chunks.

    Open loop, the first `execute` actions of a chunk are taken before the policy is asked again. With `ensemble` it is
    asked at every step, and its chunks are averaged (`Ensemble`).

    Args:
        act: chunks float32[B, K, A] for observations [B, ...] by feature, the numbers int64[B] of their episodes and
            the step. It is always asked for `width` rows.
    """

    def __init__(self, act: Callable[[dict[str, np.ndarray], np.ndarray, int], np.ndarray], *, execute: int = 1,
                 ensemble: float | None = None, width: int = AT_ONCE):  # fmt: skip
        self.act, self.execute, self.ensemble, self.width = act, execute, ensemble, width

    def __call__(self, tapes: list[Tape], step: int) -> np.ndarray:
        if self.ensemble is not None:
            self._averaged = Ensemble(self.ensemble) if step == 0 else self._averaged
            return self._averaged(self._asked(tapes, step))[:, 0]
        if step == 0 or self._used == min(self.execute, self._chunk.shape[1]):
            self._chunk, self._used = self._asked(tapes, step), 0
        self._used += 1
        return self._chunk[:, self._used - 1]

    def _asked(self, tapes: list[Tape], step: int) -> np.ndarray:
        rows = [*tapes, *[tapes[0]] * (self.width - len(tapes))]  # one shape, so that one program is compiled
        seen = {name: np.stack([tape.observation[name] for tape in rows]) for name in tapes[0].observation}
        chunk = np.asarray(self.act(seen, np.array([tape.number for tape in rows]), step))[: len(tapes)]
        return refuse_not_finite(chunk, f"at step {step} of an episode")


class Ensemble:
    """The mean of all that successive chunks said of a step, weighted exp(-m i); i counts predictions from the oldest.

    It is the temporal ensembling of Zhao et al. 2023, with m = 0.01 there. One chunk is given for each step.
    """

    def __init__(self, m: float):
        self.m, self._sum, self._weight = m, None, None

    def __call__(self, chunk: np.ndarray) -> np.ndarray:
        """Take in the chunks float32[B, K, A] of this step; the means for this step and the K - 1 that follow it.

        Row 0 of the running sums is for this step, row 1 for the next; weights are relative to the newest prediction.
        """
        if self._sum is None:
            self._sum, self._weight = np.zeros_like(chunk), np.zeros(chunk.shape[1])
        older = np.exp(self.m)
        self._sum = older * np.roll(self._sum, -1, axis=1)
        self._weight = older * np.roll(self._weight, -1)
        self._sum[:, -1], self._weight[-1] = 0, 0
        self._sum, self._weight = self._sum + chunk, self._weight + 1
        return self._sum / self._weight[:, None]


def refuse_not_finite(chunk: np.ndarray, of: str) -> np.ndarray:
    """Actions as they are. UserError, which says which (`of`), if one is not a finite number."""
    if not np.isfinite(chunk).all():
        raise UserError(f"the policy's action {of} is not a finite number", where="score",
                        hint="train with a lower optimizer.lr, or look at the loss in metrics.jsonl")  # fmt: skip
    return chunk


class Expert:
    """The world's own expert, with its own stream of random numbers in each episode."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def __call__(self, tapes: list[Tape], step: int) -> np.ndarray:
        if step == 0:
            self._draws = [np.random.default_rng([self.seed, tape.seed, 1]) for tape in tapes]
        return np.stack(
            [tape.world.expert(tape.observation, rng) for tape, rng in zip(tapes, self._draws, strict=True)]
        )


class Uniform(Expert):
    """Actions drawn evenly between the world's limits."""

    def __call__(self, tapes: list[Tape], step: int) -> np.ndarray:
        if step == 0:
            self._draws = [np.random.default_rng([self.seed, tape.seed, 2]) for tape in tapes]
        low, high = tapes[0].world.action_low, tapes[0].world.action_high
        return np.stack([rng.uniform(low, high) for rng in self._draws]).astype(np.float32)
