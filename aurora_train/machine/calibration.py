"""How fast this device really is: measured once by `aurora doctor --calibrate`, kept per kind of device, or assumed.

The planner turns FLOPs and bytes into seconds with these rates. A measurement of this kind of device wins; without
one, the table's peak times a share that was reached elsewhere, marked as assumed; with neither, there are no times.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from aurora_train.errors import UserError
from aurora_train.files import cache_folder, write_json
from aurora_train.machine.profile import cpu_cores, cpu_model
from aurora_train.machine.table import KnownMachine, lookup
from aurora_train.units import percent, size

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Rates:
    """One device. `matmul`: dtype name -> FLOP/s of large products; `bandwidth`: bytes/s read and written together.

    `per_microbatch_seconds`: what one more microbatch costs beside its work: a loop iteration of `_SMALL_OPS` small
    dependent products. `link`: bytes/s to or from the processor's memory, one way; None where it is shared.
    `source`: "measured" or "assumed"; `note` says where from, in words; `date`: ISO, or "".
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


# ---- the one in hand: stored, assumed or none


def rates_for(machine) -> Rates | None:
    """Rates of a `profile.Machine` or a `targets.Target`; None where nothing was measured and no peak is known.

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
    """Keep a measurement for its kind of device, durably; returns its path."""
    path = _file(rates.device)
    write_json(path, asdict(rates))
    return path


def device_name(device) -> str:
    """The kind of a jax device as measurements are kept: a processor's rate is that of so many of its cores."""
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
            "not a readable calibration of a device", where=str(path), hint="rm it, or: aurora doctor --calibrate"
        ) from error


# ---- assumed

# Share of the dense peak that large bfloat16 products or whole training steps reached, by what was really measured:
# H200: 770 to 800 of 989 TFLOP/s in products; GB10: users' 30 to 60 of 125; GB300: training at 1,000 to 1,400 of 2,500.
_SHARES = {"Hopper": (0.79, "reached on an H200"), "GB10": (0.36, "the middle of what users measured on a GB10")}
_SHARES |= {"Blackwell": (0.48, "the middle of trainings on a GB300"), "else": (0.7, "a guess: nothing was measured")}
_BANDWIDTH_SHARE = 0.85  # what streaming copies usually reach; not measured on these devices
_LINK_SHARE = 0.8  # of the link's rate, by large copies from pinned memory; not measured on these devices
_LOOP_SECONDS = 2e-4  # 32 kernels at about 5 us each, and the loop's own synchronisation; not measured


def assumed(row: KnownMachine) -> Rates:
    """The table's peak times a share reached on this or a like device; the note says which."""
    share, why = _SHARES[_family(row.name)]
    peaks = row.peak_flops
    products = {"float32": peaks.get("tf32", peaks.get("float32")), "bfloat16": peaks.get("bfloat16")}
    return Rates(
        matmul={name: share * figure.value for name, figure in products.items() if figure},
        bandwidth=_BANDWIDTH_SHARE * row.bandwidth.value,
        per_microbatch_seconds=_LOOP_SECONDS,
        source="assumed",
        date="",
        device=row.name,
        note=f"{percent(share)} of the peak ({why}), {percent(_BANDWIDTH_SHARE)} of the bandwidth; "
        "measure it there with aurora doctor --calibrate",
        link=_LINK_SHARE * row.link.value if row.link else None,
    )


def _family(name: str) -> str:
    if "GB10" in name:
        return "GB10"
    if re.search(r"\bG?H[12]00\b", name):
        return "Hopper"
    return "Blackwell" if re.search(r"\bG?B[23]00\b", name) else "else"


# ---- measured

_SMALL_OPS = 32  # about the kernels of one block's forward pass


