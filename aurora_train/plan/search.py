"""Enumerates plans by an additive model: a base for each microbatch, plus what every unit keeps.

    peak(m, cuts) = rest(m) + all that units keep + all their gradients

`rest(m)` comes from `plan/estimate.py`. Upgrades of the save-set are taken in the order of seconds saved per byte
along the convex hull of each stack. The last upgrade is applied to as many units as still fit, or replaced by an
intermediate save-set for all units. So a stack has at most two segments, and the one that keeps more comes last,
because its residuals are freed first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from aurora_train.nn.stack import Segment
from aurora_train.plan.residuals import Score

SHORTEST = 2  # least units in a segment: a loop of one iteration is inlined, which may change bits


class Costs(NamedTuple):
    """Seconds per unit of work. For an unknown machine they are relative and only rank plans."""

    per_flop: float
    per_byte: float
    per_microbatch: float
    per_offloaded: float = 0.0  # a byte moved to the processor's memory and back, while nothing else runs


@dataclass
class StackCosts:
    """One stack. Scores are per unit and example; `gradient` is bytes per unit."""

    path: str
    units: int
    scores: list[Score]
    gradient: int

    def front(self, costs: Costs) -> list[Score]:
        """The save-sets that no other beats in both size and speed, by rising bytes."""
        out: list[Score] = []
        for point in sorted(self.scores, key=lambda s: (s.saved_bytes, seconds_of(s, costs))):
            if not out or seconds_of(point, costs) < seconds_of(out[-1], costs):
                out.append(point)
        return out

    def hull(self, costs: Costs) -> list[Score]:
        """The lower convex hull of (bytes, seconds), by rising bytes."""
        hull: list[Score] = []
        for point in self.front(costs):
            while len(hull) >= 2 and _slope(hull[-2], point, costs) <= _slope(hull[-2], hull[-1], costs):
                hull.pop()
            hull.append(point)
        return hull


def seconds_of(score: Score, costs: Costs) -> float:
    """Seconds to recompute one unit for one example and to move what it offloads."""
    again = score.flops * costs.per_flop + score.moved_bytes * costs.per_byte
    return again + score.offloaded_bytes * costs.per_offloaded


def _slope(low: Score, high: Score, costs: Costs) -> float:
    return (seconds_of(high, costs) - seconds_of(low, costs)) / max(high.saved_bytes - low.saved_bytes, 1)


@dataclass
class Candidate:
    """`microbatch` in examples over all devices. `seconds`: recomputation and overhead of one step.

    `host`: bytes in the processor's memory for one device.
    """

    microbatch: int
    accumulation: int
    cuts: dict[str, list[tuple[int, int, Score]]]
    bytes: int
    seconds: float
    flops: int
    host: int = 0

    @property
    def segments(self) -> int:
        """Number of segments in all stacks together, which affects the error of the additive model."""
        return sum(len(cut) for cut in self.cuts.values())

    def stacks(self) -> dict[str, list[Segment]]:
        """The cuts as a Plan stores them."""
        return {
            path: [Segment(a, b, score.save, offload=score.offload) for a, b, score in cut]
            for path, cut in self.cuts.items()
        }

    @property
    def key(self) -> tuple:
        """A key that identifies the candidate."""
        return self.microbatch, tuple((path, tuple(cut)) for path, cut in self.stacks().items())


class Space:
    """All plans of one step. `rest(m)` in bytes for a microbatch of m examples on each device."""

    def __init__(self, stacks: list[StackCosts], microbatches: list[tuple[int, int]], devices: int, costs: Costs, rest):
        self.stacks, self.microbatches, self.devices, self.costs, self.rest = stacks, microbatches, devices, costs, rest
        self.hulls = {stack.path: stack.hull(costs) for stack in stacks}

    def peak(self, microbatch: int, cuts) -> int:
        """Bytes of the additive model on one device."""
        local = max(microbatch // self.devices, 1)
        kept = sum(
            (b - a) * (score.saved_bytes * local + stack.gradient)
            for stack in self.stacks
            for a, b, score in cuts[stack.path]
        )
        return int(self.rest(local) + kept)

    def candidate(self, microbatch: int, accumulation: int, cuts) -> Candidate:
        """A plan with its cost."""
        seconds, flops = accumulation * self.costs.per_microbatch, 0
        for stack in self.stacks:
            for a, b, score in cuts[stack.path]:
                seconds += accumulation * microbatch / self.devices * (b - a) * seconds_of(score, self.costs)
                flops += accumulation * microbatch * (b - a) * score.flops
        local = max(microbatch // self.devices, 1)
        host = sum((b - a) * score.offloaded_bytes * local for cut in cuts.values() for a, b, score in cut)
        return Candidate(microbatch, accumulation, cuts, self.peak(microbatch, cuts), seconds, flops, host)

    def steps(self, microbatch: int, accumulation: int):
        """Candidates of one microbatch, from the least memory to the most, each a whole or a partial upgrade."""
        cuts = {stack.path: [(0, stack.units, self.hulls[stack.path][0])] for stack in self.stacks}
        yield self.candidate(microbatch, accumulation, dict(cuts))
        upgrades = sorted(
            (
                (_slope(low, high, self.costs), number, stack)
                for stack in self.stacks
                for number, (low, high) in enumerate(zip(self.hulls[stack.path], self.hulls[stack.path][1:]))  # noqa: B905
            ),
            key=lambda upgrade: (upgrade[0], upgrade[1]),
        )
        for _, number, stack in upgrades:
            low, high = self.hulls[stack.path][number : number + 2]
            for units in range(SHORTEST, stack.units - SHORTEST + 1):
                cut = stack.units - units
                cuts[stack.path] = [(0, cut, low), (cut, stack.units, high)]
                yield self.candidate(microbatch, accumulation, dict(cuts))
            for between in self._between(stack, low, high):
                cuts[stack.path] = [(0, stack.units, between)]
                yield self.candidate(microbatch, accumulation, dict(cuts))
            cuts[stack.path] = [(0, stack.units, high)]
            yield self.candidate(microbatch, accumulation, dict(cuts))

    def _between(self, stack: StackCosts, low: Score, high: Score) -> list[Score]:
        """Save-sets off the hull: a whole stack of one may fit although no cut between its neighbours does."""
        front = stack.front(self.costs)
        return [s for s in front if low.saved_bytes < s.saved_bytes < high.saved_bytes]

    def all(self) -> list[Candidate]:
        """Every candidate of every microbatch."""
        return [c for m, accumulation in self.microbatches for c in self.steps(m, accumulation)]


def cheapest(candidates: list[Candidate], budget: float, corrected) -> Candidate | None:
    """The best candidate, by `preference`, whose corrected bytes are within the budget; None if there is none."""
    fitting = [c for c in candidates if corrected(c) <= budget]
    return min(fitting, key=preference, default=None)


def preference(candidate: Candidate) -> tuple:
    """Sort key: the fastest first; among equals, the one with larger microbatches, then the one of fewer bytes."""
    return candidate.seconds, -candidate.microbatch, candidate.bytes


def next_faster(candidates: list[Candidate], chosen: Candidate, corrected) -> Candidate | None:
    """The smallest of the plans that are faster than the chosen one; None if there is none."""
    faster = [c for c in candidates if c.seconds < chosen.seconds * (1 - 1e-9) and corrected(c) > corrected(chosen)]
    return min(faster, key=lambda c: (corrected(c), c.seconds), default=None)
