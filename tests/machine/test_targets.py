"""Every known NVIDIA machine can be named, budgeted and compiled for without being there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aurora_train.errors import UserError
from aurora_train.machine.profile import DISCRETE_FRACTION, environment_defaults, plugin_without_driver
from aurora_train.machine.table import known_machines, lookup
from aurora_train.machine.targets import find_machine, machine_names

AMD = {"MI300X", "MI300A", "MI325X"}


def test_every_nvidia_row_has_a_slug_of_its_own_and_finds_itself():
    names = machine_names()
    assert len(set(names)) == len(names) == len(known_machines()) - len(AMD)
    for name in names:
        target = find_machine(name)
        assert target.slug == name and target.row.name not in AMD
        # What jax would call the device leads back to the same row: a plan can be matched with its machine.
        described = target.config_text.rsplit('device_description_str: "', 1)[1].split('"')[0]
        assert lookup(described) == target.row


@pytest.mark.parametrize(
    ("said", "slug"),
    [
        ("dgx-spark", "dgx-spark"),
        ("GB10", "dgx-spark"),
        ("GB300", "dgx-station"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H100 NVL", "h100-nvl"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("rtx_pro_6000", "rtx-pro-6000"),
        ("A100 40 GB", "a100-40gb"),
    ],
)
def test_a_machine_is_found_by_slug_or_by_any_name_of_it(said, slug):
    assert find_machine(said).slug == slug


def test_an_unknown_machine_is_answered_with_the_nearest_and_the_list():
    with pytest.raises(UserError, match="did you mean dgx-spark") as error:
        find_machine("dgx-sparc")
    assert "rtx-4090" in str(error.value) and "h200" in str(error.value)


@pytest.mark.parametrize("name", sorted(AMD))
def test_an_amd_device_is_known_and_the_reason_it_cannot_be_planned_for_is_said(name):
    with pytest.raises(UserError, match="known machine, but nothing can be compiled"):
        find_machine(name)


@pytest.mark.parametrize("name", machine_names())
def test_a_budget_is_less_than_the_memory_and_says_why(name):
    target = find_machine(name)
    # A "24 GB" card may hold 24 GiB: 7.4 % more than its label.
    assert 0.7 < target.budget_bytes / target.row.memory.value < 1.0
    assert target.budget_reason
    if not target.row.unified:
        fraction = float(environment_defaults(Path("/c"), gpus=[target.row.kinds[0]])["XLA_PYTHON_CLIENT_MEM_FRACTION"])
        assert fraction == DISCRETE_FRACTION
        seen = int(target.config_text.split("device_memory_size: ")[1].split()[0])
        assert target.budget_bytes == int(fraction * seen)


def test_the_budgets_that_were_checked_against_what_users_see():
    assert find_machine("dgx-spark").budget_bytes / 1e9 == pytest.approx(102, abs=0.1)
    assert find_machine("dgx-station").budget_bytes / 1e9 == pytest.approx(232, abs=1)
    assert find_machine("h200").budget_bytes / 2**30 == pytest.approx(0.92 * 139.8, abs=0.1)


def test_only_hopper_and_later_have_accelerated_features():
    for name in machine_names():
        target = find_machine(name)
        assert ("ACCELERATED_FEATURES" in target.config_text) == (target.compute_capability >= (9, 0))


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from aurora_train.machine.targets import find_machine, machine_names
loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w).astype(jnp.float32)
compiled = set()
for name in machine_names():
    target = find_machine(name)
    topology = topologies.get_topology_desc(platform="cuda", target_config=target.config_text, topology="1x1x1")
    device, capability = topology.devices[0], target.compute_capability
    assert device.compute_capability == "%d.%d" % capability, name
    if capability in compiled:
        continue
    compiled.add(capability)
    a = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    memory = jax.jit(jax.grad(loss)).lower(a, a).compile().memory_analysis()
    assert memory.argument_size_in_bytes == 2 * 256 * 256 * 2, name
assert compiled == {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}, compiled
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs jax's CUDA plug-in: pip install 'aurora_train[plan]'",
)
def test_a_program_compiles_for_every_compute_capability_without_the_device():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_plug_in_without_a_driver_is_told_from_a_gpu_machine(monkeypatch):
    import ctypes

    found = importlib.util.find_spec
    have = {"jax_cuda12_plugin": True, "jax_rocm_plugin": None, "libtpu": None, "jax_cuda13_plugin": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: have.get(name, found))

    def no_driver(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    assert plugin_without_driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
    assert not plugin_without_driver()
    monkeypatch.setitem(have, "jax_cuda12_plugin", None)
    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    assert not plugin_without_driver()
