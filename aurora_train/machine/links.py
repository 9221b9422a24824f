"""How fast devices reach each other: inside a box and between boxes, by the table of machines or as it was measured.

Rates are one way, into one device, while all of them communicate. `aurora launch` measures the network before it starts
a run and passes the rate on; otherwise machines.toml says what the cables and switches of a known machine can do, of
which collectives are assumed to reach a share.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from aurora_train.errors import UserError
from aurora_train.machine.table import KnownMachine
from aurora_train.units import percent, size

MEASURED = "AURORA_NETWORK_RATE"  # bytes/s into each process, all at once, as `aurora launch` measured it
_SHARE = 0.8  # of a link's nominal rate that large collectives reach; not measured on these machines


@dataclass(frozen=True)
class Links:
    """bytes/s one way into a device: `inside` from the others of its box, `between` from another box; None if unknown.

    `per_box`: devices of a box, which are numbered box by box. `source`: where the rates are from, in words.
    """

    inside: float | None
    between: float | None
    per_box: int
    source: str

    def rate(self, stride: int, count: int) -> float | None:
        """The rate within groups of `count` devices that lie `stride` apart."""
        return self.between if self.per_box % (stride * count) else self.inside

    def describe(self) -> str:
        """One line for people."""
        if self.inside is None and self.between is None:
            return f"{self.source}; meshes are ranked by the bytes that they move"
        inside = f"{size(self.inside)}/s inside a box" if self.per_box > 1 and self.inside else ""
        between = f"{size(self.between)}/s between boxes" if self.between else ""
        return f"{', '.join(one for one in (inside, between) if one)} ({self.source})"


def links_of(
    row: KnownMachine | None, devices: int, per_box: int | None = None, per_process: int | None = None
) -> Links:
    """The links of so many devices of a known machine, `per_box` of them in a box: by default as many as it is sold
    with. `per_process`: devices of a process of this run, which share what was measured for it; None for a plan."""
    per_box = min(per_box or (row and row.per_box) or devices, devices)
    measured = per_process and _measured()
    inside, between = (row.peers or row.link, row.network) if row else (None, None)
    rates = [figure and _SHARE * figure.value for figure in (inside, between)]
    crossed = (inside, per_box > 1), (between, per_box < devices)
    used = [figure.source for figure, is_crossed in crossed if figure and is_crossed]
    said = [f"{percent(_SHARE)} of {' and of '.join(used)}, assumed"] if used else []
    if measured and per_box < devices:
        rates[1], said = measured / per_process, [f"{percent(_SHARE)} of {inside.source}, assumed"] if inside else []
        said.append("between boxes as measured by TCP at the start")
    elif measured and inside is None:
        rates[0], said = measured / per_process, ["as measured by TCP at the start"]
    return Links(*rates, per_box, "; ".join(said) or "no rate of these links is known")


def _measured() -> float | None:
    written = os.environ.get(MEASURED)
    if not written:
        return None
    try:
        rate = float(written)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise UserError(f"{MEASURED}={written!r} is no rate", where="environment", hint="bytes/s, such as 2.5e9")
    return rate
