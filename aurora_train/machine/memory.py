"""Memory that can really be had: what Linux says is available, what a container allows, what the device holds.

On a machine whose memory is shared between processor and accelerator, the device's own total is a fiction: asking
for it freezes the machine. The budget there is MemAvailable less a reserve, and never more than the cgroup leaves.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from aurora_train.config import parse_bytes

_GIB = 2**30
_RESERVE_SHARE, _RESERVE_BYTES = 0.08, 2 * _GIB


@dataclass(frozen=True)
class HostMemory:
    """Bytes. The cgroup's are None where it sets no limit; page cache that can be dropped is not counted as used."""

    total: int
    available: int
    swap_total: int
    swap_free: int
    cgroup_limit: int | None = None
    cgroup_used: int | None = None

    @property
    def usable(self) -> int:
        """What this process may still allocate."""
        if self.cgroup_limit is None:
            return self.available
        return max(min(self.available, self.cgroup_limit - self.cgroup_used), 0)

    @property
    def size(self) -> int:
        """The most it could ever have: the machine's memory or the cgroup's limit."""
        return self.total if self.cgroup_limit is None else min(self.total, self.cgroup_limit)


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Read /proc/meminfo and the cgroup (v1 or v2) that this process is in. `root` is where /proc and /sys hang."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE))
    kb = {name: int(value) * 1024 for name, value in fields.items()}
    total = kb["MemTotal"]
    limit, used = None, None
    for folder, limit_file, used_file in _cgroup_folders(root):
        found = _number(folder / limit_file)
        if found is None or found >= total:  # v1 writes a huge number for "no limit"
            continue
        in_use = (_number(folder / used_file) or 0) - _reclaimable(folder / "memory.stat")
        if limit is None or found - in_use < limit - used:
            limit, used = found, max(in_use, 0)
    return HostMemory(total, kb["MemAvailable"], kb.get("SwapTotal", 0), kb.get("SwapFree", 0), limit, used)


def _cgroup_folders(root: Path):
    """Every folder from this process's cgroup up to the top: a limit anywhere on the way holds."""
    membership = root / "proc/self/cgroup"
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, files = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Inside a container the path may be the host's and not be mounted here; then only the top can be read.
        folder = top / path.lstrip("/")
        while folder != top:
            if folder.is_dir():
                yield folder, *files
            folder = folder.parent
        yield top, *files


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(path: Path) -> int:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def reserve_bytes(memory: HostMemory) -> int:
    """What is left to the rest of the machine: 8 % of it, at least 2 GiB, at most half of what is there to have."""
    return int(min(max(_RESERVE_SHARE * memory.size, _RESERVE_BYTES), memory.usable / 2))


def budget_bytes(spec: str, machine) -> tuple[int, str]:
    """Bytes that one device may use for training, and the reason in words.

    Args:
        spec: `memory.budget` of the config: "auto", or an amount ("80GB"), which is taken as it stands.
        machine: a `machine.profile.Machine`. Where memory is shared (unified, or plain CPU), its devices share the
            budget evenly; a discrete device has its own.
    """
    if str(spec).strip().lower() != "auto":
        asked = parse_bytes(spec)
        there = machine.device_memory_bytes or machine.memory.usable // max(machine.device_count, 1)
        warning = f", more than the {there / 1e9:.1f} GB that can be had here" if asked > there else ""
        return asked, f"memory.budget: {spec}{warning}"
    if machine.device_memory_bytes is not None and not machine.unified:
        return machine.device_memory_bytes, f"the limit of the {machine.device_kind}'s own memory"
    memory, devices = machine.memory, max(machine.device_count, 1)
    reserve = reserve_bytes(memory)
    free = "left by the cgroup" if memory.usable < memory.available else "MemAvailable"
    reason = f"{memory.usable / 1e9:.1f} GB {free} less {reserve / 1e9:.1f} GB kept for the rest of the machine"
    if devices > 1:
        reason += f", shared by {devices} devices"
    return (memory.usable - reserve) // devices, reason


def process_memory() -> dict[str, int]:
    """This process, in bytes: {"resident", "anonymous", "peak_resident"}. Mapped files count in the first and last."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "peak_resident": "VmHWM"}
    return {name: int(fields[field]) * 1024 for name, field in names.items()}


def give_back_freed() -> None:
    """Have glibc return to the kernel what was freed: compiling a step leaves some 400 MB with it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def device_memory(device) -> dict[str, int] | None:
    """{"in_use", "peak", "limit"} in bytes of one jax device, or None where it keeps no account (CPU)."""
    stats = device.memory_stats()
    if not stats:
        return None
    return {
        "in_use": stats.get("bytes_in_use", 0),
        "peak": stats.get("peak_bytes_in_use", 0),
        "limit": stats.get("bytes_limit") or stats.get("bytes_reservable_limit") or 0,
    }


def process_memory_bytes() -> int:
    """`memory_bytes` of metrics.jsonl: the fullest device's peak, or on CPU the anonymous memory held now."""
    import jax

    peaks = [account["peak"] for device in jax.local_devices() if (account := device_memory(device))]
    return max(peaks) if peaks else process_memory()["anonymous"]
