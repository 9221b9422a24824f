"""The update within the backward pass: what it trains is what the ordinary step trains, without a set of gradients."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_train import mesh as meshes
from aurora_train import optimizer as optimizers
from aurora_train.cli.main import main
from aurora_train.config import load
from aurora_train.config.schema import Optimizer as OptimizerConfig
from aurora_train.errors import UserError
from aurora_train.machine.targets import find_machine
from aurora_train.memory.account import tree_bytes
from aurora_train.memory.liveness import profile
from aurora_train.memory.plan import Plan
from aurora_train.memory.verify import can_compile_for_gpu, compiled_bytes
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.stack import Segment
from aurora_train.recipe import Loss
from aurora_train.train.rehearsal import rehearse
from aurora_train.train.state import draw
from aurora_train.train.step import make_step

BATCH, LENGTH, VOCAB = 4, 12, 61
SLOW = pytest.mark.slow
CUTS = {
    "all recomputed": [Segment(0, 4, ())],
    "two segments": [Segment(0, 2, ("attn_out",)), Segment(2, 4, ("attn_out", "mlp_up"))],
    "everything kept": [Segment(0, 4)],
    "unrolled": [Segment(0, 4, None, True)],
}


class Language:
    """A decoder with dropout on packed random tokens: keys, segments and rotations are closed over by every layer."""

    def __init__(self, calls=1, **shape):
        defaults = {"width": 16, "layers": 4, "heads": 2, "mlp_width": 32, "dropout": 0.2, "max_length": LENGTH}
        self.shape, self.calls = DecoderConfig(**defaults | shape), calls
        self.config = SimpleNamespace(train=SimpleNamespace(precision="float32"))

    def model(self, rngs):
        return Decoder(self.shape, VOCAB, "float32", rngs)

    def loss(self, model, batch, key):
        hidden = sum(model(batch["tokens"], segments=batch["segments"], keys=key) for _ in range(self.calls))
        return Loss(*model.nll(hidden, batch["targets"], batch["weights"]))


def batch_of(number):
    draw = np.random.default_rng(number)
    tokens = draw.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:],
        "segments": np.repeat([[0] * 5 + [1] * 7], BATCH, 0).astype(np.int32),
        "weights": (draw.random((BATCH, LENGTH)) < 0.8).astype(np.float32),
        "example": np.arange(BATCH, dtype=np.uint32) + number * BATCH,
    }  # fmt: skip


def made(recipe, cuts, ema=None, mesh=None, **settings):
    """(blueprint, {fuse: step})"""
    optimizer = optimizers.build(OptimizerConfig(**{"clip": None, "lr": 1e-2} | settings), 10)
    mesh = mesh or meshes.make_mesh(1, 1)
    blueprint = draw(recipe, Plan(BATCH, 1, {"stack": cuts}), optimizer, mesh, seed=0, ema=ema is not None)
    steps = {
        fuse: jax.jit(
            make_step(recipe, blueprint, optimizer, seed=0, accumulation=1, ema=ema, fuse=fuse), donate_argnums=0
        )
        for fuse in (False, True)
    }
    return blueprint, steps


def trained(blueprint, step, batches):
    state, told = blueprint.initialise(), []
    for batch in batches:
        state, metrics = step(state, batch)
        told.append({name: float(value) for name, value in metrics.items()})
    return state, told


def close(one, other, rtol=2e-5, atol=1e-6):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol, atol, err_msg=str(path))


@pytest.mark.parametrize("cuts", [pytest.param(cut, id=n, marks=() if i == 1 else SLOW) for i, (n, cut) in
                                  enumerate(CUTS.items())])
def test_five_steps_are_those_of_the_ordinary_step(cuts):
    blueprint, steps = made(Language(), cuts, ema=0.9)
    batches = [batch_of(number) for number in range(5)]
    (plain, told), (fused, told_fused) = (trained(blueprint, steps[fuse], batches) for fuse in (False, True))
    for a, b in zip(told, told_fused, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[k] for k in sorted(a)], [b[k] for k in sorted(a)], rtol=1e-5)
    assert told[0]["loss"] > told[-1]["loss"] and told[0]["skipped"] == 0
    close(plain, fused)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"name": "muon"}, {"name": "lion", "lr": 1e-3}, {"name": "adafactor"},
    {"moments": "bfloat16", "master": "bfloat16"}, {"moments": "int8"}, {"name": "muon", "moments": "int8"},
])  # fmt: skip
def test_every_optimizer_can_be_fused(settings):
    recipe = Language(width=64, mlp_width=128, dropout=0.0)
    blueprint, steps = made(recipe, CUTS["all recomputed"], **settings)
    (plain, told), (fused, told_fused) = (trained(blueprint, steps[f], [batch_of(0)] * 2) for f in (False, True))
    np.testing.assert_allclose([t["loss"] for t in told], [t["loss"] for t in told_fused], rtol=1e-4)
    same = [
        float(np.mean(np.asarray(a.astype(jnp.float32)) == np.asarray(b.astype(jnp.float32))))
        for a, b in zip(jax.tree.leaves(plain.opt_state), jax.tree.leaves(fused.opt_state), strict=True)
        if not jnp.issubdtype(a.dtype, jnp.floating)
    ]
    assert min(same) > 0.9  # a code may round the other way where the last bit of a gradient differs
    assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fused), strict=True))


def test_no_gradient_of_the_whole_stack_is_ever_held():
    """As XLA:GPU would have it; on a CPU its loops keep copies of their own."""
    recipe = Language(width=128, layers=8, mlp_width=512, dropout=0.0)
    blueprint, steps = made(recipe, [Segment(0, 8, ())])
    number = len(jax.tree.leaves(blueprint.state))
    plain, fused = (
        profile(jax.make_jaxpr(steps[fuse])(blueprint.state, batch_of(0)), donated=frozenset(range(number))).peak
        for fuse in (False, True)
    )
    assert plain - fused > 0.8 * tree_bytes(blueprint.state.params["stack"]), (plain, fused)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile_for_gpu(), reason="needs the extra [plan]")
def test_compiled_for_a_gpu_it_holds_no_set_of_gradients(tmp_path):
    tree = {
        "recipe": "language_model", "model": {"width": 512, "layers": 8, "heads": 8, "max_length": 256},
        "data": {"sequence": 256, "tokenizer": {"kind": "bpe", "vocab": 1024}}, "optimizer": {"clip": None},
        "train": {"batch": 2, "precision": "bfloat16"}, "memory": {"accumulation": 1},
    }  # fmt: skip
    needed = {}
    for fuse in (False, True):
        (tmp_path / "case.yaml").write_text(json.dumps(tree | {"memory": {"accumulation": 1, "fuse_update": fuse}}))
        config = load(tmp_path / "case.yaml")
        program = rehearse(config, config.recipe_class(config, tmp_path), target=find_machine("h100"))
        needed[fuse] = compiled_bytes(program.compile(Plan(2, 1, {"stack": [Segment(0, 8, ())]}))).peak
    stack = tree_bytes(program.blueprint(Plan(2, 1, {"stack": [Segment(0, 8, ())]})).state.params["stack"])
    assert needed[False] - needed[True] > 0.5 * stack, (needed, stack)  # one of eight units has its gradient and more


def test_residuals_that_are_inputs_of_a_unit_are_not_stacked():
    """Weights, keys, rotations and segments are there anyway: of each unit, its input alone is kept."""
    blueprint, steps = made(Language(), CUTS["all recomputed"])
    jaxpr = jax.make_jaxpr(steps[True])(blueprint.state, batch_of(0)).jaxpr.eqns[-1].params["jaxpr"].jaxpr
    forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    kept = [v.aval.shape for v in forward.outvars[forward.params["num_carry"] :]]
    assert [shape for shape in kept if np.prod(shape) > 4] == [(4, BATCH, LENGTH, 16)], kept


def test_a_loss_that_is_no_number_changes_nothing():
    blueprint, steps = made(Language(), CUTS["two segments"])
    bad = batch_of(0) | {"weights": np.full((BATCH, LENGTH), np.nan, np.float32)}
    state, told = trained(blueprint, steps[True], [batch_of(1), bad])
    before, _ = trained(blueprint, steps[True], [batch_of(1)])
    assert told[1]["skipped"] == 1 and told[0]["skipped"] == 0
    for name in ("params", "opt_state"):
        for a, b in zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(before, name)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert int(state.step) == 2


def test_a_stack_called_twice_is_refused():
    blueprint, steps = made(Language(calls=2), CUTS["all recomputed"])
    with pytest.raises(UserError, match="calls the stack 'stack' 2 times"):
        steps[True].lower(blueprint.state, batch_of(0))


@pytest.mark.slow
def test_on_eight_devices_it_trains_the_same():
    mesh = meshes.make_mesh(2, 2)
    blueprint, steps = made(Language(), CUTS["all recomputed"], mesh=mesh)
    single, one = made(Language(), CUTS["all recomputed"])
    batches = [batch_of(number) for number in range(3)]
    many = trained(blueprint, steps[True], batches)[1]
    alone = trained(single, one[True], batches)[1]
    np.testing.assert_allclose([t["loss"] for t in many], [t["loss"] for t in alone], rtol=1e-5)


TREE = {
    "recipe": "language_model", "model": {"width": 64, "layers": 4, "heads": 2},
    "data": {"sequence": 64, "tokenizer": {"kind": "byte"}}, "train": {"batch": 4}, "mesh": {"data": 1},
}  # fmt: skip


@pytest.mark.parametrize("settings,word", [
    ([], "optimizer.clip=null"),
    (["optimizer.clip=null", "memory.accumulation=2"], "memory.accumulation=1"),
    (["optimizer.clip=null", "model.lora.rank=4"], "memory.fuse_update=false"),
])  # fmt: skip
def test_what_it_cannot_be_combined_with_is_refused(tmp_path, capsys, settings, word):
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(TREE))
    assert main(["plan", str(file), "memory.fuse_update=true", *settings]) == 2
    told = capsys.readouterr().err
    assert "memory.fuse_update" in told and word in told and "Traceback" not in told


def test_the_planner_never_cuts_the_batch_of_a_fused_update(tmp_path, capsys):
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(TREE))
    asked = ["plan", str(file), "memory.fuse_update=true", "optimizer.clip=null", "--budget", "1GB", "--json"]
    assert main(asked) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["microbatch"], plan["accumulation"]) == (4, 1) and plan["compiled_bytes"] <= 10**9
