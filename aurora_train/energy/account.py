"""A run's energy: what it has used over all its resumes, what that costs, and what the config's `energy` section asks.

The loop calls `step` after each step, `measure` where it logs, `disturbed` after what is not training, and asks
`asked` and `rest_seconds` between steps. Meters and knob are served by the meter's own thread (`energy/meter.py`), so
that a step pays for a few additions. The batch and the maths are never touched.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import datetime

from aurora_train.energy.meter import GPU, EnergyMeter, Source, in_words, sources
from aurora_train.energy.tuner import Search, Tuner
from aurora_train.errors import UserError
from aurora_train.machine import knob, nvml, processes
from aurora_train.record import metrics as logs
from aurora_train.units import decimal

BUDGET = "energy.budget_kwh"  # the first line of the reason for such a stop
_JOULES_PER_KWH = 3.6e6
_CLOCK_SECONDS = 1.0  # between two looks at the clock
_NO_METER = (
    "no meter: an NVIDIA GPU (pip install 'aurora_train[energy]'), RAPL (which Linux lets root read), or a wall plug "
    "(energy.plug)"
)


class Energy:
    """Context manager around a process's part of a run; on leaving it, the knob is as it was found.

    Raises UserError on entering, for a budget that is spent or cannot be measured, and for a plug without a reading.
    """

    def __init__(self, setting, run):
        self._setting, self._before = setting, spent_before(run)
        self._says: deque = deque()  # (line, event, fields), from any thread, until the loop says them
        self._done = (0, 0.0, 0.0, 0)  # steps, tokens, when the last one was recorded, disturbances
        self._gpus: list[nvml.Gpu] = []
        self._knob: knob.Knob | None = None
        self._meter = EnergyMeter([])
        self._tuner: Tuner | None = None
        self._missed: set[str] = set()  # the sources of which it was said that they are lost
        self._next_look = 0.0  # at the clock, for `hours`
        self._logged = (0.0, 0.0, 0, 0.0)  # when read, joules, steps and tokens at the last log point

    def __enter__(self) -> Energy:
        for line in knob.restore_left():
            self._says.append((line, "power_restored", {}))
        self._gpus, why = nvml.gpus()
        self._meter = EnergyMeter(sources(self._gpus, self._setting.plug), self._tick)
        self._refuse(why)
        try:
            self._tuner = self._tuned()
        except UserError:
            self.__exit__()
            raise
        self._meter.start()
        return self

    def __exit__(self, *exc) -> None:
        self._meter.close()
        if self._knob is not None:
            self._knob.release()

    def begin(self, voice, step: int) -> None:
        """Say what is measured. Steps are about to be taken; after running out of memory, once more."""
        if self._meter.sources:
            steps, tokens, *_ = self._done
            self._logged = (*self._meter.now(), steps, tokens)
            text = f"energy: {in_words(self._meter.counted)}"
            kept = [source.describe() for source in self._meter.sources]
            voice(text, "meter", step, total_joules=round(self._before + self._logged[1], 3), sources=kept)
        self._say(voice, step)

    def step(self, tokens: float, voice, step: int) -> None:
        """Count a finished step, and say what there is to say."""
        steps, before, _, disturbed = self._done
        self._done = (steps + 1, before + tokens, time.monotonic(), disturbed)
        if self._says:
            self._say(voice, step)

    def disturbed(self) -> None:
        """What is not training has taken time: a measurement that it fell into begins again."""
        steps, tokens, at, disturbed = self._done
        self._done = (steps, tokens, at, disturbed + 1)

    def measure(self, tokens_per_s: float | None) -> dict:
        """The fields of a record at a log point; {} if nothing is measured.

        `total_joules` is the run's, over all resumes, saves and evaluations included. The others are of the interval
        since the last log point: mean power, and from it and the rate of the steps the joules of a step and of a token,
        which a run of several processes lacks: this one's meters need not cover what the others use.
        """
        if not self._meter.sources:
            return {}
        (read, joules), (steps, tokens, *_) = self._meter.now(), self._done
        read0, joules0, steps0, tokens0 = self._logged
        fields = {"total_joules": round(self._before + joules, 3), **self._money(self._before + joules)}
        if read <= read0 or steps == steps0 or self._meter.lost():
            return fields  # no new reading yet, or not of everything: a rate of it would be false
        self._logged = (read, joules, steps, tokens)
        watts = (joules - joules0) / (read - read0)
        fields["watts"] = round(watts, 3)
        if tokens_per_s and watts > 0 and processes.count() == 1:
            fields["tokens_per_joule"] = tokens_per_s / watts
            fields["joules_per_step"] = (tokens - tokens0) / (steps - steps0) * watts / tokens_per_s
        return fields

    def summary(self) -> dict | None:
        """What is on record at the end of a process and in every checkpoint; None if nothing is measured."""
        if not self._meter.sources:
            return None
        total = self._before + self._meter.now()[1]
        kept = [source.describe() for source in self._meter.sources]
        return {"total_joules": round(total, 3), "kwh": total / _JOULES_PER_KWH, **self._money(total), "sources": kept}

    def asked(self) -> str | None:
        """Why the run has to stop now, or None."""
        budget = self._setting.budget_kwh
        if budget is None:
            return None
        spent = (self._before + self._meter.now()[1]) / _JOULES_PER_KWH
        return f"{BUDGET}\n  {_spent(spent, budget)}" if spent >= budget else None

    def rest_seconds(self) -> float:
        """How long training has to wait by now (`energy.hours`)."""
        if self._setting.hours is None or time.monotonic() < self._next_look:
            return 0.0
        seconds = self._setting.seconds_to_wait(datetime.now())
        self._next_look = 0.0 if seconds else time.monotonic() + _CLOCK_SECONDS
        return seconds

    @property
    def hours(self) -> str | None:
        """When training may run, as the config says it."""
        return self._setting.hours

    # ---- inside

    def _money(self, joules: float) -> dict:
        kwh, price, co2 = joules / _JOULES_PER_KWH, self._setting.price_per_kwh, self._setting.co2
        cost = {} if price is None else {"cost": kwh * price}
        return cost | ({} if co2 is None else {"co2_g": kwh * co2})

    def _refuse(self, why: str | None) -> None:
        setting, budget = self._setting, self._setting.budget_kwh
        if processes.count() > 1 and (setting.mode != "measure" or setting.hours):
            raise UserError(
                "it works in a run of one process only", where="energy.hours" if setting.hours else "energy.mode",
                why="each process would slow down the others", hint="energy.mode=measure energy.hours=null",
            )  # fmt: skip
        if budget is None:
            return
        if not self._meter.sources:
            raise UserError(
                "the energy of this run cannot be measured here", where=BUDGET, why=why or _NO_METER,
                hint="energy.plug=FILE, or energy.budget_kwh=null",
            )  # fmt: skip
        spent = self._before / _JOULES_PER_KWH
        if spent >= budget:
            more = "a larger budget, as in `aurora resume RUN energy.budget_kwh=N`"
            raise UserError(_spent(spent, budget), where=BUDGET, hint=more)

    def _tuned(self) -> Tuner:
        """The tuner that the mode asks for; without a knob, one that only watches the temperature."""
        search, share, mode = None, 1.0, self._setting.mode
        if mode != "measure":
            self._knob, why = knob.hold(self._gpus)
            if self._knob is not None and not self._meter.sources:  # nor is there a thread that would turn it
                self._knob.release()
                self._knob, why = None, "no energy is measured"
            if self._knob is None:
                self._says.append((f"energy.mode={mode} turns nothing: {why}", "power", {}))
            elif mode == "cap":
                search, share = self._capped()
            else:
                search = Search(self._setting.max_slowdown, share_of=self._knob.share_of_draw())
        return Tuner(
            self._meter, self._gpus, self._knob, search, share, steps=lambda: self._done,
            say=lambda text, event, **fields: self._says.append((text, event, fields)),
        )  # fmt: skip

    def _capped(self) -> tuple[Search | None, float]:
        cap, held = self._setting.cap_watts, self._knob
        if held.kind == knob.CLOCK_LOCK:
            if not any(source.coverage == GPU for source in self._meter.sources):
                raise UserError("the GPU's power cannot be read, so no clock can be found that keeps to it",
                                where="energy.cap_watts", hint="energy.mode=measure")  # fmt: skip
            return Search(self._setting.max_slowdown, cap_watts=cap * len(self._gpus)), 1.0
        share = held.share_of(cap)
        if share < 0:
            raise UserError(f"the GPU takes no cap below {held.value(0)}", where="energy.cap_watts",
                            hint=f"energy.cap_watts={float(held.value(0).split()[0]):.0f}")  # fmt: skip
        if share > 1:
            self._says.append((f"the power cap stays at {held.value(1)}, which is below energy.cap_watts", "power", {}))
        return None, min(share, 1.0)

    def _tick(self) -> None:
        if self._tuner is not None:
            self._tuner.tick()
        lost = {source.name: source for source in self._meter.lost()}
        for name in lost.keys() - self._missed:
            self._says.append(_lost(lost[name]))
        for name in self._missed - lost.keys():
            self._says.append((f"energy: {name} is measured again", "meter_back", {"name": name}))
        self._missed = set(lost)

    def _say(self, voice, step: int) -> None:
        while self._says:
            text, event, fields = self._says.popleft()
            voice(text, event, step, **fields)


def spent_before(run) -> float:
    """Joules that a run has used so far, as its records say; the steps that a kill has lost are among them."""
    known = [logs.newest(path, "total_joules") for path in (run.metrics, run.metrics_set_aside, run.events)]
    ended = logs.newest(run.events, "energy")
    return max([0.0, *(record["total_joules"] for record in known if record), *(_of_event(ended))])


def _of_event(event: dict | None) -> list[float]:
    energy = event.get("energy") if event else None
    return [energy["total_joules"]] if isinstance(energy, dict) else []


def _lost(source: Source) -> tuple[str, str, dict]:
    return (
        f"energy: {source.name} is not measured from now on: {source.fault}", "meter_lost",
        {"name": source.name, "why": source.fault},
    )  # fmt: skip


def _spent(spent: float, budget: float) -> str:
    return f"{decimal(spent)} of {decimal(budget)} kWh are spent"
