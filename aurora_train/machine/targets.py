"""Machines that can be planned for by name, without the device: their memory budget, and what XLA needs to compile.

The compiler needs only a description of the chip (`GpuTargetConfigProto` text). Its figures are in machines.toml.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from aurora_train.errors import UserError
from aurora_train.machine.profile import DISCRETE_FRACTION
from aurora_train.machine.table import KnownMachine, known_machines, slug
from aurora_train.units import percent, size

_KIB, _GIB = 2**10, 2**30
_LEFT_TO_PROCESSOR = 7 * _GIB  # of shared memory, for Python, the data and the page cache


@dataclass(frozen=True)
class Target:
    """A machine named for planning. `budget_bytes`: what one device may use for training; `budget_reason` in words.

    `config_text` goes to `jax.experimental.topologies.get_topology_desc(platform="cuda", target_config=config_text,
    topology="1x1x1")`.
    """

    slug: str
    row: KnownMachine
    budget_bytes: int
    budget_reason: str
    config_text: str

    @property
    def compute_capability(self) -> tuple[int, int]:
        """(major, minor) as NVIDIA counts."""
        major, _, minor = self.row.chip.capability.partition(".")
        return int(major), int(minor)

    @property
    def multiprocessors(self) -> int:
        """Number of multiprocessors on the chip."""
        return self.row.chip.multiprocessors


def find_machine(name: str) -> Target:
    """The machine with a slug ("dgx-spark"), or with a name that the table or jax gives it ("NVIDIA H200").

    Raises UserError for an unknown machine, with the nearest name and the list, and for one without a `chip` (AMD's),
    for which no program can be compiled here.
    """
    wanted, known = slug(name), known_machines()
    spelled = {slug(one): key for key, row in known.items() for one in (row.name, *row.kinds, row.device_kind or key)}
    key = wanted if wanted in known else spelled.get(wanted)
    if key is None:
        near = difflib.get_close_matches(wanted, machine_names(), n=1, cutoff=0.5)
        raise UserError(
            f"no machine is known by the name {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
            why=f"known machines: {', '.join(machine_names())}",
            hint="list it in a machines.toml of your own (docs/memory.md), plan on the machine itself, or use the "
            "most similar one with its amount of memory: memory.budget=20GB",
        )
    if known[key].chip is None:
        raise UserError(
            f"{known[key].name} is a known machine, but nothing can be compiled for it without the device",
            why="planning compiles the step, and jax can compile for an absent device only if it is NVIDIA's",
            hint="plan on that machine itself",
        )
    return _target(key, known[key])


def machine_names() -> list[str]:
    """Every slug that `find_machine` can compile for, in the order of the table."""
    return [name for name, row in known_machines().items() if row.chip]


def _target(name: str, row: KnownMachine) -> Target:
    if row.unified:
        budget = int(row.free.value) - _LEFT_TO_PROCESSOR
        reason = (
            f"CUDA can allocate about {size(row.free.value)} of the memory that it shares with the processor, of which "
            f"{size(_LEFT_TO_PROCESSOR)} are left for Python, the data and the page cache"
        )
    else:
        budget = int(DISCRETE_FRACTION * row.sees.value)
        reason = (
            f"{percent(DISCRETE_FRACTION)} (the share the trainer lets jax take) of {size(row.sees.value)}: "
            f"{row.sees.source}"
        )
    return Target(name, row, budget, reason, _config_text(row))


def _config_text(row: KnownMachine) -> str:
    """XLA's `stream_executor.GpuTargetConfigProto` as text (compare openxla/xla, `target_config/specs`)."""
    chip = row.chip
    major, _, minor = chip.capability.partition(".")
    # Hopper and later have instructions outside the portable set (sm_90a); on a device XLA enables them by itself.
    extension = "ACCELERATED_FEATURES" if int(major) >= 9 else "NONE"
    return f"""gpu_device_info {{
  name: "{row.device_kind}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {chip.multiprocessors}
  fpus_per_core: {chip.lanes}
  clock_rate_ghz: {chip.clock_ghz}
  memory_bandwidth: {int(row.bandwidth.value)}
  device_memory_size: {int(row.sees.value)}
  l2_cache_size: {chip.l2_bytes}
  shared_memory_per_core: {chip.shared_kib * _KIB}
  shared_memory_per_block: {48 * _KIB}
  shared_memory_per_block_optin: {chip.shared_optin_kib * _KIB}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: {chip.threads}
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
device_description_str: "{row.device_kind}"
"""
