"""Operations of a traced program by part and kind, from a real compiled program."""

import jax
import jax.numpy as jnp
import pytest

from aurora_train.tools.trace import instructions, timeline

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def program():
    def step(x, w):
        def loss(w):
            with jax.named_scope("attention"):
                y = jnp.tanh(x @ w)
            with jax.named_scope("loss"):
                return (y * y).sum()

        grad = jax.grad(loss)(w)
        with jax.named_scope("optimizer"):
            return jax.lax.fori_loop(0, 3, lambda _, w: w - jnp.exp(grad), w)

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return jax.jit(step).lower(shape, shape).compile().as_text()


def test_parts_and_kinds(program):
    found = set(instructions(program).values())
    assert ("attention", "product") in found
    assert any(where and where[0] == "optimizer" and where[1] == "elementwise" for where in found)
    assert None in found  # the loop itself: its time is that of what it holds


def test_a_mean_step(program):
    known = instructions(program)
    product = next(name for name, where in known.items() if where == ("attention", "product"))
    loop = next(name for name, where in known.items() if where is None)
    events = [
        {"name": "step", "ts": 0.0, "dur": 1000.0},
        {"name": "data", "ts": 0.0, "dur": 100.0},
        {"name": product, "ts": 100.0, "dur": 500.0, "args": {"hlo_op": product}},
        {"name": product, "ts": 400.0, "dur": 400.0, "args": {"hlo_op": product}},  # beside the first for 200
        {"name": loop, "ts": 0.0, "dur": 1000.0, "args": {"hlo_op": loop}},
        {"name": "step", "ts": 1000.0, "dur": 3000.0},
    ]
    line = timeline(events, program, 2, ("data", "wait"))
    assert line.step == pytest.approx(2e-3)
    assert line.busy == pytest.approx(350e-6)
    assert line.host == {"data": pytest.approx(50e-6), "wait": 0.0}
    (row,) = line.rows
    assert (row.part, row.kind, row.count, row.share) == ("attention", "product", 1.0, 1.0)
    assert row.seconds == pytest.approx(450e-6)
