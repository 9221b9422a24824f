"""What the units of a Stack report: sums with gradients, the same under every plan, and nothing where they report none.

The unit here has a router as a mixture of experts has it, with the balance loss of each sequence (Fedus et al. 2021,
equation 4, over the tokens of a sequence) and how many tokens each expert was given.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aurora_train import mesh as meshes
from aurora_train import optimizer as optimizers
from aurora_train.config.schema import Optimizer as OptimizerConfig
from aurora_train.errors import UserError
from aurora_train.nn import param
from aurora_train.nn.norms import Norm
from aurora_train.nn.stack import Segment, Stack, watched
from aurora_train.plan.plan import Plan
from aurora_train.plan.residuals import trace_stack_unit
from aurora_train.recipe import Loss, Recipe
from aurora_train.train.hooks import features
from aurora_train.train.state import draw
from aurora_train.train.step import make_step

# Half the compile time, the same mathematics.
QUICK_JIT = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
UNITS, EXPERTS, WIDTH, BATCH, LENGTH = 4, 3, 8, 4, 6
BALANCE = 0.1  # the weight of the auxiliary loss


class Routed(nnx.Module):
    tags = ("normed", "shares", "hidden")

    def __init__(self, rngs, reports=True):
        self.reports = reports
        self.norm = Norm(WIDTH)
        self.router = param.kernel(rngs, (WIDTH, EXPERTS), ("embed", None))
        self.experts = param.kernel(rngs, (WIDTH, EXPERTS * WIDTH), ("embed", "mlp"))

    def __call__(self, x, context, index, keys=None, cache=None):
        normed = checkpoint_name(self.norm(x), "normed")
        shares = checkpoint_name(jax.nn.softmax(normed @ self.router[...]), "shares")
        hidden = checkpoint_name(jnp.tanh(normed @ self.experts[...]), "hidden")
        x = x + jnp.einsum("bte,bted->btd", shares, hidden.reshape(*x.shape[:2], EXPERTS, WIDTH))
        if not self.reports:
            return x, cache
        taken = jax.nn.one_hot(shares.argmax(-1), EXPERTS)
        balance = EXPERTS * (taken.mean(1) * shares.mean(1)).sum(-1)
        return x, cache, {"balance": balance, "tokens": taken.sum((0, 1))}


class Model(nnx.Module):
    def __init__(self, rngs, make_unit=Routed):
        self.stack = Stack(make_unit, UNITS, rngs)

    def __call__(self, x):
        x, _, sums = self.stack(x, None)
        return x, sums


class Regression(Recipe):
    """Squared error and, weighted, the balance of every unit, both summed over the sequences."""

    def __init__(self):
        super().__init__(SimpleNamespace(train=SimpleNamespace(dtype="float32")), Path())

    def model(self, rngs):
        return Model(rngs)

    def loss(self, model, batch, key):
        y, sums = model(batch["x"])
        error = jnp.square(y - batch["y"]).mean((1, 2)).sum()
        count, balance = jnp.float32(len(y)), sums["balance"].sum()
        busiest = {f"tokens_{i}": (sums["tokens"][i], count) for i in range(EXPERTS)}
        return Loss(error + BALANCE * balance, count, {"balance": (balance, count), **busiest})


def batch_of(number=0):
    draw = np.random.default_rng(number)
    arrays = {name: draw.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32) for name in "xy"}
    return arrays | {"example": np.arange(BATCH, dtype=np.uint32)}


def taken_step(cuts=None, accumulation=1):
    """(the parameters of all units after one step, its metrics)"""
    optimizer = optimizers.build(OptimizerConfig(name="adamw", lr=1e-2, clip=None, schedule={"warmup": 0}), 10)
    plan = Plan(BATCH // accumulation, accumulation, {"stack": cuts or RECOMPUTED})
    own = features()
    blueprint = draw(Regression(), plan, optimizer, meshes.make_mesh(1, 1), seed=0, features=own)
    step = make_step(Regression(), blueprint, optimizer, own, seed=0, accumulation=accumulation)
    state, metrics = QUICK_JIT(step)(blueprint.initialise(), batch_of())
    return in_order(state.params), {name: float(value) for name, value in metrics.items()}


def in_order(params):
    """The arrays of all units, whatever the cut."""
    segments = params["stack"]["segments"]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *(segments[i] for i in sorted(segments)))


@functools.cache
def at_once():
    return taken_step()


def gradients(cuts):
    """(loss, gradients of all units, in their order)."""
    model = Model(nnx.Rngs(params=0))
    model.stack.cut(tuple(cuts))
    graph, state = nnx.split(model)

    def total(state):
        return Regression().loss(nnx.merge(graph, state), batch_of(), None).total

    loss, found = jax.jit(jax.value_and_grad(total))(state)
    return loss, in_order(nnx.to_pure_dict(found))


def in_a_loop():
    """The same without a Stack: one unit after the other, their sums added by hand."""
    stack = Model(nnx.Rngs(params=0)).stack
    graph, state = nnx.split(stack.segments[0])
    batch = batch_of()

    def total(state):
        x, balance = batch["x"], 0.0
        for i in range(UNITS):
            x, _, sums = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))(x, None, i)
            balance += sums["balance"].sum()
        return jnp.square(x - batch["y"]).mean((1, 2)).sum() + BALANCE * balance

    loss, found = QUICK_JIT(jax.value_and_grad(total))(state)
    return loss, nnx.to_pure_dict(found)


WHOLE, RECOMPUTED = [Segment(0, UNITS)], [Segment(0, UNITS, ())]
PLANS = {
    "two scans": (WHOLE, [Segment(0, 2), Segment(2, 4)]),
    "some kept": (RECOMPUTED, [Segment(0, 4, ("hidden",))]),
    "two scans that keep unlike tensors": (RECOMPUTED, [Segment(0, 2, ("shares", "normed")), Segment(2, 4, ())]),
}


def test_sums_have_the_gradients_of_a_plain_loop(monkeypatch):
    (loss, found), (expected_loss, expected) = gradients(WHOLE), in_a_loop()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    monkeypatch.setattr(f"{__name__}.BALANCE", 0.0)
    without = gradients(WHOLE)[1]
    assert np.abs(found["router"] - without["router"]).max() > 1e-3  # so the sums do reach the router


@pytest.mark.parametrize("one,other", PLANS.values(), ids=PLANS)
@pytest.mark.optimized
def test_no_cut_and_no_save_set_changes_a_bit_of_them(one, other):
    (loss, found), (expected_loss, expected) = gradients(other), gradients(one)
    assert loss == expected_loss
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_recomputing_them_at_all_changes_them_by_rounding_alone():
    """XLA fuses what is computed again otherwise than what was kept."""
    (loss, found), (expected_loss, expected) = gradients(RECOMPUTED), gradients(WHOLE)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)


@pytest.mark.parametrize("how", [
    pytest.param({"accumulation": 4, "cuts": [Segment(0, 2, ()), Segment(2, 4)]}, id="4 microbatches, 2 scans"),
    pytest.param({"accumulation": 2}, id="2 microbatches", marks=pytest.mark.slow),
    pytest.param({"cuts": [Segment(0, 4, (), True)]}, id="unrolled", marks=pytest.mark.slow),
])  # fmt: skip
def test_microbatches_and_unrolling_change_them_by_rounding_alone(how):
    (expected, known), (found, metrics) = at_once(), taken_step(**how)
    for name, value in known.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    # Sums over sequences and counts: all units, all microbatches.
    assert sum(known[f"tokens_{i}"] for i in range(EXPERTS)) == pytest.approx(UNITS * LENGTH)
    assert UNITS <= known["balance"]  # 1 at least for each unit, where all experts are used alike


def test_sums_are_found_with_caches():
    model = Model(nnx.Rngs(params=0))
    x = jnp.asarray(batch_of()["x"])
    _, caches, found = model.stack(x, None, caches=[jnp.zeros((UNITS, 1))])
    assert [one.shape for one in caches] == [(UNITS, 1)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, model(x)[1])


def test_the_outputs_of_the_units_of_a_watched_call_end_with_that_of_the_stack():
    model = Model(nnx.Rngs(params=0))
    model.stack.cut((Segment(0, 3, ()), Segment(3, 4)))
    with watched() as calls:
        y, _ = model(jnp.asarray(batch_of()["x"]))
    ((stack, *given),) = calls
    outputs = list(stack.outputs(*given))
    assert stack is model.stack and [unit for unit, _ in outputs] == list(range(UNITS))
    np.testing.assert_allclose(outputs[-1][1], y, rtol=1e-5, atol=1e-6)


def test_the_planner_counts_a_unit_that_reports_like_one_that_does_not():
    """What the sums keep for their gradients is counted, by tag as ever."""
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
    graphs = [
        trace_stack_unit(nnx.eval_shape(lambda r=r: Stack(lambda g: Routed(g, r), UNITS, nnx.Rngs(params=0))), x, None)
        for r in (False, True)
    ]
    plain, reporting = (graph.score(None).saved_bytes for graph in graphs)
    assert graphs[1].tags == Routed.tags
    assert plain < reporting <= plain + 4 * BATCH * LENGTH * EXPERTS * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "int32"])
def test_sums_in_fewer_bits_or_without_a_gradient_are_refused(dtype):
    class Short(Routed):
        def __call__(self, *given):
            x, cache, sums = super().__call__(*given)
            return x, cache, {"tokens": sums["tokens"].astype(dtype)}

    with pytest.raises(UserError, match=f"`tokens` in {dtype}") as caught:
        Model(nnx.Rngs(params=0), Short)(jnp.ones((1, 2, WIDTH)))
    assert caught.value.hint == "jnp.float32(tokens)"


def test_a_stack_whose_units_report_nothing_has_no_sums_and_no_further_operation():
    """The step is the one that it was: an empty report adds nothing to what is traced."""
    stack = Stack(lambda rngs: Routed(rngs, False), UNITS, nnx.Rngs(params=0))
    x = jnp.ones((BATCH, LENGTH, WIDTH))
    assert stack(x, None)[1:] == (None, {})
    jaxpr = jax.make_jaxpr(lambda x: stack(x, None)[0])(x).jaxpr
    outputs = [len(e.outvars) for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert outputs == [1]  # x alone