def measure(device) -> Rates:
    """Probe one jax device, which should have nothing else to do: about 6 s on two processor cores, less on a GPU.

    Each figure is the best of repeated timings; other work on the device makes all of them too low.
    """
    import jax

    on_cpu = device.platform == "cpu"
    # Powers of two alone would hit cache-set conflicts or a kernel's favourite tile: a size between them is tried too.
    widths, megabytes = ((1024, 1536), 128) if on_cpu else ((4096, 6144, 8192), 512)
    with jax.default_device(device):
        matmul = {dtype: max(_matmul_rate(width, dtype, for_s=0.8) for width in widths) for dtype in DTYPES}
        bandwidth = _triad_rate(megabytes, for_s=1.0)
        overhead = _loop_seconds(for_s=0.5)
        link = None if on_cpu else _link_rate(device, megabytes, for_s=1.0)
    return Rates(
        matmul=matmul,
        bandwidth=bandwidth,
        per_microbatch_seconds=overhead,
        source="measured",
        date=time.strftime("%Y-%m-%d"),
        device=device_name(device),
        note=f"best of repeated products of {' and '.join(map(str, widths))}, a triad of {megabytes} MB arrays",
        link=link,
    )


def best_seconds(work: Callable[[], object], for_s: float) -> float:
    """The shortest of repeated calls within `for_s` seconds, at least two, after one that is not counted."""
    work()
    best, until = float("inf"), time.perf_counter() + for_s
    for number in range(10**6):
        start = time.perf_counter()
        if number >= 2 and start > until:
            break
        work()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_seconds(width: int, dtype: str, for_s: float) -> float:
    """Seconds of one square product on jax's default device. It holds 2 * width**3 FLOPs."""
    import jax
    import jax.numpy as jnp

    # bfloat16 products accumulate and return float32: XLA:CPU has its fast kernel for that form only.
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    a = jax.random.normal(jax.random.key(0), (width, width), dtype)
    return best_seconds(lambda: multiply(a, a).block_until_ready(), for_s)


def _matmul_rate(width: int, dtype: str, for_s: float) -> float:
    return 2 * width**3 / matmul_seconds(width, dtype, for_s)


def _triad_rate(megabytes: int, for_s: float) -> float:
    """Bytes/s of a = c + s * a over float32 arrays too large for any cache (after McCalpin, STREAM, 1995)."""
    import jax
    import jax.numpy as jnp

    number = megabytes * 10**6 // 4
    # Donated, so that it writes where it read: a fresh array's first touch costs the kernel far more than the triad.
    triad = jax.jit(lambda a, c: c + 0.5 * a, donate_argnums=0)
    held, c = [jnp.ones(number)], jnp.ones(number)

    def once():
        held[0] = triad(held[0], c)
        held[0].block_until_ready()

    return 3 * 4 * number / best_seconds(once, for_s)


def _link_rate(device, megabytes: int, for_s: float) -> float:
    """Bytes/s between a device and pinned memory of its processor: one way, as a copy there and back takes twice."""
    import jax
    import jax.numpy as jnp

    here = jax.sharding.SingleDeviceSharding(device)
    there = here.with_memory_kind("pinned_host")
    array = jax.device_put(jnp.ones(megabytes * 10**6 // 4), here)

    def once():
        jax.device_put(jax.device_put(array, there).block_until_ready(), here).block_until_ready()

    return 2 * array.nbytes / best_seconds(once, for_s)


def _loop_seconds(for_s: float) -> float:
    """Seconds of one loop iteration of small dependent products: the slope between a short and a long loop."""
    import jax
    import jax.numpy as jnp

    small = jnp.eye(16)

    def body(_, x):
        for _ in range(_SMALL_OPS):
            x = jnp.tanh(x @ small)  # a product is never fused away, and each waits for the one before
        return x

    def seconds(iterations: int) -> float:
        loop = jax.jit(lambda x: jax.lax.fori_loop(0, iterations, body, x))
        return best_seconds(lambda: loop(small).block_until_ready(), for_s / 2)

    short, long = 10, 210
    return max(seconds(long) - seconds(short), 0.0) / (long - short)
