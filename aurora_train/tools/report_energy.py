"""The report's figure and section of energy: what was measured, by what, what it covers, and what it cost."""

from __future__ import annotations

from aurora_train.tools.recorded import Recorded
from aurora_train.tools.report_page import facts, section, table
from aurora_train.units import count, duration, energy


def energy_used(held: Recorded) -> str | None:
    """The energy of the run in all its processes, as of its newest record; None if none is recorded."""
    joules = _total(held)
    return None if joules is None else energy(joules)


def energy_section(held: Recorded) -> str:
    """The section; it says "not measured" where nothing was."""
    joules, ended = _total(held), _ended(held)
    if joules is None:
        return section("Energy", "<p>not measured</p>\n")
    newest = ended or _newest(held) or {}
    shown = {"energy, all resumes together": energy(joules)}
    shown |= {name: f"{newest[key]:.3g}{unit}" for name, key, unit in (("cost", "cost", ""), ("CO2", "co2_g", " g"))
              if newest.get(key) is not None}  # fmt: skip
    if held.targets and ended and any("tokens_per_joule" in record for record in held.steps):
        shown["targets per joule, all of the run"] = count(held.targets / joules)
    rows = [
        [one["name"], one["method"], one["coverage"], energy(one["joules"]), f"{one['error_joules']:.3g} J",
         duration(one["gap_seconds"]) if one["gap_seconds"] else ""] for one in (ended or {}).get("sources", [])
    ]  # fmt: skip
    columns = ["source, last process", "method", "covers", "measured", "sampling error, at most", "not measured for"]
    return section("Energy", facts(shown), table(columns, rows) if rows else "")


def _ended(held: Recorded) -> dict | None:
    """The record at the end of the newest process that ended in order."""
    return next((e["energy"] for e in reversed(held.events) if isinstance(e.get("energy"), dict)), None)


def _newest(held: Recorded) -> dict | None:
    return next((record for record in reversed(held.steps) if "total_joules" in record), None)


def _total(held: Recorded) -> float | None:
    known = [record["total_joules"] for record in (_ended(held), _newest(held)) if record]
    # Until December 2026 each process recorded its own part.
    apart = [event["energy_joules"] for event in held.events if event.get("energy_joules") is not None]
    return max(known) if known else sum(apart) if apart else None
