"""Machines that can be planned for by name, without the device: its memory budget, and what XLA must know to compile.

The one thing to know: the compiler needs a description of the chip (`GpuTargetConfigProto` text), and nothing else of
it. Limits per multiprocessor follow from the compute capability; the rest is one line per chip below.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from aurora_train.errors import UserError
from aurora_train.machine.profile import DISCRETE_FRACTION
from aurora_train.machine.table import TABLE, KnownMachine
from aurora_train.units import percent, size

_GIB = 2**30
_KIB, _MIB = 2**10, 2**20


@dataclass(frozen=True)
class Target:
    """A machine named for planning. `budget_bytes`: what one device may use for training; `budget_reason` in words.

    `config_text` goes to `jax.experimental.topologies.get_topology_desc(platform="cuda", target_config=config_text,
    topology="1x1x1")`; None where this trainer cannot compile for the device without having it.
    """

    slug: str
    row: KnownMachine
    budget_bytes: int
    budget_reason: str
    config_text: str | None

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """(major, minor) as NVIDIA counts; None for another vendor's device."""
        chip = _CHIPS.get(self.row.name)
        return chip.capability if chip else None

    @property
    def multiprocessors(self) -> int:
        """How many the chip has."""
        return _CHIPS[self.row.name].multiprocessors


@dataclass(frozen=True)
class _Chip:
    """`sees`: bytes CUDA reports as the device's total, with its source. `l2` in bytes, `clock_ghz` the boost clock."""

    slug: str
    capability: tuple[int, int]
    multiprocessors: int
    l2: int
    clock_ghz: float
    sees: int
    sees_source: str
    device_kind: str


# Per multiprocessor: threads, shared memory, shared memory one block may opt in to. CUDA C++ Programming Guide 13.0,
# "Compute Capabilities", table of technical specifications. Float32 lanes: the architecture whitepapers.
_LIMITS = {
    (8, 0): (2048, 164 * _KIB, 163 * _KIB, 64),
    (8, 6): (1536, 100 * _KIB, 99 * _KIB, 128),
    (8, 9): (1536, 100 * _KIB, 99 * _KIB, 128),
    (9, 0): (2048, 228 * _KIB, 227 * _KIB, 128),
    (10, 0): (2048, 228 * _KIB, 227 * _KIB, 128),
    (10, 3): (2048, 228 * _KIB, 227 * _KIB, 128),
    (12, 0): (1536, 100 * _KIB, 99 * _KIB, 128),
    (12, 1): (1536, 100 * _KIB, 99 * _KIB, 128),
}

# What CUDA reports of the memory sold is less by the driver's own share and, on GDDR, by ECC.
_XLA = "the device's own report, as published in OpenXLA's target configs"
_SEEN = "the total that CUDA reports in users' out-of-memory messages"
_SOLD = "the size sold; what CUDA reports is not known to us"

