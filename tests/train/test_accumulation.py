"""Accumulation: the sum of whole gradient trees, without the memory of a second one."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx
from kit import Aurora

from aurora_train import mesh as meshes
from aurora_train import optimizer as optimizers
from aurora_train.config.schema import Optimizer as OptimizerConfig
from aurora_train.nn import param
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.stack import Segment, Stack
from aurora_train.plan.plan import Plan
from aurora_train.random import example_keys, stream
from aurora_train.recipe import Loss, Recipe
from aurora_train.train.hooks import features
from aurora_train.train.state import draw
from aurora_train.train.step import make_step, split

PARTS, BATCH, LENGTH, VOCAB = 4, 8, 12, 61
CUTS = {
    "unlike save sets": [Segment(0, 2, ("attn_out",)), Segment(2, 4, ())],
    "one scan that keeps all": [Segment(0, 4)],
    "unrolled": [Segment(0, 4, None, True)],
}
SLOW, RELEASE = pytest.mark.slow, pytest.mark.release


class Language(Recipe):
    """A decoder with dropout on random tokens; `weights` differ from one microbatch to another."""

    def __init__(self, precision="float32", **shape):
        defaults = {"width": 16, "layers": 4, "heads": 2, "mlp_width": 32, "dropout": 0.2, "max_length": LENGTH}
        self.shape = DecoderConfig(**defaults | shape)
        self.config = SimpleNamespace(train=SimpleNamespace(dtype=precision))

    def model(self, rngs):
        return Decoder(self.shape, VOCAB, self.config.train.dtype, rngs)

    def loss(self, model, batch, key):
        return Loss(*model.nll(model(batch["tokens"], keys=key), batch["targets"], batch["weights"]))


def batch_of(number):
    draw = np.random.default_rng(number)
    tokens = draw.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (draw.random((BATCH, LENGTH)) < 0.8).astype(np.float32),
        "example": np.arange(BATCH, dtype=np.uint32) + number * BATCH,
    }


def drawn(recipe, cuts, optimizer):
    plan = Plan(BATCH // PARTS, PARTS, {"stack": cuts} if cuts else {})
    return draw(recipe, plan, optimizer, meshes.make_mesh(1, 1), seed=0)


def naive_step(recipe, blueprint, optimizer):
    """What accumulation means: whole gradient trees of the microbatches, added in order."""
    dropout = stream(0, "dropout")

    def sums(params, state, batch):
        keys = example_keys(dropout, state.step, batch["example"])
        loss = recipe.loss(blueprint.merge(params, state.rest, state.frozen), batch, keys)
        return loss.total, (loss.total, loss.weight)

    def step(state, batch):
        def gradients(part):
            return jax.grad(sums, has_aux=True)(state.params, state, part)

        parts = jax.tree.map(lambda x: split(x, PARTS), batch)
        first, others = jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts)
        grads, (total, weight) = jax.lax.scan(
            lambda carry, part: (jax.tree.map(jnp.add, carry, gradients(part)), None), gradients(first), others
        )[0]
        weight = jnp.maximum(weight, 1e-9)
        grads, loss = jax.lax.optimization_barrier((jax.tree.map(lambda g: g / weight, grads), total / weight))
        params, opt_state, info = optimizer.update(grads, state.opt_state, state.params, state.step)
        state = state._replace(
            step=state.step + 1, data_step=state.data_step + 1, params=params, opt_state=opt_state
        )
        return state, {"loss": loss, **info}

    return step


def run(blueprint, step, steps=5):
    step, state, losses = jax.jit(step, donate_argnums=0), blueprint.initialise(), []
    for number in range(steps):
        state, metrics = step(state, batch_of(number))
        losses.append(float(metrics["loss"]))
    return state, losses


def returning(update):
    return optimizers.Optimizer(
        init=lambda params: {"rest": {}, "stacks": {}},
        update=lambda grads, state, params, step, good=None: (
            jax.tree.map(update, params, grads), state, {"grad_norm": jnp.float32(1), "lr": jnp.float32(1)}
        ),
        schedule=lambda step: jnp.float32(1),
    )


def both(recipe, cuts, optimizer, steps):
    """(state, losses) of our step and of the naive one, from the same start."""
    blueprint = drawn(recipe, cuts, optimizer)
    step = make_step(recipe, blueprint, optimizer, features(), seed=0, accumulation=PARTS)
    return [run(blueprint, s, steps) for s in (step, naive_step(recipe, blueprint, optimizer))]


GRADIENTS = returning(lambda p, g: g)  # the step's new parameters are its gradients

# Two compiled programs: XLA:CPU lays out their products, and joins a product and a sum into one FMA, as it likes, and
# otherwise on each kind of processor. So the tolerance is some units in the last place, of the leaf's largest entry.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}


def in_tiers(marks: dict) -> list:
    """Every (cut, precision), those that `marks` does not name before a release."""
    return [pytest.param(cut, precision, id=f"{name}-{precision}", marks=marks.get((name, precision), RELEASE))
            for name, cut in CUTS.items() for precision in TOLERANCE]  # fmt: skip


@pytest.mark.parametrize("cuts,precision", in_tiers({("unlike save sets", "float32"): (),
                                                     ("one scan that keeps all", "bfloat16"): SLOW}))  # fmt: skip
def test_it_is_the_sum_of_whole_gradient_trees(cuts, precision):
    recipe = Language(precision, tied=precision == "float32")
    (ours, _), (naive, _) = both(recipe, cuts, GRADIENTS, 1)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours.params), jax.tree.leaves(naive.params), strict=True):
        limit = TOLERANCE[precision] * float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("cuts,precision", in_tiers({("unlike save sets", "float32"): SLOW,
                                                     ("unrolled", "bfloat16"): SLOW}))  # fmt: skip
def test_five_steps_on_it_are_five_steps_on_whole_gradient_trees(cuts, precision):
    recipe = Language(precision, tied=precision == "float32")
    (_, ours), (_, naive) = both(recipe, cuts, optimizers.build(OptimizerConfig(), 10), 5)
    np.testing.assert_allclose(ours, naive, rtol=TOLERANCE[precision] / 2)


# Its update needs no memory of its own, so that the compiled bytes are those of the gradients.
PLAIN = returning(lambda p, g: p - g)


def temporaries(blueprint, step):
    compiled = jax.jit(step, donate_argnums=0).lower(blueprint.state, batch_of(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("cuts", [[Segment(0, 6, ())], pytest.param(
    [Segment(0, 3, ("attn_out",)), Segment(3, 6, ())], marks=RELEASE)])  # fmt: skip
@pytest.mark.optimized
def test_no_second_gradient_set_of_the_stack_is_ever_held(cuts):
    recipe = Language(width=128, layers=6, mlp_width=512, dropout=0.0)
    blueprint = drawn(recipe, cuts, PLAIN)
    stack = sum(4 * leaf.size for leaf in jax.tree.leaves(blueprint.state.params["stack"]))
    new = temporaries(blueprint, make_step(recipe, blueprint, PLAIN, features(), seed=0, accumulation=PARTS))
    naive = temporaries(blueprint, naive_step(recipe, blueprint, PLAIN))
    print(f"stack {stack:,}; temporaries {new:,}, naively {naive:,}")
    assert naive - new > 0.75 * stack  # not all of it: the head's own work is the peak now
    assert new < 1.6 * stack < 2 * stack < naive


class Slices(nnx.Module):
    """Parameters of which parts are used, twice, outside a stack and in its units."""

    def __init__(self, rngs, with_stack):
        class Unit(nnx.Module):
            def __init__(self, rngs):
                self.both = param.kernel(rngs, (8, 16), ("embed", "mlp"))

            def __call__(self, x, context, index, keys=None, cache=None):
                return x + jnp.tanh(x @ self.both[...][:, :8]) @ self.both[...][:, 8:], cache

        self.table = param.kernel(rngs, (8, 8), (None, "embed"))
        self.stack = Stack(Unit, 3, rngs) if with_stack else None

    def __call__(self, x):
        x = x @ self.table[...][:4]
        x = self.stack(x, None)[0] if self.stack is not None else x
        return x @ self.table[...].T[:, 4:]


@pytest.mark.parametrize("cuts", [None, [Segment(0, 3)], [Segment(0, 3, None, True)]])
def test_a_model_may_slice_its_parameters_and_needs_no_stack(cuts):
    class Regression(Recipe):
        def __init__(self):
            self.config = SimpleNamespace(train=SimpleNamespace(dtype="float32"))

        def model(self, rngs):
            return Slices(rngs, cuts is not None)

        def loss(self, model, batch, key):
            return Loss(jnp.square(model(batch["x"]) - 1).sum(), jnp.float32(len(batch["x"])), {"rows": (1.0, 1.0)})

    recipe = Regression()
    blueprint = drawn(recipe, cuts, PLAIN)
    batch = {"x": np.linspace(-1, 1, BATCH * 4, dtype=np.float32).reshape(BATCH, 4)}
    batch["example"] = np.arange(BATCH, dtype=np.uint32)
    one, four = (
        jax.jit(make_step(recipe, blueprint, PLAIN, features(), seed=0, accumulation=n))(blueprint.initialise(), batch)
        for n in (1, PARTS)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one[0].params, four[0].params)
    np.testing.assert_allclose(four[1]["loss"], one[1]["loss"], rtol=1e-6)
    assert four[1]["rows"] == 1


MESHES = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import jax
from aurora_train import mesh as meshes
from aurora_train.config import load
from pieces import rehearsed
from aurora_train.data.batches import read_batch
from aurora_train.train.state import together

config = load("toy.yaml", ["model.width=32", "train.batch=32", "optimizer.ema=null"])
out = {}
for name, shape in {"one": (1, 1), "2x4": (2, 4)}.items():
    mesh = meshes.make_mesh(*shape)
    program, plan = rehearsed(config, accumulation=4, mesh=mesh)
    compiled, source = program.compile(plan), program.recipe.data("train")
    step, state, losses = together(compiled), program.initialiser(plan).result()(), []
    for number in range(10):
        batch = jax.device_put(read_batch(source, 0, 32, number), meshes.batch_sharding(mesh))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    out[name] = {"losses": losses, "temporaries": compiled.memory_analysis().temp_size_in_bytes}
print(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.optimized
def test_eight_devices_each_accumulate_their_own_share(tmp_path):
    toy.write(tmp_path)
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", MESHES, str(tests / "train"), str(tests)], cwd=tmp_path, capture_output=True, text=True,
        env=Aurora(tmp_path, tmp_path / "cache").environment(devices=8), timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout)
    np.testing.assert_allclose(out["2x4"]["losses"], out["one"]["losses"], rtol=1e-5)
    assert out["2x4"]["temporaries"] < out["one"]["temporaries"] / 2
