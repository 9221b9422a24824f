"""Eight simulated devices train as one does, and each really holds its share of the state."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from kit import Aurora

from aurora_train import mesh as meshes
from aurora_train.errors import UserError

STEPS = 50

SCRIPT = """
import json, sys
sys.path[:0] = sys.argv[2:4]
import jax
import numpy as np
from aurora_train import mesh as meshes
from aurora_train.config import load
from aurora_train.plan.plan import Plan
from pieces import assembled
from aurora_train.data.batches import read_batch

out = {}
for name, (data, fsdp, optimizer) in json.loads(sys.argv[1]).items():
    config = load("toy.yaml", ["model.width=32", f"optimizer.name={optimizer}", "optimizer.ema=null"])
    mesh = meshes.make_mesh(data, fsdp)
    recipe, initialise, step = assembled(config, accumulation=1, mesh=mesh)
    source, state, losses = recipe.data("train"), initialise(), []
    for number in range(%d):
        batch = jax.device_put(read_batch(source, 0, 8, number), meshes.batch_sharding(mesh))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    parts = {"params": state.params, "opt_state": state.opt_state}
    out[name] = {
        "losses": losses,
        "total": {k: sum(leaf.nbytes for leaf in jax.tree.leaves(v)) for k, v in parts.items()},
        "held": {k: list(meshes.bytes_per_device(v).values()) for k, v in parts.items()},
    }
print(json.dumps(out))
""".replace("%d", str(STEPS))

RUNS = {
    "one": (1, 1, "adamw"), "2x4": (2, 4, "adamw"), "8": (1, 8, "adamw"),
}
MUON = {"one": (1, 1, "muon"), "2x4": (2, 4, "muon")}


def measure(runs, tmp_path_factory):
    """Losses, total bytes and bytes per device of each run, from one process with eight devices."""
    folder = tmp_path_factory.mktemp("mesh")
    toy.write(folder)
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(runs), str(tests / "train"), str(tests.parent)], cwd=folder,
        env=Aurora(folder, folder / "cache").environment(devices=8), capture_output=True, text=True, timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return measure(RUNS, tmp_path_factory)


def assert_cut(run, parts):
    for what in ("params", "opt_state"):
        held, total = run["held"][what], run["total"][what]
        assert len(held) == 8 and len(set(held)) == 1
        # All but norms, biases and counts is cut: they are under a twelfth of this model.
        assert total / parts <= held[0] <= total / parts + total / 12, what


def farthest(measured, name, other):
    return float(np.max(np.abs(np.array(measured[name]["losses"]) / np.array(measured[other]["losses"]) - 1)))


@pytest.mark.parametrize("name", ["2x4", "8"])
def test_fifty_losses_of_eight_devices_are_those_of_one(name, measured):
    assert len(measured[name]["losses"]) == STEPS and measured["one"]["losses"][-1] < measured["one"]["losses"][0]
    assert farthest(measured, name, "one") < 1e-5


@pytest.mark.slow
def test_muon_on_eight_devices_follows_one_device_and_is_cut_as_well(tmp_path_factory):
    measured = measure(MUON, tmp_path_factory)
    print(f"muon, 2x4 against one: losses within {farthest(measured, '2x4', 'one'):.1e}")
    assert farthest(measured, "2x4", "one") < 1e-4
    assert_cut(measured["2x4"], 4)


@pytest.mark.parametrize("name,parts", [("2x4", 4), ("8", 8)])
def test_parameters_and_moments_are_really_cut_over_fsdp(name, parts, measured):
    assert_cut(measured[name], parts)


def test_one_device_holds_all_there_is(measured):
    for what, total in measured["one"]["total"].items():
        assert measured["one"]["held"][what] == [total]


def test_a_dimension_that_the_mesh_does_not_divide_stays_whole_and_an_axis_is_used_once():
    mesh = jax.sharding.AbstractMesh((1, 4), meshes.AXES)
    assert meshes.spec((8, 16), ("embed", "mlp"), mesh) == jax.sharding.PartitionSpec("fsdp", None)
    assert meshes.spec((3, 8, 8), ("layers", "mlp", "embed"), mesh) == jax.sharding.PartitionSpec(None, None, "fsdp")
    assert meshes.spec((8, 8), ("embed", "embed"), mesh) == jax.sharding.PartitionSpec("fsdp", None)
    assert meshes.spec((6, 16), ("embed", "mlp"), mesh) == jax.sharding.PartitionSpec(None, None)
    assert meshes.spec((6,), None, mesh) == jax.sharding.PartitionSpec()


def test_a_mesh_that_does_not_fit_the_machine_is_refused_with_one_that_does():
    with pytest.raises(UserError, match="needs 4096 devices") as caught:
        meshes.make_mesh(64, 64)
    assert "data: -1" in str(caught.value)