# Multiprocessors, L2 and clocks: OpenXLA's target configs (queried from the devices) for H100, H200, B200, GB200,
# GB300, A100 and A6000; else the whitepaper or datasheet of the row in `table.py`: H100 (114 and 132 SMs), GH200
# (60 MB L2), GA102 (82 SMs), Ada v2.02 (128 and 142 SMs), L4 datasheet (58 SMs, 48 MB), RTX Blackwell v1.1 (170 SMs,
# 96 MB), RTX Blackwell PRO v1.0 (188 SMs, 128 MB), HGX B300 (148 SMs), DGX Spark user guide (6,144 lanes = 48 SMs).
_CHIPS: dict[str, _Chip] = {
    "DGX Spark (GB10)": _Chip(
        "dgx-spark", (12, 1), 48, 24 * _MIB, 2.4, int(121.7 * _GIB), _SEEN, "NVIDIA GB10"
    ),
    "DGX Station (GB300)": _Chip(
        "dgx-station", (10, 3), 152, 135528448, 2.07, 252_000_000_000, _SOLD, "NVIDIA GB300"
    ),
    "B300": _Chip("b300", (10, 3), 148, 132644864, 1.965, 288_000_000_000, _SOLD, "NVIDIA B300 SXM6 AC"),
    "GB200": _Chip("gb200", (10, 0), 152, 135528448, 2.062, 197_897_748_480, _XLA, "NVIDIA GB200"),
    "B200": _Chip("b200", (10, 0), 148, 132644864, 1.965, 191_514_411_008, _XLA, "NVIDIA B200"),
    "GH200 96 GB": _Chip("gh200", (9, 0), 132, 60 * _MIB, 1.98, int(94.5 * _GIB), _SEEN, "NVIDIA GH200 480GB"),
    "H200": _Chip("h200", (9, 0), 132, 50 * _MIB, 1.98, int(139.8 * _GIB), _SEEN, "NVIDIA H200"),
    "H200 NVL": _Chip("h200-nvl", (9, 0), 132, 50 * _MIB, 1.785, int(139.8 * _GIB), _SEEN, "NVIDIA H200 NVL"),
    "H100 SXM": _Chip("h100", (9, 0), 132, 50 * _MIB, 1.98, 84_942_979_072, _XLA, "NVIDIA H100 80GB HBM3"),
    "H100 NVL": _Chip("h100-nvl", (9, 0), 132, 50 * _MIB, 1.785, int(93.1 * _GIB), _SEEN, "NVIDIA H100 NVL"),
    "H100 PCIe": _Chip("h100-pcie", (9, 0), 114, 50 * _MIB, 1.755, 84_942_979_072, _XLA, "NVIDIA H100 PCIe"),
    "A100 80 GB": _Chip("a100-80gb", (8, 0), 108, 40 * _MIB, 1.41, 85_100_068_864, _XLA, "NVIDIA A100-SXM4-80GB"),
    "A100 80 GB PCIe": _Chip(
        "a100-80gb-pcie", (8, 0), 108, 40 * _MIB, 1.41, int(79.1 * _GIB), _SEEN, "NVIDIA A100 80GB PCIe"
    ),
    "A100 40 GB": _Chip("a100-40gb", (8, 0), 108, 40 * _MIB, 1.41, 42_298_834_944, _XLA, "NVIDIA A100-SXM4-40GB"),
    "RTX PRO 6000 Blackwell": _Chip(
        "rtx-pro-6000", (12, 0), 188, 128 * _MIB, 2.6, int(94.97 * _GIB), _SEEN,
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    ),
    "RTX PRO 6000 Blackwell Max-Q": _Chip(
        "rtx-pro-6000-max-q", (12, 0), 188, 128 * _MIB, 2.28, int(94.97 * _GIB), _SEEN,
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    ),
    "RTX 5090": _Chip("rtx-5090", (12, 0), 170, 96 * _MIB, 2.41, int(31.37 * _GIB), _SEEN, "NVIDIA GeForce RTX 5090"),
    "RTX 4090": _Chip("rtx-4090", (8, 9), 128, 72 * _MIB, 2.52, int(23.52 * _GIB), _SEEN, "NVIDIA GeForce RTX 4090"),
    "RTX 3090": _Chip("rtx-3090", (8, 6), 82, 6 * _MIB, 1.695, int(23.5 * _GIB), _SEEN, "NVIDIA GeForce RTX 3090"),
    "RTX 6000 Ada": _Chip(
        "rtx-6000-ada", (8, 9), 142, 96 * _MIB, 2.505, int(44.43 * _GIB), f"{_SEEN}, with ECC on",
        "NVIDIA RTX 6000 Ada Generation",
    ),
    "RTX A6000": _Chip("rtx-a6000", (8, 6), 84, 6 * _MIB, 1.8, 51_041_271_808, _XLA, "NVIDIA RTX A6000"),
    "L40S": _Chip("l40s", (8, 9), 142, 96 * _MIB, 2.52, int(44.4 * _GIB), f"{_SEEN}, with ECC on", "NVIDIA L40S"),
    "L4": _Chip("l4", (8, 9), 58, 48 * _MIB, 2.04, int(22.0 * _GIB), f"{_SEEN}, with ECC on", "NVIDIA L4"),
}  # fmt: skip

