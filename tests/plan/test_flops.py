"""FLOPs counted from the step's own jaxpr, against the formula that a recipe states and against counting by hand."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_train.config import config_class
from aurora_train.config.find_recipe import find_recipe
from aurora_train.nn.param import parameter_count
from aurora_train.nn.stack import Segment
from aurora_train.plan.flops import jaxpr_flops
from aurora_train.plan.plan import Plan
from aurora_train.train.rehearsal import rehearse

WIDTH, LAYERS, LENGTH, BATCH = 128, 3, 128, 4


def products(function, *arguments) -> int:
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)[1]


def test_a_loop_counts_each_turn_a_branch_its_dearest_and_a_product_twice_its_multiplications():
    a, b = jnp.ones((3, 5, 7)), jnp.ones((3, 7, 11))
    once = 2 * 3 * 5 * 7 * 11
    assert products(jnp.matmul, a, b) == once
    assert products(lambda a, b: jax.lax.map(lambda _: (a @ b).sum(), jnp.arange(4.0)), a, b) == 4 * once
    assert products(lambda a, b: jax.lax.cond(a[0, 0, 0] > 0, lambda: (a @ b).sum(), lambda: 0.0), a, b) == once
    assert products(jax.jit(jax.checkpoint(lambda a: jnp.sin(a @ b))), a) == once


def test_the_gradient_of_a_product_is_two_more_and_a_checkpoint_makes_it_again():
    x, w, v = np.ones((6, 8), np.float32), np.ones((8, 8), np.float32), np.ones((8, 8), np.float32)
    once = 2 * 6 * 8 * 8

    def loss(w, v, of=lambda f: f):
        return of(lambda w, v: jnp.tanh(jnp.tanh(x @ w) @ v).sum())(w, v)

    assert products(jax.grad(loss, (0, 1)), w, v) == (2 + 3) * once  # nobody asks for the gradient of x
    again = products(jax.grad(lambda w, v: loss(w, v, jax.checkpoint), (0, 1)), w, v)
    assert again == (2 + 3 + 2) * once


def language_model(**model):
    """A rehearsal whose attention computes every pair, and masks half of them."""
    recipe = find_recipe("language_model", Path()).cls
    tree = {
        "recipe": "language_model",
        "model": {"width": WIDTH, "layers": LAYERS, "heads": 4, "mlp_width": 256, "attention": "reference", **model},
        "data": {"source": "/nowhere/at/all", "sequence": LENGTH, "tokenizer": {"kind": "byte"}},
        "train": {"batch": BATCH, "precision": "float32"},
        "optimizer": {"name": "adamw"},
        "mesh": {"data": 1},
    }
    config = config_class(recipe).model_validate_json(json.dumps(tree))
    return rehearse(config, recipe(config, Path()))


def plan_of(program, save, microbatches: int = 1) -> Plan:
    cuts = {path: [Segment(0, LAYERS, save)] for path in program.simplest_plan().stacks}
    return Plan(BATCH // microbatches, microbatches, cuts)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_language_models_step_is_what_its_recipe_states_and_the_masked_half_of_attention(tied, microbatches):
    program = language_model(tied=tied)
    plan = plan_of(program, None, microbatches)
    tokens, masked = BATCH * LENGTH, 6 * LAYERS * LENGTH * WIDTH
    stated = program.recipe.flops_per_target(parameter_count(program.blueprint(plan).state.params))
    assert program.product_flops(plan) == pytest.approx(tokens * (stated + masked), rel=0.005)  # norms are in N


@pytest.mark.parametrize("targets", [["embedding"], ["head", "query"]])
def test_of_an_adapter_only_what_is_multiplied_counts(targets):
    program = language_model(tied=False, lora={"rank": 32, "targets": targets})
    plan = plan_of(program, None)
    state = program.blueprint(plan).state
    stated = program.recipe.flops(parameter_count(state.params), parameter_count(state.frozen))
    masked = 6 * LAYERS * LENGTH * WIDTH
    removed = 2 * 257 * WIDTH  # the gradient of a frozen head: the jaxpr has it, and the compiler removes it
    assert program.product_flops(plan) == pytest.approx(BATCH * LENGTH * (stated + masked + removed), rel=0.005)


def test_what_a_plan_recomputes_is_counted():
    program = language_model()
    kept, again = (program.product_flops(plan_of(program, save)) for save in (None, ()))
    count = parameter_count(program.blueprint(plan_of(program, None)).state.params)
    blocks = BATCH * LENGTH * (2 * (count - 256 * WIDTH) + 4 * LAYERS * LENGTH * WIDTH)
    last = BATCH * LENGTH * LAYERS * 2 * WIDTH * 256  # a unit's last product is not needed
    assert again - kept == pytest.approx(blocks - last, rel=0.02)
