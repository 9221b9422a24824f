"""The planner's residual bytes and recomputed FLOPs are JAX's own. benchmarks/residuals.py is the full comparison."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from kit import load_benchmark

from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig, Lora
from aurora_train.nn.mlp import lean
from aurora_train.nn.stack import Segment
from aurora_train.nn.tracing import tracing
from aurora_train.nn.transformer import make_context
from aurora_train.plan.residuals import equation_flops, frontier, num_bytes, stack_unit, trace_stack_unit, trace_unit

benchmark = load_benchmark("residuals")
DECODERS = [{**benchmark.SHAPE, **shape} for shape in benchmark.DECODERS.values()]


def abstract_decoder(shape, dtype, **changes):
    """(stack, x, context) of a decoder, abstract."""
    config = DecoderConfig(**{**shape, **changes})
    model = nnx.eval_shape(lambda: Decoder(config, 96, dtype, nnx.Rngs(0)))
    positions = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    context = jax.eval_shape(lambda p: make_context(config, p, p), positions)
    return model.stack, jax.ShapeDtypeStruct((2, 128, config.width), dtype), context


@pytest.mark.parametrize("architecture", benchmark.ARCHITECTURES)
@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_bytes_and_flops_of_random_save_sets_are_those_of_jax(architecture, target):
    row = benchmark.compare(architecture, target, "bfloat16", sets=10, seed=1)
    assert (row.equal_bytes, row.equal_products) == (10, 10)
    assert row.flops_off < 0.01


@pytest.mark.parametrize("target,attention", [("cpu", "blocked"), ("gpu", "reference")])
@pytest.mark.parametrize("shape", DECODERS, ids=benchmark.DECODERS)
def test_a_scanned_stack_keeps_what_its_units_keep(shape, target, attention):
    num_units = 3
    layers = num_units * len(shape.get("window_pattern", "x"))
    with tracing(target=target):
        stack, x, context = abstract_decoder(shape, "bfloat16", layers=layers, attention=attention, dropout=0.0)
        unit = trace_stack_unit(stack, x, context)
        graph, state = nnx.split(stack)
        for save in (None, ("attn_stats", "mlp_up", "attn_norm")):
            jaxpr = jax.make_jaxpr(scan_residuals(graph, Segment(0, num_units, save)))(x, state, context).jaxpr
            kept = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}.difference(jaxpr.invars)
            once = unit.shared_bytes if save is None else 0
            expected = num_units * unit.score(save).saved_bytes + once
            assert sum(num_bytes(v.aval) for v in kept) == expected, save


def scan_residuals(graph, segment):
    def run(x, state, context):
        def forward(x, state):
            stack = nnx.merge(graph, state)
            stack.plan = (segment,)
            return stack(x, context)[0]

        return jax.tree.leaves(jax.vjp(forward, x, state)[1])

    return run


def test_with_adapters_only_these_are_differentiated():
    shape = {**DECODERS[1], "attention": "xla"}
    with tracing(target="gpu"):
        stack, x, context = abstract_decoder(shape, "float32", lora=Lora(rank=2))
        full = trace_stack_unit(*abstract_decoder(shape, "float32"))
        fun, weights, others = stack_unit(stack)
        case = benchmark.Case(fun, (x, weights, *others, context, None))
        graph, reference = trace_stack_unit(stack, x, context), benchmark.Reference(case)
        for save in ((), ("query", "attn_out"), graph.tags):
            score = graph.score(save)
            assert (score.saved_bytes, score.dot_flops) == reference(save)[::2]
    assert {leaf.shape[-1] for leaf in jax.tree.leaves(weights)} >= {2} and others[0]
    assert graph.score(None).saved_bytes != full.score(None).saved_bytes


# Random programs: values are made from earlier ones, some named, some by custom rules, some inside a jit or a scan.
STEPS = st.tuples(st.sampled_from(range(9)), st.integers(0, 9), st.integers(0, 9), st.sampled_from("abcd"))
PROGRAMS = st.lists(STEPS, min_size=3, max_size=12)
NAMES = st.frozensets(st.sampled_from("abcd"))


def program(steps):
    square = lean(lambda x: x * jnp.tanh(x))

    def fun(x, weight, context):
        values = [x, context]
        for kind, i, j, name in steps:
            a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(
                [
                    lambda a, b, n: checkpoint_name(a, n),
                    lambda a, b, n: a @ weight,
                    lambda a, b, n: jnp.sin(a),
                    lambda a, b, n: a * b,
                    lambda a, b, n: a + b,
                    lambda a, b, n: square(a),
                    lambda a, b, n: jax.jit(lambda a, b: checkpoint_name(jnp.cos(a), n) * b)(a, b),
                    lambda a, b, n: a / jnp.sum(b * b, -1, keepdims=True),
                    lambda a, b, n: jnp.where(jnp.arange(a.shape[1]) > 2, a, jnp.float32(0)),
                ][kind](a, b, name)
            )
        return sum(values[-3:])

    return fun


def arrays():
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 6), (6, 6), (4, 6))]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(PROGRAMS, NAMES)
def test_random_programs_keep_and_recompute_what_jax_does(steps, save):
    case = benchmark.Case(program(steps), tuple(arrays()))
    graph, reference = trace_unit(case.fun, *case.args), benchmark.Reference(case)
    ours = graph.score(save)
    assert graph.score(None).saved_bytes == reference.plain_bytes
    kept, _, dots = reference(save)
    assert (ours.saved_bytes, ours.dot_flops) == (kept, dots)
    assert set(ours.used) <= save and graph.score(ours.used).saved_bytes == ours.saved_bytes


@settings(max_examples=30, deadline=None, derandomize=True)
@given(PROGRAMS, NAMES, NAMES)
def test_a_further_name_never_costs_flops_and_bytes_never_more_than_add_up(steps, first, second):
    graph = trace_unit(program(steps), *arrays())
    one, other, both = graph.score(first), graph.score(second), graph.score(first | second)
    assert both.flops <= min(one.flops, other.flops)
    assert both.moved_bytes <= min(one.moved_bytes, other.moved_bytes)
    assert both.saved_bytes <= one.saved_bytes + other.saved_bytes


def test_points_are_the_distinct_save_sets_and_the_frontier_is_the_best_of_them():
    with tracing(target="cpu"):
        graph = trace_stack_unit(*abstract_decoder(DECODERS[1], "bfloat16"))
    began = time.process_time()
    points = graph.points(max_tags=12)
    assert time.process_time() - began < 0.6 and len(graph.tags) == 12
    assert len({p.save for p in points}) == len(points) and all(p.save == p.used for p in points)
    assert all(graph.score(p.save) == p for p in points[::200])
    best = frontier(points)
    for near, far in zip(best, best[1:], strict=False):
        assert near.saved_bytes < far.saved_bytes and near.flops > far.flops
    assert all(any(b.saved_bytes <= p.saved_bytes and b.flops <= p.flops for b in best) for p in points)


def test_with_more_tags_than_are_enumerated_the_frontier_stays_near_the_exact_one():
    with tracing(target="cpu"):
        graph = trace_stack_unit(*abstract_decoder(DECODERS[3], "bfloat16"))
    exact, pruned = frontier(graph.points(max_tags=20)), frontier(graph.points(max_tags=8))
    assert len(graph.tags) == 13 and len(graph.points(max_tags=8)) < 1500
    for point in exact:
        flops = min(p.flops for p in pruned if p.saved_bytes <= point.saved_bytes)
        assert flops <= 1.1 * point.flops + 0.02 * exact[0].flops


def test_flops_of_products_are_twice_their_multiplications():
    ones = jnp.ones

    def scanned(a, b):
        return jax.lax.scan(lambda carry, row: (carry, row[None] @ b), 0.0, a)[1]

    def convolved(a, b):
        return jax.lax.conv_general_dilated(a, b, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    cases = [
        (jnp.matmul, (ones((3, 4, 5)), ones((3, 5, 7))), 2 * 3 * 4 * 5 * 7),
        (scanned, (ones((9, 5)), ones((5, 7))), 9 * 2 * 5 * 7),
        (convolved, (ones((2, 10, 4)), ones((3, 4, 6))), 2 * (2 * 8 * 6) * (3 * 4)),
        (jax.lax.ragged_dot, (ones((8, 5)), ones((2, 5, 7)), jnp.array([3, 5])), 2 * 8 * 5 * 7),
    ]
    for fun, args, expected in cases:
        jaxpr = jax.make_jaxpr(fun)(*args).jaxpr
        assert sum(equation_flops(equation)[1] for equation in jaxpr.eqns) == expected, fun
