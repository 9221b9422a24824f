"""Finds the setting of a power knob at which a token costs least energy, or the fastest one that keeps to a cap.

Only real steps are measured: no step is added, repeated or changed for it. `Search` decides what to try, from what was
measured; `Tuner` turns the knob, waits until a setting has settled, measures it, and heeds the GPU's temperature.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from aurora_train.energy.meter import EnergyMeter
from aurora_train.errors import UserError
from aurora_train.machine import nvml
from aurora_train.machine.knob import Knob
from aurora_train.units import percent

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the knob's range; 1 = as found
_REFINED = 2  # settings tried between those, around the best
# Shares closer than this to one that keeps its promise, or to one that does not, teach nothing.
_NEAR, _APART = 0.04, 0.004
SETTLE_STEPS, SETTLE_SECONDS = 3, 3.0  # not measured after a turn: NVML's power is a mean of the last second
STEPS, SECONDS = 8, 12.0  # measured, at least
HOT_CELSIUS, COOL_CELSIUS = 3.0, 10.0  # below the temperature at which the GPU slows itself down
_HEAT_SECONDS, _HEAT_SHARE = 5.0, 0.25  # between two looks at the temperature; by how much the knob gives way


@dataclass(frozen=True)
class Point:
    """What a setting gave: tokens (targets) a second, and watts of all that is measured and of the GPUs alone."""

    share: float
    tokens_per_s: float
    watts: float
    gpu_watts: float

    @property
    def joules_per_token(self) -> float:
        return self.watts / self.tokens_per_s


class Search:
    """What to try next (`share`), until it is None; then `best` is the setting to keep, None if none keeps its promise.

    Args:
        max_slowdown: how much longer a step may take than at share 1.
        cap_watts: for all GPUs together: the fastest setting within it is sought, instead of the least energy.
        share_of: for a power cap, the share at which the cap is what all GPUs together draw, in watts: a cap above what
            they draw on their own changes nothing, so that part of the range is not searched.
    """

    def __init__(
        self, max_slowdown: float, cap_watts: float | None = None, share_of: Callable[[float], float] | None = None
    ):
        self._slowdown, self._cap, self._share_of = max_slowdown, cap_watts, share_of
        self._left, self._more = list(SHARES), _REFINED
        self.points: list[Point] = []
        self.share: float | None = self._left.pop(0)

    def measured(self, point: Point) -> None:
        """Take a measurement of `share`, and choose what comes next."""
        self.points.append(point)
        if len(self.points) == 1 and self._share_of is not None and point.gpu_watts > 0:
            top = min(max(self._share_of(point.gpu_watts), 0.0), 1.0)
            self._left = [top * share for share in self._left]
        if self._allowed(point) == (self._cap is not None):
            self._left = []  # a lower setting is slower still
        self._choose()

    def rejected(self) -> None:
        """The setting was too hot to be measured."""
        self._choose()

    @property
    def best(self) -> Point | None:
        allowed = [point for point in self.points if self._allowed(point)]
        if self._cap is not None:
            return max(allowed, key=lambda point: point.tokens_per_s, default=None)
        return min(allowed, key=lambda point: point.joules_per_token, default=None)

    @property
    def kept(self) -> float:
        """The share to keep: the best one's; without one the lowest for a cap, else 1."""
        if self.best is not None:
            return self.best.share
        return 1.0 if self._cap is None else min(SHARES)

    def _excess(self, point: Point) -> float:
        """By how much a setting breaks the promise; 0 or less if it keeps it."""
        if self._cap is not None:
            return point.gpu_watts - self._cap
        return self.points[0].tokens_per_s / point.tokens_per_s - (1 + self._slowdown)

    def _allowed(self, point: Point) -> bool:
        return self._excess(point) <= 0

    def _choose(self) -> None:
        if self._left:
            self.share = self._left.pop(0)
            return
        self.share, self._more = (self._between() if self._more > 0 else None), self._more - 1

    def _between(self) -> float | None:
        """A setting near the best one, where a better one may lie; None if it is next to one that was measured."""
        if self.best is None or len(self.points) < 2:
            return None
        here = self.best
        below = max((p for p in self.points if p.share < here.share), key=lambda p: p.share, default=None)
        above = min((p for p in self.points if p.share > here.share), key=lambda p: p.share, default=None)
        edge = below if self._cap is None else above
        if edge is not None and not self._allowed(edge):  # the chord lies above both curves, so this keeps the promise
            part = self._excess(here) / (self._excess(here) - self._excess(edge))
            share = here.share + part * (edge.share - here.share)
        elif self._cap is not None:
            return None
        elif below is None or above is None:
            share = (here.share + (below or above).share) / 2
        else:
            share = _vertex(below, here, above)
        if share is None or any(abs(share - p.share) <= (_NEAR if self._allowed(p) else _APART) for p in self.points):
            return None
        return share


def _vertex(*points: Point) -> float | None:
    """The share at which the parabola through three points is lowest; None if it opens downwards."""
    (x0, y0), (x1, y1), (x2, y2) = ((point.share, point.joules_per_token) for point in points)
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / (x2 - x0)
    return min(max((x0 + x1) / 2 - left / (2 * bend), x0), x2) if bend > 0 else None


