"""A plan never changes the maths: on one CPU in float32 no save-set and no cut of scanned units changes a bit.

Some kinds of plans round otherwise, and `excuse` in benchmarks/plan_numerics.py says why: the size is bounded here.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from kit import load_benchmark

from aurora_train.nn.stack import Segment

pytestmark = pytest.mark.optimized  # which bits a program has is the compiler's choice

benchmark = load_benchmark("plan_numerics")
SLOW = pytest.mark.slow
EXCUSED = 2e-6  # what an excused plan may cost, relative, over ten steps
SEEDS = (0, 2, 5, 7, 10, 12)  # of plans without an excuse: one scan and two, all kept, some or nothing
# What the slow tier trains beside the plain language model: codes in 8 bits, and another objective. Both are unclipped,
# so that every cut must have the bits; what a cut does to dropout is in tests/train/test_step.py. All other cases are
# trained before a release.
UNLIKE = ("int8, bfloat16 masters", "unclipped neural")
OTHERS = [pytest.param(c, 0, marks=SLOW if c in UNLIKE else pytest.mark.release)
          for c in benchmark.CASES if c != "adamw"]  # fmt: skip
OTHERS += [pytest.param(c, n, marks=pytest.mark.release) for n in (1, 2) for c in benchmark.CASES if c != "adamw"]


def draws(number: int, slow: int) -> list:
    """Seeds of drawn plans: the first `slow` in the slow tier, the others, of the same property, before a release."""
    return [pytest.param(n, marks=SLOW if n < slow else pytest.mark.release) for n in range(number)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The Bench of a case, made once: its reference is trained once too."""
    made = {}

    def make(case, layers):
        if (case, layers) not in made:
            folder = tmp_path_factory.mktemp("numerics")
            config = benchmark.load_case(case, folder, [f"model.layers={layers}"])
            of_case = benchmark.Bench(config, folder / "cache")
            made[case, layers] = of_case, of_case.train(of_case.reference())
        return made[case, layers]

    return make


def refuse_other_bits(of_case, reference, plan):
    outcome = of_case.train(plan)
    found, reason = benchmark.difference(reference, outcome), benchmark.excuse(plan)
    if reason is None:
        assert found.none, f"{plan.stacks}: {found}"
    np.testing.assert_allclose(outcome.losses, reference.losses, rtol=EXCUSED, atol=0, err_msg=f"{plan.stacks}")


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=SLOW if number == 2 else pytest.mark.release)
                                         for number in range(1, 6))])  # fmt: skip
def test_random_plans_have_the_bits_of_one_scan(bench, number):
    of_case, reference = bench("unclipped", 4)
    plan = of_case.random_plan(random.Random(SEEDS[number]), unroll=0.0)
    assert benchmark.excuse(plan) is None
    refuse_other_bits(of_case, reference, plan)


@pytest.mark.parametrize("number", draws(20, slow=0))
def test_twenty_random_plans_have_them_or_a_reason(bench, number):
    of_case, reference = bench("adamw", 6)
    refuse_other_bits(of_case, reference, of_case.random_plan(random.Random(number), unroll=0.2))


@pytest.mark.parametrize("case,number", OTHERS)
def test_so_they_have_with_dropout_other_optimizers_formats_and_models(bench, case, number):
    of_case, reference = bench(case, 6)
    refuse_other_bits(of_case, reference, of_case.random_plan(random.Random(number), unroll=0.0))


MICROBATCHES = [("unclipped", 4), pytest.param("unclipped neural", 4, marks=SLOW)]
MICROBATCHES += [pytest.param(case, parts, marks=pytest.mark.release)
                 for case in ("unclipped", "dropout", "muon", "neural") for parts in (2, 4, 8)
                 if (case, parts) != ("unclipped", 4)]  # fmt: skip


@pytest.mark.parametrize("case,accumulation", MICROBATCHES)
def test_another_microbatch_changes_losses_by_rounding_alone(bench, case, accumulation):
    of_case, reference = bench(case, 6 if case in UNLIKE else 4)
    outcome = of_case.train(of_case.reference(accumulation))
    np.testing.assert_allclose(outcome.losses, reference.losses, rtol=1e-6, atol=0)


def test_a_difference_of_one_bit_is_seen(bench):
    _, reference = bench("unclipped", 4)
    name = "params.stack.units.0003.mlp.down"
    moved = {**reference.parameters, name: np.nextafter(reference.parameters[name], np.float32(np.inf))}
    found = benchmark.difference(reference, reference._replace(parameters=moved))
    assert (found.loss_ulps, found.parameter_ulps) == (0, 1) and not found.none


def test_random_plans_are_plans(bench):
    of_case, _ = bench("unclipped", 4)
    _, stack = of_case.stack
    cuts = [benchmark.random_cut(random.Random(n), 6, stack.tags, 0.5) for n in range(50)]
    assert {len(cut) for cut in cuts} == {1, 2, 3}
    assert all(segment.stop - segment.start >= 2 for cut in cuts for segment in cut)
    assert all([s.start for s in cut] == [0, *(s.stop for s in cut[:-1])] and cut[-1].stop == 6 for cut in cuts)
    assert {type(segment.save) for cut in cuts for segment in cut} == {tuple, type(None)}
    assert benchmark.excuse(of_case.reference()) is None
    assert benchmark.excuse(of_case.plan([Segment(0, 4, None, True)]))


@pytest.mark.parametrize("a,b,steps", [(1.0, 1.0, 0), (1.0, np.nextafter(np.float32(1), np.float32(2)), 1),
                                       (0.0, -0.0, 0), (1e-45, -1e-45, 2)])
def test_ulps_count_floats_in_between(a, b, steps):
    assert benchmark.ulps(np.array([a], np.float32), np.array([b], np.float32)) == steps


def test_offloaded_tensors_have_the_bits_of_those_that_stay(bench):
    """jax runs the copies on a CPU too, where they free nothing."""
    of_case, reference = bench("unclipped", 4)
    moved = [Segment(0, 2, (), offload=("unit_input",)), Segment(2, 4, ("attn_out",), offload=("mlp_up", "query"))]
    refuse_other_bits(of_case, reference, of_case.plan(moved))
