"""Describes this machine, and sets the environment variables that JAX needs on it.

`prepare_environment` must run before jax is imported, because jax reads its environment once. Nothing here imports jax
at module level; `this_machine` imports it when called.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from aurora_train.config import parse_bytes
from aurora_train.files import cache_folder
from aurora_train.machine.memory import HostMemory, device_memory, host_memory, reserve_bytes
from aurora_train.machine.table import KnownMachine, lookup

DISCRETE_FRACTION = 0.92  # jax's own default, 0.75, leaves a quarter of the device unused


@dataclass(frozen=True)
class Machine:
    """The devices that training runs on, and their host. Bytes; `known` is None for a device not in the table."""

    platform: str
    device_kind: str
    device_count: int
    left_out: tuple[str, ...]
    device_memory_bytes: int | None
    known: KnownMachine | None
    unified: bool
    cpu_model: str
    cpu_cores: int
    memory: HostMemory

    def describe(self) -> dict:
        """JSON-able record for provenance: facts only, no host name, user name or path."""
        return {
            "platform": self.platform,
            "device_kind": self.device_kind,
            "device_count": self.device_count,
            "devices_left_out": list(self.left_out),
            "device_memory_bytes": self.device_memory_bytes,
            "table_row": self.known.name if self.known else None,
            "unified_memory": self.unified,
            "cpu_model": self.cpu_model,
            "cpu_cores": self.cpu_cores,
            "memory": asdict(self.memory),
        }


def this_machine() -> Machine:
    """The machine as jax and Linux see it now."""
    import jax

    devices, left_out = choose_devices(jax.local_devices())
    first = devices[0]
    known = lookup(first.device_kind)
    account = device_memory(first)
    return Machine(
        platform=first.platform,
        device_kind=cpu_model() if first.platform == "cpu" else first.device_kind,
        device_count=len(devices),
        left_out=tuple(device.device_kind for device in left_out),
        device_memory_bytes=account["limit"] or None if account else None,
        known=known,
        unified=first.platform == "cpu" or bool(known and known.unified),
        cpu_model=cpu_model(),
        cpu_cores=cpu_cores(),
        memory=host_memory(),
    )


def choose_devices(devices: list) -> tuple[list, list]:
    """(the devices to train on, those left out). If kinds differ, the one with the highest known bfloat16 peak is used.

    A workstation may have a small GPU for its display, which is not necessarily the one with index 0.
    """
    kinds = {device.device_kind for device in devices}
    if len(kinds) == 1:
        return list(devices), []

    def strength(kind: str) -> tuple[float, int]:
        known = lookup(kind)
        first = next(device for device in devices if device.device_kind == kind)
        account = device_memory(first) or {"limit": 0}
        return (known.peak_flops["bfloat16"].value if known else 0.0, account["limit"])

    best = max(kinds, key=strength)
    return [d for d in devices if d.device_kind == best], [d for d in devices if d.device_kind != best]


def precision_here(asked: str = "auto") -> str:
    """The `train.precision` for this machine's devices if the user chose "auto" or "native"; see `precision_on`."""
    import jax

    first = choose_devices(jax.local_devices())[0][0]
    if first.platform == "cpu":
        return _precision_of_processor(asked)
    return precision_on(first.platform, getattr(first, "compute_capability", None))


def precision_on(platform: str, capability: str | None) -> str:
    """ "bfloat16" on a TPU and on a GPU that multiplies it (NVIDIA from compute capability 8.0, AMD), else "float32".

    `platform` and `capability` ("9.0", "gfx942") are jax's own values.
    """
    number = re.match(r"[0-9]+", capability or "")
    able = int(number[0]) >= 8 if number else (capability or "").startswith("gfx")
    return "bfloat16" if platform == "tpu" or platform == "gpu" and able else "float32"


def _precision_of_processor(asked: str) -> str:
    """ "bfloat16" if that is asked for wherever there are instructions for it, and XLA multiplies with them here."""
    return "bfloat16" if asked == "native" and "avx512_bf16" in cpu_flags() else "float32"


def precision_expected(asked: str = "auto") -> str | None:
    """`precision_here` without importing jax, from what the driver reports; None if that does not determine it."""
    from importlib.util import find_spec

    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return _precision_of_processor(asked)
    if any(map(find_spec, ("libtpu", "jax_rocm_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin"))):
        return None
    gpus = installed_gpus() if any(map(find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))) else []
    rows = [lookup(gpu) for gpu in gpus]
    if not gpus:
        return _precision_of_processor(asked)
    return "bfloat16" if all(row and "bfloat16" in row.peak_flops for row in rows) else None