class Tuner:
    """Runs in the meter's thread: `tick` after every reading. `steps` gives (steps, tokens, time, disturbances) so far.

    Args:
        knob: the knob, or None: then only the temperature is watched.
        search: what is looked for; None for a setting that is known already.
        share: that setting.
        say: takes a line for the user and the fields of an event.
    """

    def __init__(
        self, meter: EnergyMeter, gpus: list[nvml.Gpu], knob: Knob | None, search: Search | None, share: float,
        steps: Callable[[], tuple], say: Callable[..., None], clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._meter, self._gpus, self._knob, self._search, self._share = meter, gpus, knob, search, share
        self._steps, self._say, self._clock = steps, say, clock
        self._turned: tuple | None = None  # (when, steps) of the newest turn
        self._began: tuple | None = None  # where the measurement of a setting began
        self._looked, self._hot = 0.0, False
        self.lost: str | None = None  # why the knob no longer takes orders

    def tick(self) -> None:
        """Look at the temperature, turn the knob, or finish a measurement; whatever is due."""
        try:
            self._heed_heat()
            if self._knob is not None and self.lost is None:
                self._search_on() if self._search is not None else self._keep()
        except (nvml.Refused, UserError) as fault:  # or the knob's journal cannot be written
            self.lost = str(fault)
            self._search = None
            self._say(f"the GPU's knob takes no orders any more ({fault}); training goes on", "power_lost")

    def _keep(self) -> None:
        if self._turned is None:
            self._turn(self._share)
            self._say(f"{self._knob.kind} set to {self._knob.value(self._share)} a GPU", "power", share=self._share)

    def _turn(self, share: float) -> None:
        self._knob.set(share)
        self._turned, self._began = (self._clock(), self._steps()[0]), None

    def _search_on(self) -> None:
        if self._search.share is None:
            return self._end()
        if self._meter.lost():
            self._search, self._share = None, 1.0
            self._turn(1.0)
            return self._say(f"a meter is lost, so the {self._knob.kind} is as it was found", "power", share=1.0)
        steps, tokens, at, disturbed = now = self._steps()
        if steps == 0:
            return
        if self._turned is None or self._knob.share != self._search.share:
            return self._turn(self._search.share)
        when, first = self._turned
        if self._began is None or self._began[0][3] != disturbed:
            if self._began is not None:  # by a save or an evaluation: from the beginning
                self._turned, self._began = (self._clock(), steps), None
            elif steps >= first + SETTLE_STEPS and self._clock() - when >= SETTLE_SECONDS:
                self._began = (now, self._meter.now(), self._meter.gpu_joules())
            return
        (steps0, tokens0, at0, _), (read0, joules0), gpu0 = self._began
        read, joules = self._meter.now()
        if steps - steps0 < STEPS or read - read0 < SECONDS or tokens == tokens0:
            return
        seconds = read - read0
        self._search.measured(
            Point(
                self._search.share, (tokens - tokens0) / (at - at0), (joules - joules0) / seconds,
                (self._meter.gpu_joules() - gpu0) / seconds,
            )
        )  # fmt: skip

    def _end(self) -> None:
        search, best = self._search, self._search.best
        self._search, self._share = None, search.kept
        self._turn(self._share)
        first = search.points[0] if search.points else None
        tried = [
            {"set": self._knob.value(one.share), "tokens_per_s": one.tokens_per_s, "watts": one.watts,
             "joules_per_token": one.joules_per_token} for one in search.points
        ]  # fmt: skip
        where = f"{self._knob.kind} set to {self._knob.value(self._share)} a GPU"
        if best is None:
            why = "the GPU is too hot for any to be measured" if self._share else "none that was tried keeps to the cap"
            text = f"{where}: {why}"
        else:
            saved = percent(1 - best.joules_per_token / first.joules_per_token)
            slower = percent(first.tokens_per_s / best.tokens_per_s - 1)
            text = f"{where}: {saved} less energy a token, {slower} more time; {len(tried)} settings were tried"
        self._say(text, "power", share=self._share, tried=tried)

    # ---- temperature

    def _heed_heat(self) -> None:
        if self._clock() - self._looked < _HEAT_SECONDS:
            return
        self._looked = self._clock()
        room = min((room for gpu in self._gpus if (room := _headroom(gpu)) is not None), default=None)
        if room is None:
            return
        if room <= HOT_CELSIUS:
            self._cool(room)
        elif room >= COOL_CELSIUS and self._hot:
            self._hot = False
            if self._knob is not None and self.lost is None and self._search is None and self._turned is not None:
                self._turn(self._share)
            self._say("the GPU has cooled down", "cool")

    def _cool(self, room: float) -> None:
        first, self._hot = not self._hot, True
        gives_way = self._knob is not None and self.lost is None and self._turned is not None
        if gives_way and self._search is not None and self._search.share is not None:
            self._search.rejected()
        elif gives_way and self._knob.share > 0:
            self._turn(max(self._knob.share - _HEAT_SHARE, 0.0))
        if first:
            what = f"; the {self._knob.kind} gives way" if gives_way else ""
            self._say(f"the GPU is {room:.0f} C below the temperature at which it slows itself down{what}", "hot")


def _headroom(gpu: nvml.Gpu) -> float | None:
    try:
        return gpu.headroom_celsius()
    except nvml.Refused:
        return None
