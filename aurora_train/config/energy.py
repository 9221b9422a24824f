"""The `energy` section: how the run's power is measured, what it costs, and what the run may do about it.

Nothing here affects the numbers, so every key is `free`. The CO2 of a region comes from regions.toml beside this file.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from aurora_train.config.fields import Section, setting
from aurora_train.errors import UserError, nearest

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)\Z")


class Energy(Section):
    """The energy of a run. Modes other than `measure` turn the GPU's power cap, or lock its clock; they need root."""

    mode: Literal["measure", "least", "cap"] = setting(
        "measure", resume="free",
        help="least = find the power cap (or clock) at which a token costs least energy; cap = keep to cap_watts",
    )
    cap_watts: float | None = setting(None, resume="free", gt=0, help="with mode cap: the most that a GPU may draw")
    max_slowdown: float = setting(
        0.1, resume="free", ge=0, lt=1, help="with mode least: how much longer a step may take, as a share"
    )
    budget_kwh: float | None = setting(
        None, resume="free", gt=0, help="save and stop when the run has used this much, all resumes together"
    )
    hours: str | None = setting(
        None, resume="free",
        help="train only between these times of the local clock, as in 22:00-06:00; outside, save and pause",
    )
    plug: str | None = setting(
        None, resume="free", path_unless=("command:",),
        help="a wall plug with a meter: a file, or `command:` and a command, that gives watts",
    )
    price_per_kwh: float | None = setting(None, resume="free", ge=0, help="in your currency, for the cost of the run")
    region: str | None = setting(
        None, resume="free", help="country (ISO 3166 code of three letters) whose yearly mean gives the CO2 of the run"
    )
    co2_g_per_kwh: float | None = setting(
        None, resume="free", ge=0, help="CO2 of your electricity, in grams, in place of a region's"
    )

    @field_validator("hours")
    @classmethod
    def _are_two_times(cls, value):
        if value is not None and (not (match := _HOURS.match(value)) or match[1] + match[2] == match[3] + match[4]):
            raise ValueError("must be two different times of the day, such as 22:00-06:00")
        return value

    @field_validator("region")
    @classmethod
    def _is_known(cls, value):
        if value is not None and value not in regions():
            named = [code for code, row in regions().items() if row["name"].upper().startswith(value.upper())]
            hint = nearest(value.upper(), regions(), "such as DEU or USA; or give energy.co2_g_per_kwh")
            hint = f"did you mean `{named[0]}` ({regions()[named[0]]['name']})?" if len(named) == 1 else hint
            raise ValueError(f"must be the code of three letters of a country: {hint}")
        return value

    def conflicts(self, config) -> Iterator[UserError]:
        if self.mode == "cap" and self.cap_watts is None:
            yield UserError(
                "mode cap has no cap to keep to", where="energy.mode",
                hint="energy.cap_watts=250, or energy.mode=least, which finds one",
            )  # fmt: skip
        if self.mode != "cap" and self.cap_watts is not None:
            yield UserError(
                f"it applies to mode cap only, and the mode is {self.mode}", where="energy.cap_watts",
                hint="energy.mode=cap, or energy.cap_watts=null",
            )  # fmt: skip
        if self.region is not None and self.co2_g_per_kwh is not None:
            yield UserError(
                "the CO2 of a kWh is given twice", where="energy.co2_g_per_kwh",
                why=f"energy.region={self.region} means {regions()[self.region]['co2_g_per_kwh']} g",
                hint="keep one of the two",
            )  # fmt: skip

    @property
    def co2(self) -> float | None:
        """Grams of CO2 for a kWh, or None if nobody has said where the electricity comes from."""
        return self.co2_g_per_kwh if self.region is None else regions()[self.region]["co2_g_per_kwh"]

    def seconds_to_wait(self, now: datetime) -> float:
        """How long from now, on the local clock, until training may go on; 0 within `hours`."""
        if self.hours is None:
            return 0.0
        began, ends = ((int(hour), int(minute)) for hour, minute in (one.split(":") for one in self.hours.split("-")))
        time = (now.hour, now.minute)
        inside = began <= time < ends if began < ends else time >= began or time < ends
        if inside:
            return 0.0
        start = now.replace(hour=began[0], minute=began[1], second=0, microsecond=0)
        return (start + timedelta(days=start <= now) - now).total_seconds()


@cache
def regions() -> dict[str, dict]:
    """{code: {"name", "co2_g_per_kwh", "year"}}"""
    return tomllib.loads((Path(__file__).parent / "regions.toml").read_text())
