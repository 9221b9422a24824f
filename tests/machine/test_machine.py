"""The table knows its machines and says nothing of others; the budget is what can really be had."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from aurora_train.machine.memory import (
    budget_bytes,
    give_back_freed,
    held_beside_processes,
    host_memory,
    memory_pressure,
    most_for_a_run,
    process_memory,
    process_memory_bytes,
    processes_limited_with,
    reserve_bytes,
)
from aurora_train.machine.profile import (
    Machine,
    choose_devices,
    environment_defaults,
    installed_gpus,
    peak_flops,
    precision_expected,
    precision_here,
    precision_on,
    this_machine,
)
from aurora_train.machine.table import known_machines, lookup

GIB = 2**30


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA GB10", "DGX Spark (GB10)"),
        ("NVIDIA GB300", "DGX Station (GB300)"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200 96 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell Max-Q"),
    ],
)
def test_a_known_device_is_found_by_what_jax_calls_it(kind, name):
    assert lookup(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA RTX 6000", ""])
def test_an_unknown_device_has_no_row(kind):
    assert lookup(kind) is None


def test_every_row_is_plausible_and_every_figure_has_a_source():
    names = [kind for row in known_machines().values() for kind in row.kinds]
    assert len(names) == len(set(names))
    for row in known_machines().values():
        assert all(figure.source for figure in (*row.peak_flops.values(), row.bandwidth, row.memory))
        rates = [row.peak_flops[d].value for d in ("float32", "tf32", "bfloat16", "fp8", "fp4") if d in row.peak_flops]
        assert rates == sorted(rates)
        assert 1e13 < row.peak_flops["bfloat16"].value < 1e16
        assert 1e11 < row.bandwidth.value < 1e13 and 1e10 < row.memory.value < 1e12


def test_the_processor_has_no_peak():
    machine = this_machine()
    assert machine.platform == "cpu" and machine.unified
    assert peak_flops(machine, "bfloat16") is None
    json.dumps(machine.describe())


def box(tmp_path, total=128, available=100, **files):
    """A tree like that of Linux; amounts in GiB."""
    (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal: {total * GIB // 1024} kB\nMemAvailable: {available * GIB // 1024} kB\n"
        "SwapTotal: 0 kB\nSwapFree: 0 kB\n"
    )
    for path, content in files.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    return tmp_path


def test_a_cgroup_v2_limit_anywhere_above_holds_and_page_cache_counts_as_free(tmp_path):
    root = box(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/lab/run\n",
            "sys/fs/cgroup/lab/run/memory.max": "max\n",
            "sys/fs/cgroup/lab/memory.max": f"{16 * GIB}\n",
            "sys/fs/cgroup/lab/memory.current": f"{6 * GIB}\n",
            "sys/fs/cgroup/lab/memory.stat": f"anon 1\ninactive_file {4 * GIB}\n",
        },
    )
    memory = host_memory(root)
    assert (memory.cgroup_limit, memory.cgroup_used, memory.usable) == (16 * GIB, 2 * GIB, 14 * GIB)


def test_a_cgroup_v1_limit_holds_where_only_the_top_is_mounted(tmp_path):
    root = box(
        tmp_path,
        **{
            "proc/self/cgroup": "4:memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}\n",
        },
    )
    assert host_memory(root).usable == 6 * GIB


def test_what_was_read_twice_counts_as_free_and_memory_high_as_a_limit(tmp_path):
    root = box(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/user.slice/run.service\n",
            "sys/fs/cgroup/user.slice/run.service/memory.max": f"{32 * GIB}\n",
            "sys/fs/cgroup/user.slice/run.service/memory.high": f"{16 * GIB}\n",
            "sys/fs/cgroup/user.slice/run.service/memory.current": f"{15 * GIB}\n",
            "sys/fs/cgroup/user.slice/run.service/memory.stat": (
                f"anon {2 * GIB}\nfile {12 * GIB}\nshmem {GIB}\ninactive_file {3 * GIB}\nactive_file {7 * GIB}\n"
                f"slab_reclaimable {GIB}\n"
            ),
        },
    )
    memory = host_memory(root)
    assert (memory.size, memory.cgroup_used, memory.usable) == (16 * GIB, 4 * GIB, 12 * GIB)
    assert held_beside_processes(root) == {
        "page cache": 11 * GIB, "tmpfs and shared memory": GIB, "swap in use": 0
    }  # fmt: skip


def test_of_nested_cgroups_the_one_with_the_least_room_counts_and_v1_sums_what_is_below(tmp_path):
    top = "sys/fs/cgroup/memory"
    root = box(
        tmp_path,
        **{
            "proc/self/cgroup": "9:name=systemd:/lab\n4:cpu,memory:/lab/run\n0::/\n",
            f"{top}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{top}/lab/memory.limit_in_bytes": f"{32 * GIB}\n",
            f"{top}/lab/memory.usage_in_bytes": f"{31 * GIB}\n",
            f"{top}/lab/memory.stat": f"inactive_file 0\nactive_file 0\ntotal_inactive_file {GIB}\ntotal_shmem {GIB}\n",
            f"{top}/lab/run/memory.limit_in_bytes": f"{16 * GIB}\n",
            f"{top}/lab/run/memory.usage_in_bytes": f"{4 * GIB}\n",
            f"{top}/lab/cgroup.procs": "11\n",
            f"{top}/lab/run/cgroup.procs": "12\n13\n",
            "sys/fs/cgroup/unified/memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        },
    )
    memory = host_memory(root)
    assert (memory.size, memory.usable) == (32 * GIB, 2 * GIB), "others in /lab hold what /lab/run may still ask for"
    assert processes_limited_with(root) == {11, 12, 13}
    assert held_beside_processes(root)["tmpfs and shared memory"] == GIB


def test_pressure_is_the_machines_or_the_cgroups_whichever_is_higher(tmp_path):
    def account(some):
        return f"some avg10={some:.2f} avg60=9.00 avg300=9.00 total=9\nfull avg10=99.00 avg60=9.00 total=9\n"

    assert memory_pressure(box(tmp_path)) == 0, "a kernel without such an account"
    root = box(tmp_path, **{"proc/self/cgroup": "0::/run\n", "proc/pressure/memory": account(12.5)})
    assert memory_pressure(root) == 12.5
    box(tmp_path, **{"sys/fs/cgroup/run/memory.pressure": account(40)})
    assert memory_pressure(root) == 40


def test_the_reader_agrees_with_this_machine():
    memory, held = host_memory(), held_beside_processes()
    assert 0 < memory.usable <= memory.size <= memory.total and 0 <= memory.swap_used <= memory.swap_total
    assert 0 <= memory_pressure() <= 100 and held["page cache"] > 0
    among = processes_limited_with()
    assert among is None or os.getpid() in among
    assert memory.size / 2 <= most_for_a_run(memory) < memory.size


def test_no_limit_means_what_is_available(tmp_path):
    root = box(tmp_path, **{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"})
    assert host_memory(root).usable == 100 * GIB and host_memory(root).cgroup_limit is None


def machine(tmp_path, **changed):
    facts = dict(
        platform="gpu", device_kind="NVIDIA GB10", device_count=1, left_out=(), device_memory_bytes=121 * GIB,
        known=lookup("NVIDIA GB10"), unified=True, cpu_model="", cpu_cores=20, memory=host_memory(box(tmp_path)),
    )  # fmt: skip
    return Machine(**{**facts, **changed})


def test_on_unified_memory_the_budget_is_what_is_available_less_a_reserve(tmp_path):
    amount, reason = budget_bytes("auto", machine(tmp_path))
    assert amount == 100 * GIB - int(0.08 * 128 * GIB)
    assert "MemAvailable" in reason


def test_a_discrete_device_has_its_own_memory(tmp_path):
    h200 = machine(tmp_path, unified=False, known=lookup("NVIDIA H200"), device_kind="NVIDIA H200")
    assert budget_bytes("auto", h200)[0] == 121 * GIB


def test_simulated_devices_share_the_budget(tmp_path):
    eight = machine(tmp_path, platform="cpu", device_count=8, device_memory_bytes=None)
    assert budget_bytes("auto", eight)[0] == (100 * GIB - reserve_bytes(eight.memory)) // 8


def test_an_amount_is_taken_as_it_stands_and_one_too_large_is_said(tmp_path):
    amount, reason = budget_bytes("96GB", machine(tmp_path))
    assert amount == 96 * 10**9 and "more than" not in reason
    amount, reason = budget_bytes("500GiB", machine(tmp_path))
    assert amount == 500 * GIB and "more than" in reason


def test_this_process_holds_some_memory():
    held = process_memory()
    assert 0 < held["anonymous"] < held["resident"] <= held["peak_resident"]
    assert 0 < process_memory_bytes() < host_memory().total


@pytest.mark.parametrize("platform, capability, precision", [
    ("cpu", None, "float32"), ("tpu", None, "bfloat16"), ("gpu", "12.1", "bfloat16"), ("gpu", "9.0", "bfloat16"),
    ("gpu", "8.0", "bfloat16"), ("gpu", "7.5", "float32"), ("gpu", "gfx942", "bfloat16"), ("gpu", None, "float32"),
    ("METAL", None, "float32"),
])  # fmt: skip
def test_M8_an_accelerator_that_has_bfloat16_computes_in_it(platform, capability, precision):
    assert precision_on(platform, capability) == precision


def test_a_processor_that_has_bfloat16_computes_in_it_only_if_asked_for_its_native_format():
    able = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
    for choose in (precision_here, precision_expected):
        assert choose("auto") == choose() == "float32"
        assert choose("native") == ("bfloat16" if able else "float32")


def test_a_display_gpu_is_left_out():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

        def memory_stats(self):
            return {"bytes_limit": GIB}

    devices = [Device("NVIDIA RTX A400"), Device("NVIDIA GB300")]
    chosen, left_out = choose_devices(devices)
    assert chosen == devices[1:] and left_out == devices[:1]


def test_a_gpu_gets_reproducible_kernels_and_unified_memory_is_not_preallocated():
    spark = environment_defaults(Path("/c"), gpus=["NVIDIA GB10"], budget="1GiB", user_flags="--xla_foo=1")
    assert spark["XLA_FLAGS"] == "--xla_foo=1 --xla_gpu_deterministic_ops=true"
    assert spark["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert 0 < float(spark["XLA_PYTHON_CLIENT_MEM_FRACTION"]) <= 1
    station = environment_defaults(Path("/c"), gpus=["NVIDIA GB300"], user_flags="--xla_gpu_deterministic_ops=false")
    assert "XLA_FLAGS" not in station and "XLA_PYTHON_CLIENT_PREALLOCATE" not in station
    assert "XLA_FLAGS" not in environment_defaults(Path("/c"), gpus=[])


def test_the_driver_is_asked_for_the_gpus(tmp_path):
    report = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    report.parent.mkdir(parents=True)
    report.write_text("Model: \t\t NVIDIA GB10\nIRQ: 5\n")
    assert installed_gpus(tmp_path) == ["NVIDIA GB10"]


def test_the_environment_is_set_before_jax_and_what_the_user_set_wins(tmp_path):
    code = """
import os, sys
from aurora_train.machine.profile import prepare_environment
set_here = prepare_environment()
assert "jax" not in sys.modules and "HF_HUB_OFFLINE" not in set_here
import jax
assert jax.config.jax_compilation_cache_dir == os.environ["AURORA_CACHE"] + "/compile"
assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()
assert os.listdir(os.environ["AURORA_CACHE"] + "/compile")
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "HF_"))}
    environment |= {"AURORA_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_freed_memory_goes_back_to_the_kernel_though_something_behind_it_is_held():
    blocks = [b"x" * (100_000 + i) for i in range(1000)]
    last, held = blocks[-1], process_memory()["resident"]
    del blocks
    give_back_freed()
    assert held - process_memory()["resident"] > 80e6, last[:1]
