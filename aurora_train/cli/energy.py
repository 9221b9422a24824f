"""`aurora energy`: what measures the energy of runs here, and what a run that was killed has left turned."""

from __future__ import annotations

from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, print_json

EXAMPLE = "aurora energy --restore"
_WHAT_WOULD = "  root can read the processor's counter (RAPL), where there is one; a wall plug is given by --plug FILE"


def command(
    plug: Annotated[
        str | None, typer.Option("--plug", metavar="FILE|command:...", help="A wall plug, as energy.plug.")
    ] = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="Only set back the power caps and clocks that killed runs have left.")
    ] = False,
    json: JsonOption = False,
):
    """Show what measures energy here, what it covers, how far off it may be, and the knob for power."""
    from aurora_train.energy.meter import sources
    from aurora_train.machine import knob, nvml

    restored = knob.restore_left()
    if restore:
        found = {"restored": restored}
    else:
        gpus, why = nvml.gpus()
        measured = [source.describe() for source in sources(gpus, plug)]
        found = {"sources": measured, "knobs": [_knob(gpu) for gpu in gpus], "no_gpu": why, "restored": restored}
    if json:
        print_json(found)
    else:
        for line in [*restored, *([] if restore else _lines(found))]:
            print(line)


def _knob(gpu) -> dict:
    from aurora_train.machine import knob, nvml

    try:
        kind, low, high = knob.range_of(gpu)
    except nvml.Refused as fault:
        return {"gpu": gpu.name, "kind": None, "why": str(fault)}
    return {"gpu": gpu.name, "kind": kind, "from": low, "to": high, "unit": knob.UNITS[kind]}


def _lines(found: dict) -> list[str]:
    lines = [f"{one['name']}: {one['method']}; covers the {one['coverage']}" for one in found["sources"]]
    if not lines:
        lines = [f"energy is not measured here: {found['no_gpu'] or 'no meter can be read'}", _WHAT_WOULD]
    for one in found["knobs"]:
        what = "{kind}, {from:.0f} to {to:.0f} {unit}".format(**one) if one["kind"] else f"none ({one['why']})"
        lines.append(f"{one['gpu']}: knob: {what}")
    return lines
