"""What `aurora doctor` says is missing: extras that are absent, and a jax that uses the NVIDIA GPU."""

import importlib.util
import json
import platform
import re
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
from machine.test_machine import box as memory_box
from machine.test_machine import machine

from aurora_train.machine.memory import host_memory
from aurora_train.machine.profile import installed_gpus, nvidia_driver, this_machine
from aurora_train.tools import doctor
from aurora_train.tools.doctor import check_disk, check_memory, examine

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
PLUGIN = any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin")))
VERSION = {  # as the two kinds of NVIDIA's module say it
    "580.82.09": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.82.09  Release Build",
    "550.54.15": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version: 12.3",
}


def test_L6_an_extra_that_is_absent_is_not_ok(monkeypatch, capsys):
    monkeypatch.setitem(doctor._EXTRAS, "nothing", (("no_such_module", "nor_this"), "a test"))
    absent = {name for name, (modules, _) in doctor._EXTRAS.items() if not any(map(importlib.util.find_spec, modules))}
    checks = doctor.check_extras()
    assert {check.name.removeprefix("extra ") for check in checks} == absent >= {"nothing"}
    assert all(check.status == "--" and not check.fatal for check in checks)
    assert json.loads(json.dumps(asdict(checks[-1])))["fix"] == "pip install 'aurora_train[nothing]'"
    doctor.show(checks)
    last = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"--    extra nothing +not installed; for a test", last[0]) and last[1].endswith("[nothing]'")


def test_L6_every_package_and_extra_of_the_project_is_looked_for():
    names = {re.match(r"[\w.-]+", line)[0] for line in PROJECT["dependencies"]}
    assert names <= set(doctor._CORE)
    for_us = {"test", "parity", "cuda12", "cuda13"}  # the last two are named where there is a GPU
    assert set(PROJECT["optional-dependencies"]) - for_us == set(doctor._EXTRAS)


@pytest.mark.parametrize("libc, status", [(("glibc", "2.27"), "warn"), (("", ""), "warn"), (("glibc", "2.39"), "ok")])
def test_L6_a_c_library_that_wheels_are_not_made_for_is_named(monkeypatch, libc, status):
    monkeypatch.setattr("platform.libc_ver", lambda: libc)
    check = doctor.check_python()
    assert check.status == status and platform.machine() in check.finding and (check.fix is None) == (status == "ok")


def box(folder: Path, driver: str) -> Path:
    """A /proc with one GPU and its driver."""
    report = folder / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    report.parent.mkdir(parents=True)
    report.write_text("Model: \t\t NVIDIA GB10\nIRQ: 1\n")
    (folder / "proc/driver/nvidia/version").write_text(VERSION[driver])
    return folder


@pytest.mark.skipif(PLUGIN or bool(installed_gpus()), reason="jax's CUDA plug-in or a GPU is here")
@pytest.mark.parametrize("driver, extra", [("580.82.09", "cuda13"), ("550.54.15", "cuda12")])
def test_L6_a_gpu_that_jax_cannot_use_is_named_with_the_command_for_its_driver(tmp_path, monkeypatch, driver, extra):
    root = box(tmp_path, driver)
    assert nvidia_driver(root) == driver and nvidia_driver(tmp_path / "none") is None
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (check,) = doctor.check_cuda(this_machine(), root)
    assert check.status == "warn" and check.fix == f"pip install 'aurora_train[{extra}]'"
    assert check.finding == f"NVIDIA GB10 (driver {driver}) is installed but this jax only uses the processor"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (check,) = doctor.check_cuda(this_machine(), root)
    assert check.fix == "unset JAX_PLATFORMS" and "JAX_PLATFORMS=cpu is set" in check.finding
    assert doctor.check_cuda(this_machine(), tmp_path / "none") == []


def test_doctor_finds_nothing_fatal_on_a_machine_that_passes_these_tests(tmp_path):
    checks = {check.name: check for check in examine(tmp_path / "runs")}
    assert not [check for check in checks.values() if check.fatal]
    assert checks["matmul float32"].values["flops_per_s"] > 1e8
    assert checks["run folder"].values["write_bytes_per_s"] > 0
    assert list(tmp_path.iterdir()) == []
    json.dumps([asdict(check) for check in checks.values()])


def test_doctor_says_that_a_folder_cannot_be_written():
    check = check_disk(Path("/proc/1"))
    assert check.fatal and check.fix


def test_a_folder_that_cannot_be_written_is_not_called_full():
    check = check_disk(Path("/proc/1"))
    assert check.fatal and "cannot write" in check.finding and "free" not in check.finding


def test_doctor_warns_of_a_budget_that_is_too_small(tmp_path):
    poor = machine(tmp_path / "poor", device_memory_bytes=None, memory=host_memory(memory_box(tmp_path / "b", 4, 2)))
    assert [check.status for check in check_memory(poor)] == ["ok", "warn"]
