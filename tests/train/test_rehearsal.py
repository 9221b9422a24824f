"""A rehearsal builds the step that will run, and runs nothing: shapes in, a traced and a compiled step out."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from aurora_train import mesh as meshes
from aurora_train.config import config_class, load
from aurora_train.config.find_recipe import find_recipe
from aurora_train.data.batches import read_batch
from aurora_train.errors import UserError
from aurora_train.machine.precision import settled
from aurora_train.machine.targets import find_machine
from aurora_train.nn.stack import Segment
from aurora_train.plan.plan import Plan
from aurora_train.train import rehearsal as rehearsals
from aurora_train.train.rehearsal import rehearse, shapes_of
from aurora_train.train.state import together

CUT = [Segment(0, 2, ()), Segment(2, 4, ("hidden",))]


def toy_config(folder, **changes):
    text = {"layers: 3": "layers: 4", "checkpoint:": "mesh: {data: 1}\ncheckpoint:"} | changes
    return settled(load(toy.write(folder, **text)))


@pytest.fixture
def program(tmp_path):
    """Of the toy, which has no `shapes`: its data are read."""
    config = toy_config(tmp_path)
    return rehearse(config, config.recipe_class(config, tmp_path))


def same_bits(one, other):
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    assert sum(np.any(np.asarray(a)) for a, _ in pairs) > 1  # some are drawn
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def language_model(**sections):
    recipe = find_recipe("language_model", Path()).cls
    tree = {
        "recipe": "language_model",
        "model": {"width": 32, "layers": 4, "heads": 2, "dropout": 0.1},
        "data": {"source": "/nowhere/at/all", "sequence": 64, "tokenizer": {"kind": "byte"}},
        "train": {"batch": 8, "precision": "float32"},
        "mesh": {"data": 1},
    }
    tree |= {name: tree.get(name, {}) | section for name, section in sections.items()}
    config = config_class(recipe).model_validate_json(json.dumps(tree))
    return config, recipe(config, Path())


# ---- shapes


def test_a_recipe_without_shapes_is_prepared_and_its_arrays_are_the_sources(program):
    assert {name: (s.shape, str(s.dtype)) for name, s in program.shapes.items()} == {
        "x": ((8,), "float32"), "y": ((8,), "float32"), "weights": ((), "float32")
    }  # fmt: skip
    assert program.batch(6)["x"].shape == (6, 8) and program.batch(6)["example"].shape == (6,)
    config = program.config
    batch = read_batch(program.recipe.data("train"), 0, config.train.batch, 0)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), program.batch(config.train.batch)) == jax.tree.map(
        lambda a: (a.shape, np.dtype(a.dtype)), dict(batch)
    )


def test_a_recipe_with_shapes_needs_no_data():
    config, recipe = language_model()
    recipe.prepare = lambda progress: pytest.fail("prepared")
    program = rehearse(config, recipe)
    assert program.shapes["tokens"].shape == (64,) and not program.remote and program.platform == "cpu"


def test_an_empty_source_is_refused(tmp_path):
    config = toy_config(tmp_path, **{"train: {steps": "data: {rows: 0}\ntrain: {steps"})
    with pytest.raises(UserError, match="no example"):
        rehearse(config, config.recipe_class(config, tmp_path))


def test_shapes_are_one_examples(tmp_path):
    config = toy_config(tmp_path)
    assert shapes_of(config.recipe_class(config, tmp_path).data("train"))["y"].shape == (8,)


# ---- model, state, step


def test_the_model_is_abstract_whole_and_made_once(program):
    model = program.model()
    assert model is program.model() and len(model.stack.segments) == 1
    leaves = jax.tree.leaves(jax.tree.map(lambda a: a, jax.eval_shape(lambda: program.blueprint(whole(4)).state)))
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def whole(layers, save=None):
    return Plan(8, 1, {"stack": [Segment(0, layers, save)]})


def test_a_plan_is_traced_once_and_another_reason_is_no_other_plan(program):
    first = program.trace(whole(4))
    assert program.trace(whole(4))[0] is first[0] and program.blueprint(whole(4)) is program.blueprint(whole(4))
    assert program.trace(Plan(8, 1, {"stack": [Segment(0, 4)]}, "why", "where"))[0] is first[0]
    assert program.trace(Plan(4, 2, {"stack": CUT}))[0] is not first[0]


def test_a_traced_step_takes_the_whole_batch_and_gives_the_state_back_first(program):
    traced, state = program.trace(Plan(4, 2, {"stack": CUT}))
    leaves = jax.tree.leaves(state._replace(frozen={}))
    outputs = traced.jaxpr.out_avals
    assert [(a.shape, a.dtype) for a in outputs[: len(leaves)]] == [(a.shape, a.dtype) for a in leaves]
    assert any(aval.shape == (8, 8) for aval in traced.jaxpr.in_avals)
    assert "remat" in str(traced.jaxpr) or "checkpoint" in str(traced.jaxpr)


def test_what_is_compiled_is_what_runs_and_one_program_is_kept(program):
    plan = Plan(4, 2, {"stack": CUT})
    compiled = program.compile(plan)
    assert program.compile(plan) is compiled
    state = program.blueprint(plan).initialise()
    batch = read_batch(program.recipe.data("train"), 0, 8, 0)
    after, metrics = together(compiled)(state, batch)
    assert int(after.step) == 1 and 0 < float(metrics["loss"]) < 10 and not float(metrics["skipped"])
    program.compile(whole(4))
    assert len(program._compiled) == 1


@pytest.mark.optimized
def test_the_initialiser_is_compiled_once_a_cut_in_a_thread_and_draws_the_bits_of_the_plain_one(program):
    plan = Plan(4, 2, {"stack": CUT})
    made = program.initialiser(plan)
    assert program.initialiser(Plan(8, 1, {"stack": CUT})) is made and program.initialiser(whole(4)) is not made
    assert same_bits(made.result()(), program.blueprint(plan).initialise())


@pytest.mark.optimized
def test_the_initialiser_of_a_decoder_draws_the_bits_of_the_plain_one():
    program = rehearse(*language_model(model={"bias": "all", "activation": "swiglu", "positions": "learned"}))
    plan = program.simplest_plan()
    assert same_bits(program.initialiser(plan).result()(), program.blueprint(plan).initialise())


def test_the_simplest_plan_has_every_stack_whole(program):
    plan = program.simplest_plan()
    assert (plan.microbatch, plan.accumulation, plan.stacks) == (8, 1, {"stack": [Segment(0, 4)]})


# ---- how the loss calls its stacks


def test_a_stacks_call_is_that_of_one_example():
    program = rehearse(*language_model())
    calls = program.stack_calls()
    assert set(calls) == {"stack"}
    stack, x, context, keys = calls["stack"]
    assert stack is program.model().stack and x.shape == (1, 64, 32)
    assert keys.shape == (1,), "with dropout, a key an example"
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((x, context, keys)))


def test_adapters_are_planned_like_any_model():
    program = rehearse(*language_model(model={"lora": {"rank": 2}}))
    assert set(program.stack_calls()) == {"stack"}
    frozen = jax.tree.leaves(program.blueprint(program.simplest_plan()).state.frozen)
    traced, state = program.trace(Plan(8, 1, {"stack": [Segment(0, 4, ())]}))
    assert frozen and len(traced.jaxpr.in_avals) > len(jax.tree.leaves(state._replace(frozen={})))


# ---- another machine


def test_another_machine_is_traced_with_its_own_forms_on_any_device(monkeypatch):
    monkeypatch.setattr(rehearsals, "can_compile_for_gpu", lambda: False)
    config, recipe = language_model(train={"precision": "bfloat16"}, model={"width": 128})
    program = rehearse(config, recipe, target=find_machine("h100"))
    assert program.remote and program.platform == "gpu" and program.model().attention.name == "cudnn"
    assert rehearse(config, recipe).model().attention.name != "cudnn"
    assert "dot_product_attention_fwd" in str(program.trace(whole(4, ()))[0].jaxpr)


def test_more_devices_than_can_be_traced_with_are_refused_with_what_would_help(monkeypatch):
    monkeypatch.setattr(rehearsals, "can_compile_for_gpu", lambda: False)
    config, recipe = language_model(mesh={"data": 2, "fsdp": 64})
    with pytest.raises(UserError, match=r"128 devices.*\n.*aurora_train\[plan\]"):
        rehearse(config, recipe, target=find_machine("h100"))


def test_a_mesh_that_is_given_is_used(program):
    mesh = meshes.make_mesh(1, 1)
    assert rehearse(program.config, program.recipe, mesh=mesh).mesh is mesh
