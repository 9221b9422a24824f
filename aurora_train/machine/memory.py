"""How much memory a run can use: what Linux reports as available, what a container allows, what the device has.

If processor and accelerator share their memory, the total that the device reports is not usable: allocating it freezes
the machine. The budget there is MemAvailable less a reserve, and never more than the cgroup leaves. Only this module
reads /proc/meminfo, memory pressure and cgroups; `always_on/guard.py` calls it during training.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from aurora_train.config import parse_bytes

_GIB = 2**30
_RESERVE_SHARE, _RESERVE_BYTES = 0.08, 2 * _GIB


@dataclass(frozen=True)
class HostMemory:
    """Bytes. The cgroup's are None if it sets no limit; page cache that can be dropped does not count as used."""

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
    def swap_used(self) -> int:
        """Bytes in swap, over all processes."""
        return self.swap_total - self.swap_free

    @property
    def size(self) -> int:
        """The upper limit: the machine's memory or the cgroup's limit, whichever is smaller."""
        return self.total if self.cgroup_limit is None else min(self.total, self.cgroup_limit)


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Read /proc/meminfo and the cgroup (v1 or v2) of this process. `root` contains /proc and /sys."""
    kb = _meminfo(root)
    cgroup = tightest_cgroup(root, kb["MemTotal"])
    limit, used = (cgroup.limit, cgroup.used) if cgroup else (None, None)
    return HostMemory(
        kb["MemTotal"], kb["MemAvailable"], kb.get("SwapTotal", 0), kb.get("SwapFree", 0), limit, used
    )  # fmt: skip


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    return {line[: line.index(":")]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


class Cgroup(NamedTuple):
    """A cgroup that limits this process. Bytes; `used` excludes page cache and kernel caches that can be dropped."""

    folder: Path
    limit: int
    used: int


# For each cgroup version: the files of the limits, of which the lower applies (memory.high stalls a process beyond it),
# and the file of the usage.
_V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes")
_V2 = (("memory.max", "memory.high"), "memory.current")


def tightest_cgroup(root: Path, total: int) -> Cgroup | None:
    """The cgroup with the least room among this process's own and its parents; None if none sets a limit.

    A limit of `total` (the machine's bytes) or more counts as none: v1 writes a huge number for no limit.
    """
    tightest = None
    for folder, (limit_files, used_file) in _cgroup_folders(root):
        limits = [limit for name in limit_files if (limit := _number(folder / name)) is not None and limit < total]
        if not limits:
            continue
        used = max((_number(folder / used_file) or 0) - _reclaimable(_statistics(folder)), 0)
        if tightest is None or min(limits) - used < tightest.limit - tightest.used:
            tightest = Cgroup(folder, min(limits), used)
    return tightest


def _cgroup_folders(root: Path):
    """Every folder from this process's cgroup up to the top: a limit in any of them applies."""
    for top, path, files in _memberships(root):
        # In a container the path may be the host's and not be mounted; then only the top can be read.
        folder = top / path.lstrip("/")
        while folder != top:
            if folder.is_dir():
                yield folder, files
            folder = folder.parent
        yield top, files


def _memberships(root: Path):
    """(mount point of a hierarchy, this process's path in it, its files), for v2 and for v1's memory controller."""
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup"
        if controllers == "":
            hybrid = top / "unified"  # both versions are mounted: memory may be limited in either
            yield hybrid if hybrid.is_dir() else top, path, _V2
        elif "memory" in controllers.split(","):
            yield top / "memory", path, _V1


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistics(folder: Path) -> dict[str, int]:
    """memory.stat of a cgroup including all cgroups below it; {} if it cannot be read."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return {}
    # v1 lists its own sums first and the totals after them, so that the totals win here.
    return {key.removeprefix("total_"): int(value) for key, value in map(str.split, lines)}


def _reclaimable(fields: dict[str, int]) -> int:
    """Bytes that the kernel reclaims before it kills: the page cache, both lists (MemAvailable counts both)."""
    return sum(fields.get(name, 0) for name in ("inactive_file", "active_file", "slab_reclaimable"))


def memory_pressure(root: Path = Path("/")) -> float:
    """Percent of the last ten seconds in which some process waited for memory, in the machine or this cgroup (v2).

    Returns the higher of the two, or 0 if the kernel keeps no pressure statistics (PSI).
    """
    files = [root / "proc/pressure/memory"]
    files += [top / path.lstrip("/") / "memory.pressure" for top, path, kind in _memberships(root) if kind is _V2]
    shares = [0.0]
    for file in files:
        with contextlib.suppress(OSError):  # if PSI was switched off at boot, the file exists but cannot be read
            shares += map(float, re.findall(r"^some avg10=([0-9.]+)", file.read_text(), re.MULTILINE))
    return max(shares)


def held_beside_processes(root: Path = Path("/")) -> dict[str, int]:
    """Bytes, by name, that belong to no process: of the cgroup that limits this process, or of the machine."""
    kb = _meminfo(root)
    cgroup = tightest_cgroup(root, kb["MemTotal"])
    swap = kb.get("SwapTotal", 0) - kb.get("SwapFree", 0)
    if cgroup is None:
        cached, shared = kb.get("Cached", 0) + kb.get("Buffers", 0), kb.get("Shmem", 0)
    else:
        fields = _statistics(cgroup.folder)
        cached, shared = fields.get("file", fields.get("cache", 0)), fields.get("shmem", 0)
    return {"page cache": max(cached - shared, 0), "tmpfs and shared memory": shared, "swap in use": swap}


def processes_limited_with(root: Path = Path("/")) -> set[int] | None:
    """The ids of the processes under the same cgroup limit as this one; None if no cgroup limits it."""
    cgroup = tightest_cgroup(root, _meminfo(root)["MemTotal"])
    if cgroup is None:
        return None
    ids: set[int] = set()
    with contextlib.suppress(OSError):  # a cgroup may disappear meanwhile
        for members in cgroup.folder.rglob("cgroup.procs"):
            ids.update(map(int, members.read_text().split()))
    return ids


def reserve_bytes(memory: HostMemory) -> int:
    """Bytes left for the rest of the machine: 8 % of its memory, at least 2 GiB, at most half of what is usable."""
    return int(min(max(_RESERVE_SHARE * memory.size, _RESERVE_BYTES), memory.usable / 2))


def most_for_a_run(memory: HostMemory) -> int:
    """The most bytes that one run may use: the usable memory of an idle machine, less the reserve."""
    idle = replace(memory, available=memory.total, cgroup_used=0 if memory.cgroup_limit is not None else None)
    return idle.size - reserve_bytes(idle)


def budget_bytes(spec: str, machine) -> tuple[int, str]:
    """Bytes that one device may use for training, and the reason in words.

    Args:
        spec: `memory.budget` of the config: "auto", or an amount ("80GB"), which is used as given.
        machine: a `machine.profile.Machine`. Where memory is shared (unified, or plain CPU), its devices share the
            budget evenly; a discrete device has its own.
    """
    if str(spec).strip().lower() != "auto":
        asked = parse_bytes(spec)
        usable = machine.device_memory_bytes or machine.memory.usable // max(machine.device_count, 1)
        warning = f", more than the {usable / 1e9:.1f} GB that are usable here" if asked > usable else ""
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
    """This process's bytes: {"resident", "anonymous", "peak_resident"}. Mapped files count in the first and last."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "peak_resident": "VmHWM"}
    return {name: int(fields[field]) * 1024 for name, field in names.items()}


def give_back_freed() -> None:
    """Make glibc return freed memory to the kernel: after compiling a step it retains some 400 MB."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def device_memory(device) -> dict[str, int] | None:
    """{"in_use", "peak", "limit"} in bytes of one jax device, or None if it keeps no statistics (CPU)."""
    stats = device.memory_stats()
    if not stats:
        return None
    return {
        "in_use": stats.get("bytes_in_use", 0),
        "peak": stats.get("peak_bytes_in_use", 0),
        "limit": stats.get("bytes_limit") or stats.get("bytes_reservable_limit") or 0,
    }


def process_memory_bytes() -> int:
    """`memory_bytes` of metrics.jsonl: the highest peak of a device, or on a CPU the anonymous memory held now."""
    import jax

    peaks = [account["peak"] for device in jax.local_devices() if (account := device_memory(device))]
    return max(peaks) if peaks else process_memory()["anonymous"]
