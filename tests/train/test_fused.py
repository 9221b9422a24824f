"""The update within the backward pass: what it trains is what the ordinary step trains, without a set of gradients."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kit import records

from aurora_train import mesh as meshes
from aurora_train import optimizer as optimizers
from aurora_train.cli.main import main
from aurora_train.compat import open_jaxpr, scan_parts
from aurora_train.config import load
from aurora_train.config.schema import Optimizer as OptimizerConfig
from aurora_train.errors import UserError
from aurora_train.machine.targets import find_machine
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.stack import Segment
from aurora_train.plan.account import tree_bytes
from aurora_train.plan.plan import Plan
from aurora_train.plan.verify import can_compile_for_gpu, compiled_bytes
from aurora_train.recipe import Loss, Recipe
from aurora_train.train.hooks import features
from aurora_train.train.rehearsal import rehearse
from aurora_train.train.state import draw
from aurora_train.train.step import make_step

BATCH, LENGTH, VOCAB = 4, 12, 61
SLOW = pytest.mark.slow
CUTS = {
    "all recomputed": [Segment(0, 4, ())],
    "two segments": [Segment(0, 2, ("attn_out",)), Segment(2, 4, ("attn_out", "mlp_up"))],
    "everything kept": [Segment(0, 4)],
}


class Language(Recipe):
    """A decoder with dropout on packed random tokens: keys, segments and rotations are closed over by every layer."""

    def __init__(self, calls=1, loss=None, precision="float32", **shape):
        self.other_loss = loss
        defaults = {"width": 16, "layers": 4, "heads": 2, "mlp_width": 32, "dropout": 0.2, "max_length": LENGTH}
        self.shape, self.calls = DecoderConfig(**defaults | shape), calls
        self.config = SimpleNamespace(train=SimpleNamespace(dtype=precision))

    def model(self, rngs):
        return Decoder(self.shape, VOCAB, self.config.train.dtype, rngs)

    def loss(self, model, batch, key):
        if self.other_loss:
            return self.other_loss(self, model, batch, key)
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
    own = {fuse: features(ema=ema, fused=fuse) for fuse in (False, True)}
    blueprint = draw(recipe, Plan(BATCH, 1, {"stack": cuts}), optimizer, mesh, seed=0, features=own[False])
    steps = {
        fuse: jax.jit(
            make_step(recipe, blueprint, optimizer, own[fuse], seed=0, accumulation=1, fused=fuse), donate_argnums=0
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


def close(one, other, rtol=2e-5, atol=5e-6):
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
    stack, stack_fused = (trained(blueprint, steps[f], [batch_of(0)])[0].params["stack"] for f in (False, True))
    for a, b in zip(jax.tree.leaves(stack), jax.tree.leaves(stack_fused), strict=True):
        assert a.dtype == b.dtype
        # A rounding may fall the other way where a gradient's last bit differs; with other noise every second does.
        near = np.isclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-3, atol=1e-5)
        assert near.mean() > 0.8, near.mean()


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
    jaxpr = open_jaxpr(jax.make_jaxpr(steps[True])(blueprint.state, batch_of(0)).jaxpr.eqns[-1].params["jaxpr"])
    forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    kept = [v.aval.shape for v in forward.outvars[scan_parts(forward.params)[1] :]]
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
    with pytest.raises(UserError, match="calls the stack 'stack' of its model 2 times"):
        steps[True].lower(blueprint.state, batch_of(0))


def plain_loss(recipe, model, batch, key, through=lambda hidden: hidden):
    hidden = through(model(batch["tokens"], segments=batch["segments"], keys=key))
    return Loss(*model.nll(hidden, batch["targets"], batch["weights"]))


@pytest.mark.slow
def test_a_stack_that_no_gradient_reaches_is_trained_as_by_the_ordinary_step():
    """Moments decay and so do weights: zero is a gradient too."""
    recipe = Language(loss=lambda *given: plain_loss(*given, through=jax.lax.stop_gradient))
    blueprint, steps = made(recipe, CUTS["two segments"])
    (plain, told), (fused, told_fused) = (trained(blueprint, steps[f], [batch_of(0)] * 3) for f in (False, True))
    np.testing.assert_allclose([t["loss"] for t in told], [t["loss"] for t in told_fused], rtol=1e-5)
    close(plain, fused)


def with_a_penalty(recipe, model, batch, key):
    total, *rest = plain_loss(recipe, model, batch, key)
    return Loss(total + 1e-3 * sum(jnp.square(p).sum() for p in jax.tree.leaves(nnx.state(model.stack))), *rest)


def in_a_vmap(recipe, model, batch, key):
    def one(tokens, segments, key):
        return model(tokens[None], segments=segments[None], keys=key[None])[0]

    hidden = jax.vmap(one)(batch["tokens"], batch["segments"], key)
    return Loss(*model.nll(hidden, batch["targets"], batch["weights"]))


def in_a_scan(recipe, model, batch, key):
    def one(hidden, _):
        return hidden + model(batch["tokens"], segments=batch["segments"], keys=key), None

    hidden = jax.lax.scan(one, jnp.zeros((BATCH, LENGTH, 16)), None, length=2)[0]
    return Loss(*model.nll(hidden, batch["targets"], batch["weights"]))


@pytest.mark.parametrize("loss,why", [
    (with_a_penalty, "uses parameters of the stack 'stack' outside its call"),
    (in_a_vmap, "inside jit, vmap, scan"), (in_a_scan, "inside jit, vmap, scan"),
])  # fmt: skip
def test_a_loss_that_it_would_train_wrongly_is_refused(loss, why):
    blueprint, steps = made(Language(loss=loss), CUTS["all recomputed"])
    steps[False].lower(blueprint.state, batch_of(0))  # the ordinary step can
    with pytest.raises(UserError, match=why):
        steps[True].lower(blueprint.state, batch_of(0))


def test_in_bfloat16_its_gradients_are_as_near_as_its_rounding():
    blueprint, steps = made(Language(precision="bfloat16"), CUTS["all recomputed"], lr=1e-3)
    told, told_fused = (trained(blueprint, steps[f], [batch_of(n) for n in range(5)])[1] for f in (False, True))
    np.testing.assert_allclose([t["loss"] for t in told], [t["loss"] for t in told_fused], rtol=2e-4)


@pytest.mark.slow
def test_on_eight_devices_it_trains_the_same(tiny, aurora, tmp_path):
    fused = ["memory.fuse_update=true", "memory.accumulation=1", "optimizer.clip=null", "train.batch=8"]
    cut = ["mesh.data=2", "mesh.fsdp=4"]
    aurora.good("train", tiny, *fused, "--run", tmp_path / "one")
    aurora.good("train", tiny, *fused, *cut, "--run", tmp_path / "eight", devices=8)
    one, eight = ([r["loss"] for r in records(tmp_path / name) if "loss" in r] for name in ("one", "eight"))
    assert len(one) == len(eight) > 0
    np.testing.assert_allclose(one, eight, rtol=1e-4)


TREE = {
    "recipe": "language_model", "model": {"width": 64, "layers": 4, "heads": 2},
    "data": {"sequence": 64, "tokenizer": {"kind": "byte"}}, "train": {"batch": 4}, "mesh": {"data": 1},
}  # fmt: skip


@pytest.mark.parametrize("settings,word", [
    ([], "optimizer.clip=null"),
    (["optimizer.clip=null", "memory.accumulation=2"], "memory.accumulation=1"),
    (["optimizer.clip=null", "model.lora.rank=4"], "memory.fuse_update=false"),
    (["optimizer.clip=null", "memory.unroll=true"], "memory.unroll=auto"),
])  # fmt: skip
def test_what_it_cannot_be_combined_with_is_refused(tmp_path, capsys, settings, word):
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(TREE))
    for verb in ("plan", "check"):
        assert main([verb, str(file), "memory.fuse_update=true", *settings]) == 2
        told = capsys.readouterr().err
        assert "memory.fuse_update" in told and word in told and "Traceback" not in told


def test_the_planner_never_cuts_the_batch_of_a_fused_update(tmp_path, capsys):
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(TREE))
    cut = ["plan", str(file), "optimizer.clip=null", "train.batch=32", "train.precision=float32"]
    cut += ["--no-compile", "--machine", "h200", "--json"]
    assert main([*cut, "--budget", "15MB"]) == 0
    assert json.loads(capsys.readouterr().out)["accumulation"] > 1
    assert main([*cut, "--budget", "15MB", "memory.fuse_update=true"]) == 2
    assert "memory.fuse_update=false" in capsys.readouterr().err
    assert main([*cut, "--budget", "1GB", "memory.fuse_update=true"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["microbatch"], plan["accumulation"]) == (32, 1)