def peak_flops(machine: Machine, dtype: str) -> float | None:
    """Dense FLOP/s of one device for products of `dtype`, or None if unknown (MFU is then "n/a").

    For float32 this is the TF32 rate if the device has one, because XLA's default float32 product uses it. For fp8 it
    is the 8-bit rate, although a run's attention and head multiply in bfloat16; without one, the bfloat16 rate.
    """
    if machine.known is None:
        return None
    rates = machine.known.peak_flops
    others = {"float32": ("tf32", "float32"), "fp8": ("fp8", "bfloat16")}
    figure = next((rates[name] for name in others.get(dtype, (dtype,)) if name in rates), None)
    return figure.value if figure else None


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The processor's instruction sets as Linux names them for x86; empty on others, which name theirs otherwise."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(found[1].split() if found else ())


def cpu_model() -> str:
    """The processor's name from /proc/cpuinfo, or the architecture if it gives none (Arm)."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1].strip() if match else f"{os.uname().machine} processor"


def cpu_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def installed_gpus(root: Path = Path("/")) -> list[str]:
    """Names of the NVIDIA GPUs that the driver reports, without importing jax or starting CUDA; [] if there is none."""
    reports = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    matches = (re.search(r"^Model:\s*(.+)$", report.read_text(), re.MULTILINE) for report in reports)
    return [match[1].strip() for match in matches if match]


def nvidia_driver(root: Path = Path("/")) -> str | None:
    """The version of NVIDIA's kernel driver, such as "580.82.09"; None if there is none."""
    report = root / "proc/driver/nvidia/version"
    match = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", report.read_text()) if report.is_file() else None
    return match and match[1]


def plugin_without_driver() -> bool:
    """Whether jax's CUDA plug-in is installed (to plan for a GPU) without a driver: jax would print an error then."""
    import ctypes
    import importlib.util

    if not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        return False
    if importlib.util.find_spec("jax_rocm_plugin") or importlib.util.find_spec("libtpu"):
        return False  # another accelerator may be here
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


def environment_defaults(
    cache: Path,
    *,
    budget: str = "auto",
    online: bool = False,
    deterministic: bool = True,
    gpus: list[str] | None = None,
    user_flags: str = "",
) -> dict[str, str]:
    """The environment variables for this machine, regardless of the user's: a function of the arguments and of /proc.

    Args:
        cache: folder for compiled programs and autotuning results; must be on a local disk.
        budget: `memory.budget`; on unified memory it becomes the share of memory that jax may take.
        online: allow the data libraries to go to the network.
        deterministic: on a GPU, disable autotuning and unordered kernels, so that two compilations give equal
            bits. False keeps autotuning; results are then reproducible only with the same cache folder.
        gpus: names of the installed GPUs; read from the driver if None.
        user_flags: the user's own XLA_FLAGS, which take precedence.
    """
    wanted = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    if not online:
        wanted |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    wanted |= {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "compile"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    gpus = installed_gpus() if gpus is None else gpus
    if not gpus:
        # With its default, jax's keys hold the path of the cache: one that was moved would never be hit.
        return wanted | {"JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none"}
    wanted["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "xla_gpu_per_fusion_autotune_cache_dir"
    flag = "xla_gpu_deterministic_ops" if deterministic else "xla_gpu_exclude_nondeterministic_ops"
    if flag not in user_flags:
        wanted["XLA_FLAGS"] = f"{user_flags} --{flag}=true".strip()
    rows = [lookup(gpu) for gpu in gpus]
    if any(row and row.unified for row in rows):
        memory = host_memory()
        allowed = memory.usable - reserve_bytes(memory) if budget == "auto" else parse_bytes(budget)
        share = min(allowed / memory.total, 1.0)
        wanted["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        wanted["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{share:.2f}"
    else:
        wanted["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{DISCRETE_FRACTION:.2f}"
    return wanted


def prepare_environment(
    config=None, *, cache: Path | None = None, online: bool = False, deterministic: bool = True
) -> dict[str, str]:
    """Set the environment variables for this machine unless the user set them. Returns those set, for provenance.

    Call it before jax and datasets are imported. If jax already is (a notebook, a test), the compile cache is set
    through jax's own config instead, and only variables that are read later take effect.

    Args:
        config: the run's config; its `memory.budget` limits how much of a unified memory jax may use.
        cache: the cache folder; `run.cache_folder()` when None.
        online, deterministic: see `environment_defaults`.
    """
    user_flags = os.environ.get("XLA_FLAGS", "")
    wanted = environment_defaults(
        cache or cache_folder(),
        budget=config.memory.budget if config else "auto",
        online=online,
        deterministic=deterministic,
        user_flags=user_flags,
    )
    if plugin_without_driver():
        wanted["JAX_PLATFORMS"] = "cpu"
    setting = {name: value for name, value in wanted.items() if name == "XLA_FLAGS" or name not in os.environ}
    os.environ.update(setting)
    if "jax" in sys.modules and "JAX_COMPILATION_CACHE_DIR" in setting:
        import jax

        for name, value in setting.items():
            if name.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")):
                jax.config.update(name.lower(), int(value) if value.lstrip("-").isdigit() else value)
    return setting
