"""The search's parts against brute force: the hull, the candidates of a space, the cheapest and the next faster one."""

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_train.errors import UserError
from aurora_train.nn.stack import Segment
from aurora_train.plan.planner import microbatches
from aurora_train.plan.residuals import Score
from aurora_train.plan.search import SHORTEST, Costs, Space, StackCosts, cheapest, next_faster, seconds_of

COSTS = Costs(1.0, 0.5, 3.0)


def score(saved, flops, moved=0, name=None):
    save = () if name is None else (name,)
    return Score(saved, flops, moved, save, save)


SCORES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=8, unique=True
).map(lambda rows: [score(*row, name=f"t{i}") for i, row in enumerate(rows)])
STACKS = st.lists(st.tuples(st.integers(1, 7), SCORES, st.integers(0, 9)), min_size=1, max_size=3).map(
    lambda rows: [StackCosts(f"s{i}", units, scores, gradient) for i, (units, scores, gradient) in enumerate(rows)]
)


def space_of(stacks, pairs=((8, 1), (4, 2), (2, 4)), devices=1, rest=lambda local: 100 + 3 * local):
    return Space(stacks, list(pairs), devices, COSTS, rest)


# ---- the hull


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SCORES)
def test_the_hull_is_convex_falls_and_lies_under_every_score(scores):
    hull = StackCosts("s", 4, scores, 0).hull(COSTS)
    points = [(s.saved_bytes, seconds_of(s, COSTS)) for s in hull]
    assert set(hull) <= set(scores)
    assert points[0] == min((s.saved_bytes, seconds_of(s, COSTS)) for s in scores), "it begins where memory is least"
    assert points[-1][1] == min(seconds_of(s, COSTS) for s in scores), "and ends where time is"
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert all(slope < 0 for slope in slopes) and slopes == sorted(slopes)
    for s in scores:
        for (a, at), (b, bt) in itertools.pairwise(points):
            if a <= s.saved_bytes <= b:
                line = at + (bt - at) * (s.saved_bytes - a) / (b - a)
                assert seconds_of(s, COSTS) >= line - 1e-9


def test_a_tensor_that_costs_more_than_a_mix_of_its_neighbours_is_not_on_the_hull():
    low, bad, high = score(0, 10), score(4, 9, name="bad"), score(5, 0, name="good")
    assert StackCosts("s", 4, [high, bad, low], 0).hull(COSTS) == [low, high]
    worse = score(6, 10, name="worse")
    assert StackCosts("s", 4, [low, worse], 0).hull(COSTS) == [low]


def test_time_is_work_by_rate():
    assert seconds_of(score(0, 7, 4), Costs(2.0, 3.0, 99.0)) == 7 * 2 + 4 * 3


# ---- candidates


@settings(max_examples=100, deadline=None, derandomize=True)
@given(STACKS)
def test_candidates_cover_their_stacks_in_segments_that_are_not_too_short(stacks):
    space = space_of(stacks)
    for candidate in space.steps(4, 2):
        assert set(candidate.cuts) == {s.path for s in stacks}
        assert candidate.segments == sum(map(len, candidate.cuts.values())) <= 2 * len(stacks)
        for stack in stacks:
            cut = candidate.cuts[stack.path]
            assert [a for a, _, _ in cut] == [0, *(b for _, b, _ in cut[:-1])] and cut[-1][1] == stack.units
            assert len(cut) == 1 or all(b - a >= SHORTEST for a, b, _ in cut)
            kept = [s.saved_bytes for _, _, s in cut]
            assert kept == sorted(kept), "the richer segment is last: its residuals are freed first"
        assert candidate.stacks() == {
            path: [Segment(a, b, s.save) for a, b, s in cut] for path, cut in candidate.cuts.items()
        }


@settings(max_examples=100, deadline=None, derandomize=True)
@given(STACKS)
def test_each_step_of_one_microbatch_takes_more_memory_and_less_time(stacks):
    steps = list(space_of(stacks).steps(4, 2))
    assert len({c.key for c in steps}) == len(steps)
    hulls = {path: {s.save for s in hull} for path, hull in space_of(stacks).hulls.items()}
    on_hull = [c for c in steps if all(s.save in hulls[path] for path, cut in c.cuts.items() for _, _, s in cut)]
    for before, after in itertools.pairwise(on_hull):
        assert after.bytes > before.bytes and after.seconds < before.seconds + 1e-9
    for off in steps:
        if off not in on_hull:
            assert all(len(cut) <= 2 for cut in off.cuts.values()) and steps[0].bytes < off.bytes < steps[-1].bytes
    assert steps[-1].seconds == pytest.approx(
        2 * COSTS.per_microbatch
        + 8 * sum(stack.units * min(seconds_of(s, COSTS) for s in stack.scores) for stack in stacks)
    )


def test_bytes_and_time_of_a_candidate_are_the_sums_they_stand_for():
    scores = [score(0, 10, 2), score(5, 1, 0, "a")]
    space = space_of([StackCosts("s", 6, scores, 7)], pairs=[(8, 3)], devices=2)
    cut = {"s": [(0, 4, scores[0]), (4, 6, scores[1])]}
    found = space.candidate(8, 3, cut)
    local = 8 // 2
    assert found.bytes == (100 + 3 * local) + 6 * 7 + 2 * 5 * local
    assert found.flops == 3 * 8 * (4 * 10 + 2 * 1), "over all devices"
    assert found.seconds == 3 * 3.0 + 3 * local * (4 * (10 + 1) + 2 * 1)


