"""Chooses the plan to compile next: the one with the largest expected saving.

A plan's expected bytes are its estimate plus the error of the nearest compiled plan's estimate. Its promise is the time
it saves over the best known plan, times the probability that it fits. That probability is a normal tail whose spread
shrinks near a compiled plan (the acquisition function of Schonlau, Welch, Jones 1998: improvement under a constraint).
"""

from __future__ import annotations

import math

import numpy as np

from aurora_train.plan.search import Candidate, preference

SPREAD = 0.03  # standard error of an estimate, as a share of the budget, before anything is compiled
CLOSE = 0.003  # the same in the immediate neighbourhood of a compiled plan
FAR = 0.25  # distance from a compiled plan beyond which an estimate gains nothing from it
LEAST_CHANCE = 0.03  # least probability of fitting that makes a plan worth a compilation
CUT = 0.02  # distance between plans that differ in their number of segments

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
        self._short: dict[int, int] = {}  # compiled plan -> bytes by which its estimate was too low
        self._expected = self._bytes

    def learn(self, candidate: Candidate, compiled: int) -> None:
        """Correct the expected bytes of the plans near a compiled one."""
        self._short[self._index[id(candidate)]] = compiled - candidate.bytes
        nearest = np.argmin([self._distances(place) for place in self._short], axis=0)
        self._expected = self._bytes + np.array(list(self._short.values()), np.int64)[nearest]

    def expected(self, candidate: Candidate) -> int:
        """Bytes that a plan is expected to need."""
        return int(self._expected[self._index[id(candidate)]])

    def is_compiled(self, candidate: Candidate) -> bool:
        return self._index[id(candidate)] in self._short

    def smallest(self) -> Candidate:
        """The candidate with the fewest expected bytes."""
        return self.candidates[int(np.argmin(self._expected))]

    def most_promising(self, best: Candidate | None, sure: float = 0.0) -> Candidate | None:
        """The plan to compile next, given the best that is known to fit; None if none is expected to fit and be faster.

        Only plans that fit with a probability of at least `sure` and have not been compiled are considered.
        """
        chance = self._chance()
        counts = chance >= max(sure, LEAST_CHANCE)
        counts[list(self._short)] = False
        if best is not None:
            counts &= self._seconds < best.seconds
        if not counts.any():
            return None
        promise = np.where(counts, (self._seconds_to_beat(best) - self._seconds) * chance, -1.0)
        top = np.flatnonzero(promise >= promise.max() * (1 - 1e-12))
        return min((self.candidates[i] for i in top), key=preference)

    def promise(self, candidate: Candidate, best: Candidate) -> float:
        """Expected seconds per step that compiling a plan saves."""
        place = self._index[id(candidate)]
        return float((best.seconds - candidate.seconds) * self._chance()[place])

    def _seconds_to_beat(self, best: Candidate | None) -> float:
        return best.seconds if best is not None else 1.01 * float(self._seconds.max())

    def _chance(self) -> np.ndarray:
        """The probability that each plan fits."""
        room = self.budget - self._expected
        return _erfc(-room / self._spread() / math.sqrt(2)) / 2

    def _spread(self) -> np.ndarray | float:
        """The standard error of each estimate, in bytes."""
        if not self._short:
            return SPREAD * self.budget
        near = np.min([self._distances(place) for place in self._short], axis=0)
        worst = max(SPREAD * self.budget, max(map(abs, self._short.values())) / 2)
        return CLOSE * self.budget + worst * np.minimum(near / FAR, 1)

    def _distances(self, place: int) -> np.ndarray:
        """Distances from one plan to all: by microbatch first, then by bytes, then by the number of segments."""
        return (
            np.abs(self._depth - self._depth[place])
            + np.abs(self._bytes - self._bytes[place]) / self._bytes[place]
            + CUT * (self._segments != self._segments[place])
        )
