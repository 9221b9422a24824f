"""The speed of a device: measured once by `aurora doctor --calibrate` and stored per kind of device, or assumed.

The planner turns FLOPs and bytes into seconds with these rates. It uses a measurement of this kind of device if there
is one; otherwise the table's peak times a share that was reached elsewhere, marked as assumed; otherwise it gives no
times.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from aurora_train.errors import UserError
from aurora_train.files import cache_folder, write_json
from aurora_train.machine.profile import cpu_cores, cpu_model
from aurora_train.machine.table import Figure, KnownMachine, lookup
from aurora_train.units import percent, size


@dataclass(frozen=True)
class Rates:
    """One device. `matmul`: dtype name -> FLOP/s of large products; `bandwidth`: bytes/s read and written together.

    `per_microbatch_seconds`: the overhead of one more microbatch: a loop iteration of some 32 small dependent
    products. `link`: bytes/s to or from the processor's memory, one way; None if memory is shared.
    `source`: "measured" or "assumed"; `note`: the origin in words; `date`: ISO, or "".
    """

    matmul: dict[str, float]
    bandwidth: float
    per_microbatch_seconds: float
    source: str
    date: str
    device: str
    note: str = ""
    link: float | None = None

    def describe(self) -> str:
        """One line for people."""
        products = ", ".join(f"{name} {flop_rate(rate)}" for name, rate in self.matmul.items())
        line = f"{products}; memory {size(self.bandwidth)}/s; {self.per_microbatch_seconds * 1e6:.0f} us a microbatch"
        line += f"; link {size(self.link)}/s" if self.link else ""
        return f"{line}; {self.source} {self.date}".rstrip()


def flop_rate(rate: float | None) -> str:
    """FLOP/s: 1.49e11 -> "149 GFLOP/s"."""
    return size(rate) if rate is None else size(rate).removesuffix("B") + "FLOP/s"


# ---- which rates apply: stored, assumed or none


def rates_for(machine) -> Rates | None:
    """Rates of a `profile.Machine` or a `targets.Target`; None if nothing was measured and no peak is known.

    Raises UserError for a stored measurement that cannot be read.
    """
    row = getattr(machine, "row", None) or getattr(machine, "known", None)
    name = _machine_name(machine)
    if name is not None and (stored := _read(_file(name))):
        return stored
    if row is not None:
        for path in sorted(_folder().glob("*.json")):
            stored = _read(path)
            if stored and lookup(stored.device) == row:
                return stored
    return assumed(row) if row is not None else None


def store(rates: Rates) -> Path:
    """Store a measurement durably for its kind of device. Returns its path."""
    path = _file(rates.device)
    write_json(path, asdict(rates))
    return path


def device_name(device) -> str:
    """The name under which a jax device's measurement is stored; for a processor it includes the number of cores."""
    return _processor() if device.platform == "cpu" else device.device_kind


def _machine_name(machine) -> str | None:
    platform = getattr(machine, "platform", None)
    if platform is None:  # a Target: any device of its row will do
        return None
    return f"{machine.cpu_model}, {machine.cpu_cores} cores" if platform == "cpu" else machine.device_kind


def _processor() -> str:
    return f"{cpu_model()}, {cpu_cores()} cores"


def _folder() -> Path:
    return cache_folder() / "rates"


def _file(device: str) -> Path:
    return _folder() / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def _read(path: Path) -> Rates | None:
    if not path.is_file():
        return None
    try:
        return Rates(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            "this is not a readable calibration of a device", where=str(path),
            hint="delete the file, or measure again: aurora doctor --calibrate",
        ) from error


# ---- assumed

_GUESS = Figure(value=0.7, source="a guess: nothing was measured")  # share of the peak
_BANDWIDTH_SHARE = 0.85  # share that streaming copies usually reach; not measured on these devices
_LINK_SHARE = 0.8  # share of the link's rate that large copies from pinned memory reach; not measured here
_LOOP_SECONDS = 2e-4  # 32 kernels at about 5 us each, and the loop's own synchronisation; not measured


def assumed(row: KnownMachine) -> Rates:
    """The table's peak times a share reached on this or a similar device; the note says which."""
    reached, peaks = row.reached or _GUESS, row.peak_flops
    products = {"float32": peaks.get("tf32", peaks.get("float32")), "bfloat16": peaks.get("bfloat16")}
    return Rates(
        matmul={name: reached.value * figure.value for name, figure in products.items() if figure},
        bandwidth=_BANDWIDTH_SHARE * row.bandwidth.value,
        per_microbatch_seconds=_LOOP_SECONDS,
        source="assumed",
        date="",
        device=row.name,
        note=f"{percent(reached.value)} of the peak ({reached.source}), {percent(_BANDWIDTH_SHARE)} of the bandwidth; "
        "measure it there with aurora doctor --calibrate",
        link=_LINK_SHARE * row.link.value if row.link else None,
    )
