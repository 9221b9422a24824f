"""Eight simulated devices train as one does, under any mesh, and each really holds its share of the state."""

import json
import re
import subprocess
import sys
from pathlib import Path

import babble
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
from aurora_train.nn.stack import Segment
from aurora_train.train.state import together
from pieces import rehearsed
from aurora_train.data.batches import read_batch

def far(a, b):
    "Against the largest of `b`; a leaf that has no gradient on one device (a LoRA's first factor) has none anywhere."
    return float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1.0))


out = {}
for name, (file, settings, shape, steps) in json.loads(sys.argv[1]).items():
    config = load(file, settings)
    model, mesh = config.model, meshes.make_mesh(*shape)
    units = model.layers // len(getattr(model, "rows", [0]))
    program, plan = rehearsed(config, [Segment(0, units, ())], accumulation=1, mesh=mesh)
    compiled = program.compile(plan)
    step, state = together(compiled), program.initialiser(plan).result()()
    source, losses, gradients = program.recipe.data("train"), [], {}
    for number in range(steps):
        batch = jax.device_put(read_batch(source, 0, config.train.batch, number), meshes.batch_sharding(mesh))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        if number == 0:  # a tenth of the gradient, clipped
            gradients = [np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
                         if ".mu" in jax.tree_util.keystr(path)]
    first = gradients if shape == [1, 1, 1] else first
    parts = {"params": state.params, "opt_state": state.opt_state}
    out[name] = {
        "losses": losses,
        "gradients": float(np.max([far(a, b) for a, b in zip(gradients, first, strict=True)])),
        "total": {k: sum(leaf.nbytes for leaf in jax.tree.leaves(v)) for k, v in parts.items()},
        "held": {k: list(meshes.bytes_per_device(v).values()) for k, v in parts.items()},
        "text": compiled.as_text(), "units": units,
    }