def test_all_is_every_step_of_every_microbatch():
    space = space_of([StackCosts("s", 4, [score(0, 9), score(3, 1, name="a")], 1)])
    found = space.all()
    assert [c.microbatch for c in found] == [8] * 3 + [4] * 3 + [2] * 3
    assert all(c.accumulation * c.microbatch == 8 for c in found)
    assert space_of([], pairs=[(8, 1), (1, 8)]).all()[1].cuts == {}, "a model without stacks has its microbatches"


# ---- choosing


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STACKS, st.integers(90, 1500), st.integers(-20, 20))
def test_the_cheapest_is_the_fastest_of_all_that_fit(stacks, budget, shift):
    candidates = space_of(stacks).all()

    def corrected(candidate):
        return candidate.bytes + shift

    found = cheapest(candidates, budget, corrected)
    fitting = [c for c in candidates if c.bytes + shift <= budget]
    if not fitting:
        assert found is None
        return
    assert found in fitting and found.seconds == min(c.seconds for c in fitting)
    ties = [c for c in fitting if c.seconds == found.seconds]
    assert found.microbatch == max(c.microbatch for c in ties)
    assert cheapest(candidates, budget + 1000, corrected).seconds <= found.seconds, "more room is never slower"

    faster = next_faster(candidates, found, corrected)
    beyond = [c for c in candidates if c.seconds < found.seconds * (1 - 1e-9)]
    if not beyond:
        assert faster is None
    else:
        assert faster in beyond and corrected(faster) > budget, "else it would have been chosen"
        assert corrected(faster) == min(corrected(c) for c in beyond)


def test_of_equals_the_larger_microbatch_is_chosen_then_the_fewer_bytes():
    free = Costs(1.0, 0.5, 0.0)
    stack = StackCosts("s", 4, [score(0, 9), score(3, 9, name="dear")], 0)
    space = Space([stack], [(8, 1), (4, 2), (2, 4)], 1, free, lambda local: 10 * local)
    assert len({c.seconds for c in space.all()}) == 1
    assert cheapest(space.all(), 1000, lambda c: c.bytes).microbatch == 8
    assert cheapest(space.all(), 50, lambda c: c.bytes).microbatch == 4


def brute(stack, budget, local, rest):
    """The least seconds of any two-segment plan of one stack, over every pair of save-sets and every cut."""
    best = None
    for low, high in itertools.product(stack.scores, repeat=2):
        for cut in (0, *range(SHORTEST, stack.units - SHORTEST + 1), stack.units):
            kept = cut * low.saved_bytes + (stack.units - cut) * high.saved_bytes
            if rest + stack.units * stack.gradient + kept * local <= budget:
                seconds = local * (cut * seconds_of(low, COSTS) + (stack.units - cut) * seconds_of(high, COSTS))
                best = seconds if best is None else min(best, seconds)
    return best


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SCORES, st.integers(4, 8), st.integers(0, 400))
def test_of_one_stack_the_choice_is_within_one_unit_of_the_best_two_segment_plan(scores, units, budget):
    stack = StackCosts("s", units, scores, 1)
    space = space_of([stack], pairs=[(1, 1)], rest=lambda local: 10)
    found = cheapest(space.all(), budget, lambda c: c.bytes)
    best = brute(stack, budget, 1, 10)
    assert (found is None) == (best is None)
    if found is not None:
        seconds = found.seconds - COSTS.per_microbatch
        dearest = max(seconds_of(s, COSTS) for s in scores)
        assert best - 1e-9 <= seconds <= best + SHORTEST * dearest


# ---- microbatches


def asked(batch, accumulation="auto", couples="example", devices=1):
    memory = SimpleNamespace(accumulation=accumulation)
    config = SimpleNamespace(train=SimpleNamespace(batch=batch), memory=memory, recipe="x")
    return microbatches(config, SimpleNamespace(couples=couples), devices)


def test_microbatches_are_the_divisors_largest_first():
    assert asked(12) == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]
    assert asked(24, devices=4) == [(24, 1), (12, 2), (8, 3), (4, 6)]
    assert asked(1) == [(1, 1)] and asked(7) == [(7, 1), (1, 7)]


@pytest.mark.parametrize("couples", ["microbatch", "global"])
def test_a_loss_that_couples_examples_is_not_split(couples):
    assert asked(12, couples=couples) == [(12, 1)]


def test_a_number_of_microbatches_that_was_asked_for_is_the_only_one():
    assert asked(12, accumulation=3) == [(4, 3)]
    assert asked(24, accumulation=3, devices=4) == [(8, 3)]


@pytest.mark.parametrize("how", [{"devices": 5}, {"accumulation": 7}, {"devices": 8, "accumulation": 2}])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(how):
    with pytest.raises(UserError, match="train.batch") as caught:
        asked(24 if "accumulation" in how else 12, **how) if how != {"devices": 5} else asked(12, **how)
    nearest = int(str(caught.value).rsplit(maxsplit=1)[-1])
    assert asked(nearest, **how)
