"""The checks of `aurora doctor`. Each measures something and gives ok, warn or fail, with the command that helps.

Only "fail" means that training cannot work here. A measurement is never replaced by a table's figure.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from aurora_train.energy.meter import in_words, sources
from aurora_train.files import cache_folder
from aurora_train.machine import nvml
from aurora_train.machine.memory import budget_bytes, device_memory
from aurora_train.machine.profile import (
    Machine,
    choose_devices,
    installed_gpus,
    nvidia_driver,
    peak_flops,
    plugin_without_driver,
    this_machine,
)
from aurora_train.machine.rates import flop_rate, rates_for, store
from aurora_train.tools.calibrate import matmul_seconds, measure
from aurora_train.units import percent, size

_CORE = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "pyarrow", "pydantic", "ruamel.yaml",
    "typer", "rich", "tokenizers", "huggingface_hub", "safetensors", "gguf", "jinja2", "xxhash", "matplotlib", "psutil",
    "numpy",
)  # fmt: skip
_EXTRAS = {  # extra -> (modules, any one of which suffices; its purpose)
    "neural": (("h5py",), "neural recordings (NWB, HDF5)"),
    "driving": (("libsumo",), "traffic from SUMO: scenes, and cars that react"),
    "robot": (("metaworld",), "robot policies: simulated arms (Meta-World, MuJoCo) and video"),
    "vision": (("sklearn",), "the handwritten digits of scikit-learn"),
    "plan": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "planning for an absent NVIDIA GPU"),
    "serve": (("starlette", "uvicorn"), "`aurora serve`"),
    "constrain": (("llguidance",), "answers of `aurora serve` that keep to a JSON schema or an expression"),
    "energy": (("pynvml",), "the energy of NVIDIA GPUs, and their power caps"),
    "sign": (("model_signing",), "signatures of runs and exports (`aurora lineage --sign`)"),
    "gates": (("detect_secrets",), "the gate that looks for keys and passwords in the training texts"),
    "lm-eval": (("lm_eval",), "the tasks of lm-eval (`aurora evaluate --suite`)"),
    "tensorboard": (("tensorboardX",), "the TensorBoard sink"),
    "wandb": (("wandb",), "the Weights & Biases sink (offline unless asked)"),
}
_GLIBC = 2, 28  # the newest that a wheel of ours asks for (docs/installing.md)
_WRITE_BYTES = 64 * 2**20
_CUDA13_DRIVER = 580  # the first that runs CUDA 13 (NVIDIA, CUDA Toolkit release notes, table 3)


@dataclass(frozen=True)
class Check:
    """One result. `status` is "ok", "warn", "fail", or "--" for an extra that is not installed.

    `finding` is the result in words; `fix` is the command or action that helps.
    """

    name: str
    status: str
    finding: str
    fix: str | None = None
    values: dict = field(default_factory=dict)

    @property
    def fatal(self) -> bool:
        return self.status == "fail"


def examine(run_folder: Path, calibrate: bool = False) -> list[Check]:
    """All checks, in the order in which they are shown. Takes a few seconds, mostly for starting jax and multiplying.

    `calibrate`: measure the rates behind the planner's times, and store them for this kind of device.
    """
    checks = [check_python(), check_packages(), *check_extras()]
    if any(check.fatal for check in checks):
        return checks
    try:
        machine = this_machine()
    except RuntimeError as error:  # jax raises it if a plug-in or a driver does not start
        text = str(error).splitlines()[0]
        return [*checks, Check("devices", "fail", f"jax finds no device: {text}", "JAX_PLATFORMS=cpu aurora doctor")]
    checks += [*check_cuda(machine), check_devices(machine), *check_memory(machine)]
    checks += [check_matmul(machine, dtype) for dtype in ("float32", "bfloat16")]
    checks += [check_rates(machine, calibrate), check_energy()]
    checks += [check_disk(run_folder), check_cache(), check_shared_memory(), check_file_limit(), check_clock()]
    return checks


def show(checks: list[Check]) -> None:
    """Print the checks as aligned lines on stdout."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:<4}  {check.name:<{width}}  {check.finding}")
        if check.fix:
            print(f"{'':<{width + 8}}fix: {check.fix}")


# ---- software