print(json.dumps(out))
"""

PLAIN = ["optimizer.ema=null"]
TOY = ["model.width=32", "optimizer.name=adamw", *PLAIN]
RUNS = {"one": ("toy.yaml", TOY, (1, 1, 1), STEPS), "2x4": ("toy.yaml", TOY, (2, 4, 1), STEPS)}
MUON = [*TOY[:1], "optimizer.name=muon", *PLAIN]

# Three units each, a number that no batch has; attention whose kernel is cheap to compile.
DENSE = ["model.layers=3", "model.attention=reference"]
# One key head for four devices, a norm over a projection that is cut, biases, a head of its own.
ODD = [*DENSE, "model.kv_heads=1", "model.qk_norm=projection", "model.tied=false", "model.bias=all"]
LORA = [*DENSE, "model.lora={rank: 4}"]
NF4 = [*DENSE, "model.width=128", "model.heads=8", "model.lora={rank: 4, base: nf4}"]
# The outputs of Gated DeltaNet are tiny where a document begins. With the usual 1e-5 under the root, the norms after it
# multiply rounding by hundreds: one device in two parts then differs from one in one part as much as two devices do.
DELTA = [*DENSE, "model.layer_table=[{kind: linear}, {kind: linear}, {}]", "model.norm_eps=0.01",
         "model.linear={key_heads: 2, value_heads: 4, key_dim: 8, value_dim: 8}"]  # fmt: skip
MODELS = {"dense": DENSE, "odd": ODD, "lora": LORA, "nf4": NF4, "delta": DELTA}

# All three axes at once; `RUNS` has data and fsdp, and a release the others with fifty steps.
SLOW = [("odd", (2, 2, 2)), ("nf4", (2, 2, 2)), ("delta", (2, 2, 2))]
RELEASE = [("dense", (8, 1, 1)), ("dense", (1, 1, 4)), ("dense", (2, 4, 1)), ("dense", (1, 4, 2)), ("dense", (4, 1, 2)),
           ("dense", (2, 2, 2)), ("odd", (1, 1, 4)), ("odd", (2, 2, 2)), ("nf4", (1, 8, 1)), ("odd", (1, 2, 4)),
           ("dense", (1, 8, 1)), ("nf4", (2, 2, 2)), ("delta", (2, 2, 2)),
           ("lora", (2, 2, 2)), ("nf4", (1, 2, 4)), ("delta", (2, 1, 1)), ("delta", (1, 4, 2)),
           ("delta", (4, 2, 1))]  # fmt: skip


def measure(runs, tmp_path_factory):
    """What `SCRIPT` measures of each run, from one process with eight devices. A run on one device precedes others."""
    folder = tmp_path_factory.mktemp("mesh")
    toy.write(folder)
    babble.write(folder)
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(runs), str(tests / "train"), str(tests.parent)], cwd=folder,
        env=Aurora(folder, folder / "cache").environment(devices=8), capture_output=True, text=True, timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def measure_cases(cases, steps, tmp_path_factory):
    runs = {}
    for model, shape in sorted(cases):
        runs[f"{model} one"] = ("babble.yaml", [*MODELS[model], *PLAIN], (1, 1, 1), steps)
        runs[f"{model} {shape}"] = ("babble.yaml", [*MODELS[model], *PLAIN], shape, steps)
    return measure(runs, tmp_path_factory)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return measure(RUNS, tmp_path_factory)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return measure_cases(SLOW, 10, tmp_path_factory)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return measure_cases(RELEASE, STEPS, tmp_path_factory)


def assert_cut(run, parts):
    for what in ("params", "opt_state"):
        held, total = run["held"][what], run["total"][what]
        assert len(held) == 8 and len(set(held)) == 1
        # All but norms, biases and counts is cut: they are under a twelfth of this model.
        assert total / parts <= held[0] <= total / parts + total / 12, what


def farthest(measured, name, other):
    return float(np.max(np.abs(np.array(measured[name]["losses"]) / np.array(measured[other]["losses"]) - 1)))


def assert_like_one_device(measured, model, shape):
    run, one = measured[f"{model} {shape}"], measured[f"{model} one"]
    print(f"{model} {shape}: losses within {farthest(measured, f'{model} {shape}', f'{model} one'):.1e}, "
          f"gradients within {run['gradients']:.1e}")  # fmt: skip
    assert one["losses"][-1] < one["losses"][0]
    assert farthest(measured, f"{model} {shape}", f"{model} one") < 1e-5
    assert run["gradients"] < 1e-4
    assert_cut_by_collectives(run, shape)


def assert_cut_by_collectives(run, shape):
    """What is communicated is what the axes ask for, and never every unit of a stack at once."""
    made = re.findall(r"= \(?\w+\[([\d,]*)\][^=\n]* (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", run["text"])
    kinds = {kind for _, kind in made}
    assert "all-reduce" in kinds  # of gradients, or of products over a cut axis
    assert ("all-gather" in kinds) or shape[1] == shape[2] == 1  # of the weights of one unit, or of heads
    gathered = [tuple(map(int, dims.split(","))) for dims, kind in made if kind == "all-gather" and dims]
    stacks = [dims for dims in gathered if len(dims) == 3 and dims[0] == run["units"] and min(dims[1:]) >= 16]
    assert not stacks, stacks


def test_fifty_losses_of_eight_devices_are_those_of_one(measured):
    assert len(measured["2x4"]["losses"]) == STEPS and measured["one"]["losses"][-1] < measured["one"]["losses"][0]
    assert farthest(measured, "2x4", "one") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("model", "shape"), SLOW)
def test_losses_and_gradients_under_a_mesh_are_those_of_one_device(model, shape, short):
    assert_like_one_device(short, model, shape)


@pytest.mark.release
@pytest.mark.parametrize(("model", "shape"), RELEASE)
def test_fifty_losses_under_a_mesh_are_those_of_one_device(model, shape, long):
    assert_like_one_device(long, model, shape)


@pytest.mark.slow
def test_muon_on_eight_devices_follows_one_device_and_is_cut_as_well(tmp_path_factory):
    shapes = {"one": (1, 1, 1), "2x4": (2, 4, 1)}
    runs = {name: ("toy.yaml", MUON, shape, STEPS) for name, shape in shapes.items()}
    measured = measure(runs, tmp_path_factory)
    print(f"muon, 2x4 against one: losses within {farthest(measured, '2x4', 'one'):.1e}")
    assert farthest(measured, "2x4", "one") < 1e-4
    assert_cut(measured["2x4"], 4)


def test_parameters_and_moments_are_really_cut_over_fsdp(measured):
    assert_cut(measured["2x4"], 4)


def test_one_device_holds_all_there_is(measured):
    for what, total in measured["one"]["total"].items():
        assert measured["one"]["held"][what] == [total]


def test_a_dimension_that_the_mesh_does_not_divide_stays_whole_and_an_axis_is_used_once():
    mesh = jax.sharding.AbstractMesh((1, 4, 2), meshes.AXES)
    assert meshes.spec((8, 16), ("embed", "mlp"), mesh) == jax.P("fsdp", "tensor")
    assert meshes.spec((3, 8, 8), ("layers", "mlp", "embed"), mesh) == jax.P(None, "tensor", "fsdp")
    assert meshes.spec((8, 8), ("embed", "embed"), mesh) == jax.P("fsdp", None)
    assert meshes.spec((6, 15), ("embed", "vocab"), mesh) == jax.P()
    assert meshes.spec((6,), None, mesh) == jax.P()


def test_a_mesh_that_does_not_fit_the_machine_is_refused_with_one_that_does():
    with pytest.raises(UserError, match="needs 4096 devices") as caught:
        meshes.make_mesh(64, 64)
    assert "data: -1" in str(caught.value)


@pytest.mark.slow
def test_a_plan_is_for_one_device_of_a_mesh_and_lists_what_a_step_communicates(tmp_path):
    aurora, config, plans = Aurora(tmp_path, tmp_path / "cache"), babble.write(tmp_path), {}
    for devices, mesh in ((1, ()), (4, ("mesh.fsdp=2", "mesh.tensor=2"))):
        done = aurora.good("plan", config, *DENSE, "model.width=64", *mesh, "--json", devices=devices)
        plans[devices] = json.loads(done.stdout)
    assert "collectives" not in plans[1]
    assert {"all-reduce", "all-gather"} <= plans[4]["collectives"].keys()
    one, four = plans[1]["by_cause"], plans[4]["by_cause"]
    for cause in ("parameters", "optimizer"):
        assert one[cause] / 4 <= four[cause] <= 1.05 * one[cause] / 4, cause