# CUDA's free memory on a DGX Spark never rose above about 102 GiB of the 121.7 GiB that Linux sees, whatever was
# idle (users' reports); 7 GiB of that stay with the processor's side of the trainer: Python, data, page cache.
_SPARK_SEEN, _SPARK_BUDGET = 102 * _GIB, 95 * _GIB


def find_machine(name: str) -> Target:
    """The machine of a slug ("dgx-spark"), or of a name as the table or jax gives it ("NVIDIA H200").

    Raises UserError for one that is not known, with the nearest and the list, and for an AMD device: its row is
    known, but no program can be compiled for it here.
    """
    wanted = slug(name)
    targets = {chip.slug: row for row in TABLE if (chip := _CHIPS.get(row.name))}
    if wanted in targets:
        return _target(wanted, targets[wanted])
    for row in TABLE:
        spellings = {slug(row.name), *map(slug, row.kinds)}
        if chip := _CHIPS.get(row.name):
            spellings.add(slug(chip.device_kind))
        if wanted in spellings:
            if chip is None:
                raise UserError(
                    f"{row.name} is a known machine, but nothing can be compiled for it without the device",
                    why="planning compiles the step, and jax compiles for an absent device on NVIDIA only",
                    hint="plan on that machine itself",
                )
            return _target(chip.slug, row)
    near = difflib.get_close_matches(wanted, targets, n=1, cutoff=0.5)
    raise UserError(
        f"no machine is known by the name {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
        why=f"known are {', '.join(targets)}",
        hint="for another device, plan on the machine itself, or name the nearest with an amount: memory.budget=20GB",
    )


def machine_names() -> list[str]:
    """Every slug that `find_machine` can compile for, in the order of the table."""
    return [_CHIPS[row.name].slug for row in TABLE if row.name in _CHIPS]


def slug(name: str) -> str:
    """Words in lower case joined by hyphens, without the vendor: "NVIDIA GeForce RTX 5090" -> "rtx-5090"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "amd", "instinct"))


def _target(name: str, row: KnownMachine) -> Target:
    chip = _CHIPS[row.name]
    if row.unified:
        budget = _SPARK_BUDGET
        reason = (
            f"CUDA can get about {size(_SPARK_SEEN)} of the memory that it shares with the processor, and "
            f"{size(_SPARK_SEEN - budget)} of that are left for Python, the data and the page cache"
        )
    else:
        budget = int(DISCRETE_FRACTION * chip.sees)
        reason = (
            f"{percent(DISCRETE_FRACTION)} (the share the trainer lets jax take) of {size(chip.sees)}: "
            f"{chip.sees_source}"
        )
    return Target(name, row, budget, reason, _config_text(chip, row))


def _config_text(chip: _Chip, row: KnownMachine) -> str:
    """XLA's `stream_executor.GpuTargetConfigProto` as text (openxla/xla, `target_config/specs`, has its like)."""
    threads, shared, shared_optin, lanes = _LIMITS[chip.capability]
    major, minor = chip.capability
    # Hopper and later carry instructions outside the portable set (sm_90a); XLA turns them on by itself on a device.
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""gpu_device_info {{
  name: "{chip.device_kind}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {chip.multiprocessors}
  fpus_per_core: {lanes}
  clock_rate_ghz: {chip.clock_ghz}
  memory_bandwidth: {int(row.bandwidth.value)}
  device_memory_size: {chip.sees}
  l2_cache_size: {chip.l2}
  shared_memory_per_core: {shared}
  shared_memory_per_block: {48 * _KIB}
  shared_memory_per_block_optin: {shared_optin}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: {threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.15.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 15 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{chip.device_kind}"
"""