def check_python() -> Check:
    """Checks for Python 3.11 to 3.13, and a C library for which the wheels of x86-64 and aarch64 are built."""
    libc, version = platform.libc_ver()
    finding = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {libc or '?'} {version}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check("python", "fail", finding, "use Python 3.11, 3.12 or 3.13: python3.12 -m venv .venv")
    if libc != "glibc" or tuple(map(int, version.split(".")[:2])) < _GLIBC:
        fix = "wheels need glibc 2.28 or newer, as in Debian 12 or Ubuntu 24.04, also in a container"
        return Check("python", "warn", finding, fix)
    return Check("python", "ok", finding)


def check_packages() -> Check:
    """Every package that training needs, with its version."""
    versions, missing = {}, []
    for name in _CORE:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", "fail", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    main = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
    return Check("packages", "ok", ", ".join(f"{name} {versions[name]}" for name in main), values=versions)


def check_extras() -> list[Check]:
    """One line for each optional package that is not installed."""
    checks = []
    for extra, (modules, purpose) in _EXTRAS.items():
        if not any(importlib.util.find_spec(module) for module in modules):
            checks.append(
                Check(f"extra {extra}", "--", f"not installed; for {purpose}", f"pip install 'aurora_train[{extra}]'")
            )
    return checks


def check_cuda(machine: Machine, root: Path = Path("/")) -> list[Check]:
    """A warning if there is an NVIDIA GPU that jax does not use, with the command that enables it."""
    gpus = installed_gpus(root)
    if not gpus or machine.platform != "cpu":
        return []
    driver = nvidia_driver(root)
    extra = "cuda12" if driver and int(driver.partition(".")[0]) < _CUDA13_DRIVER else "cuda13"
    why, fix = "this jax only uses the processor", f"pip install 'aurora_train[{extra}]'"
    if plugin_without_driver():
        why = "libcuda.so.1, the library of its driver, is missing"
        fix = "in a container: docker run --gpus all; otherwise install the driver again"
    elif os.environ.get("JAX_PLATFORMS") == "cpu":
        why, fix = "JAX_PLATFORMS=cpu is set", "unset JAX_PLATFORMS"
    elif any(importlib.util.find_spec(module) for module in _EXTRAS["plan"][0]):
        why = "jax's CUDA plug-in does not start"
    finding = f"{gpus[0]}{f' (driver {driver})' if driver else ''} is installed but {why}"
    return [Check("cuda", "warn", finding, fix)]


# ---- devices and memory


def check_devices(machine: Machine) -> Check:
    """The devices that jax will train on, and whether their peak is known."""
    finding = f"{machine.device_count} x {machine.device_kind} ({machine.platform}), {machine.cpu_cores} cores"
    if machine.left_out:
        finding += f"; left out: {', '.join(machine.left_out)}"
    if machine.platform != "cpu" and machine.known is None:
        return Check("devices", "warn", f"{finding}; not in the table of machines, so MFU will be n/a", None)
    if machine.known:
        finding += f"; {machine.known.memory_rule}"
    return Check("devices", "ok", finding, values=machine.describe())


def check_memory(machine: Machine) -> list[Check]:
    """Total, available, cgroup, swap and device memory, and the budget that follows from them."""
    memory = machine.memory
    finding = f"{size(memory.total)}, {size(memory.available)} available"
    if memory.cgroup_limit is not None:
        finding += f", cgroup limit {size(memory.cgroup_limit)} with {size(memory.cgroup_used)} in use"
    finding += f", swap {size(memory.swap_total)}"
    checks = [Check("memory", "ok", finding, values=asdict(memory))]
    if machine.device_memory_bytes is not None:
        import jax

        account = device_memory(jax.local_devices()[0])
        finding = f"{size(account['limit'])} for jax, {size(account['in_use'])} in use"
        checks.append(Check("device memory", "ok", finding, values=account))
    amount, reason = budget_bytes("auto", machine)
    short = amount < 2 * 2**30
    checks.append(
        Check(
            "training budget",
            "warn" if short else "ok",
            f"{size(amount)} a device: {reason}",
            "close other programs, or raise the container's memory limit" if short else None,
            {"budget_bytes": amount},
        )
    )
    return checks


def check_matmul(machine: Machine, dtype: str) -> Check:
    """The rate of a square matrix product, timed for about half a second, compared with the table's peak."""
    width = 1024 if machine.platform == "cpu" else 8192
    seconds = matmul_seconds(width, dtype, for_s=0.5)
    rate = 2 * width**3 / seconds
    peak = peak_flops(machine, dtype)
    values = {"width": width, "flops_per_s": rate, "peak_flops_per_s": peak}
    finding = f"{flop_rate(rate)} measured at {width}"
    if peak is None:
        return Check(f"matmul {dtype}", "ok", f"{finding}; peak unknown (n/a)", values=values)
    finding += f", {percent(rate / peak)} of {flop_rate(peak)} ({machine.known.peak_flops['bfloat16'].source})"
    if rate < 0.4 * peak:
        fix = "look for other work on the device, a power limit or a clock cap: nvidia-smi -q -d PERFORMANCE,CLOCK"
        return Check(f"matmul {dtype}", "warn", finding, fix, values)
    return Check(f"matmul {dtype}", "ok", finding, values=values)


