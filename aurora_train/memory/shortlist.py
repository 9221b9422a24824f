"""Which plan to compile next: the one that may be expected to save most.

An expectation is the estimate, plus what the nearest compiled plan taught of it. A plan's promise is what it saves
over the best one known, times the chance that it fits; the chance is a normal tail whose spread shrinks beside a plan
that was compiled (the acquisition function of Schonlau, Welch, Jones 1998: improvement under a constraint).
"""

from __future__ import annotations

import math

import numpy as np

from aurora_train.memory.search import Candidate, preference

SPREAD = 0.03  # of the budget: the standard error of an estimate where nothing was compiled yet
CLOSE = 0.003  # the same right beside a plan that was compiled
FAR = 0.25  # the distance from it at which an estimate errs as much as anywhere
LEAST_CHANCE = 0.03  # of fitting, that a plan must have to be worth a compilation
CUT = 0.02  # the distance between plans of as many segments and plans of more

_erfc = np.vectorize(math.erfc, otypes=[float])


class Shortlist:
    """All candidates of one search. `budget` in bytes on one device."""

    def __init__(self, candidates: list[Candidate], budget: int):
        self.candidates, self.budget = candidates, budget
        self._index = {id(c): i for i, c in enumerate(candidates)}
        self._bytes = np.array([c.bytes for c in candidates], np.int64)
        self._seconds = np.array([c.seconds for c in candidates])
        self._depth = np.log([c.microbatch for c in candidates])
        self._segments = np.array([c.segments for c in candidates])
        self._short: dict[int, int] = {}  # compiled plan -> bytes by which the estimate fell short
        self._expected = self._bytes

    def learn(self, candidate: Candidate, compiled: int) -> None:
        """The compiled bytes of one plan correct those of the plans near it."""
        self._short[self._index[id(candidate)]] = compiled - candidate.bytes
        nearest = np.argmin([self._distances(place) for place in self._short], axis=0)
        self._expected = self._bytes + np.array(list(self._short.values()), np.int64)[nearest]

    def expected(self, candidate: Candidate) -> int:
        """Bytes that a plan may be expected to need."""
        return int(self._expected[self._index[id(candidate)]])

    def is_compiled(self, candidate: Candidate) -> bool:
        return self._index[id(candidate)] in self._short

    def smallest(self) -> Candidate:
        """Of fewest bytes."""
        return self.candidates[int(np.argmin(self._expected))]

    def most_promising(self, best: Candidate | None, sure: float = 0.0) -> Candidate | None:
        """What to compile next, beside the best that is known to fit. None where nothing is expected to fit and save.

        Only plans that fit with a chance of at least `sure` count, and none that was compiled.
        """
        chance = self._chance()
        counts = chance >= max(sure, LEAST_CHANCE)
        counts[list(self._short)] = False
        if best is not None:
            counts &= self._seconds < best.seconds
        if not counts.any():
            return None
        promise = np.where(counts, (self._dearest(best) - self._seconds) * chance, -1.0)
        top = np.flatnonzero(promise >= promise.max() * (1 - 1e-12))
        return min((self.candidates[i] for i in top), key=preference)

    def promise(self, candidate: Candidate, best: Candidate) -> float:
        """Seconds a step that compiling a plan may be expected to save."""
        place = self._index[id(candidate)]
        return float((best.seconds - candidate.seconds) * self._chance()[place])

    def _dearest(self, best: Candidate | None) -> float:
        return best.seconds if best is not None else 1.01 * float(self._seconds.max())

    def _chance(self) -> np.ndarray:
        """That a plan fits."""
        room = self.budget - self._expected
        return _erfc(-room / self._spread() / math.sqrt(2)) / 2

    def _spread(self) -> np.ndarray | float:
        """Standard error of an estimate, in bytes."""
        if not self._short:
            return SPREAD * self.budget
        near = np.min([self._distances(place) for place in self._short], axis=0)
        worst = max(SPREAD * self.budget, max(map(abs, self._short.values())) / 2)
        return CLOSE * self.budget + worst * np.minimum(near / FAR, 1)

    def _distances(self, place: int) -> np.ndarray:
        """From one plan to each: of one microbatch first, then of similar bytes, then of as many segments."""
        return (
            np.abs(self._depth - self._depth[place])
            + np.abs(self._bytes - self._bytes[place]) / self._bytes[place]
            + CUT * (self._segments != self._segments[place])
        )