def check_rates(machine: Machine, calibrate: bool = False) -> Check:
    """The rates behind the planner's times: measured now, measured earlier, assumed from the table, or unknown."""
    if calibrate:
        import jax

        devices, _ = choose_devices(jax.local_devices())
        rates = measure(devices[0])
        path = store(rates)
        return Check("rates", "ok", f"{rates.describe()}, kept in {path}", values=asdict(rates))
    rates = rates_for(machine)
    if rates is None:
        return Check("rates", "ok", "not measured, so plans give no times", "aurora doctor --calibrate")
    fix = None if rates.source == "measured" else "aurora doctor --calibrate"
    finding = rates.describe() if rates.source == "measured" else f"{rates.describe()}: {rates.note}"
    return Check("rates", "ok", finding, fix, asdict(rates))


def check_energy() -> Check:
    """What measures the energy of runs; `aurora energy` shows more."""
    gpus, why = nvml.gpus()
    found = sources(gpus, None)
    finding = in_words(found) if found else f"not measured: {why or 'no meter can be read'}"
    return Check("energy", "ok", finding, values={"sources": [source.describe() for source in found]})


# ---- disk and system


def check_disk(folder: Path) -> Check:
    """Write, fsync and remove 64 MiB in the run folder (or its nearest existing parent); free space."""
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    # Whether it is writable comes first: /proc, for instance, reports that zero bytes are free.
    try:
        tempfile.TemporaryFile(dir=nearest).close()
        free = shutil.disk_usage(nearest).free
        rate = None if free < 2 * _WRITE_BYTES else _write_rate(nearest)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            fix = "aurora doctor --run-folder DIR, with a folder you can write"
            return Check("run folder", "fail", f"cannot write {nearest}: {error.strerror}", fix)
        free, rate = shutil.disk_usage(nearest).free, None
    if rate is None:
        fix = f"free some space: du -xh {nearest} | sort -h | tail"
        return Check("run folder", "fail", f"only {size(free)} free at {nearest}", fix, {"free_bytes": free})
    values = {"free_bytes": free, "write_bytes_per_s": rate}
    finding = f"{size(rate)}/s written and synced, {size(free)} free at {nearest}"
    if free < 10e9:
        return Check("run folder", "warn", finding, "free some space before a long run: checkpoints need it", values)
    if rate < 50e6:
        fix = "keep runs on a local disk: aurora train CONFIG --run DIR"
        return Check("run folder", "warn", f"{finding}; saves will be slow", fix, values)
    return Check("run folder", "ok", finding, values=values)


def _write_rate(folder: Path) -> float:
    """Bytes/s when 64 MiB are written and synced."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".aurora-doctor-") as file:
        start = time.perf_counter()
        for _ in range(_WRITE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _WRITE_BYTES / (time.perf_counter() - start)


def check_cache() -> Check:
    """The size of the cache of prepared data and compiled programs."""
    folder = cache_folder()
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Check("cache", "ok", f"{size(held)} at {folder} (safe to delete)", values={"bytes": held})


def check_shared_memory() -> Check:
    """Free space in /dev/shm, which data workers and NCCL use; containers often limit it to 64 MB."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Check("/dev/shm", "warn", "missing", "mount -t tmpfs tmpfs /dev/shm")
    free = shutil.disk_usage(shm).free
    if free < 512e6:
        return Check("/dev/shm", "warn", f"{size(free)} free", "start the container with --shm-size=8g")
    return Check("/dev/shm", "ok", f"{size(free)} free")


def check_file_limit() -> Check:
    """The limit of open files: Orbax opens one or more per parameter while it saves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        return Check("open files", "warn", f"at most {soft} (hard limit {hard})", f"ulimit -n {min(hard, 65536)}")
    return Check("open files", "ok", f"at most {soft}")


def check_clock() -> Check:
    """Whether the wall clock is later than this package's release."""
    if time.time() < 1_750_000_000:
        when = time.strftime("%Y-%m-%d")
        return Check("clock", "warn", f"shows {when}; event times will be wrong", "timedatectl set-ntp true")
    return Check("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %Z"))
