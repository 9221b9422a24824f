"""The planner against exhaustive truth: a small grid of plans compiled for an absent GPU, a choice at each budget."""

import sys
from pathlib import Path

import pytest

from aurora_train.plan.planner import COMPILES
from aurora_train.plan.verify import can_compile_for_gpu

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
GROUPS = (("query", "key", "value", "attn_flash"), ("mlp_gate", "mlp_up", "mlp_act"))


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, BENCHMARKS)
    try:
        import plan_truth

        yield plan_truth
    finally:
        sys.path.remove(BENCHMARKS)


def test_the_truth_is_every_union_once_and_budgets_span_it(benchmark):
    sets = benchmark.unions(benchmark.GROUPS)
    assert len(sets) == len(set(sets)) == 32 and sets[0] == () and max(map(len, sets)) == 8
    truth = [benchmark.Truth(1, (), size, 1.0) for size in (700, 100, 400)]
    assert benchmark.budgets(truth, 4) == [100, 300, 500, 700]


@pytest.mark.release
@pytest.mark.skipif(not can_compile_for_gpu(), reason="needs the extra [plan]")
def test_choices_at_toy_size_fit_and_are_nearly_the_cheapest(benchmark):
    tree = benchmark.toy_tree(layers=4, batch=2)
    truth, rows = benchmark.measure(tree, "h100", 6, groups=GROUPS)
    assert len(truth) == 2 * 4 and len({t.bytes for t in truth}) > 4
    assert all(row["looks"] <= COMPILES for row in rows)
    chosen = [row for row in rows if row["excess"] is not None]
    assert not any(row["over"] for row in chosen)
    assert len(chosen) == len(rows), [row["why"] for row in rows if row["excess"] is None]
    assert sum(row["excess"] <= benchmark.SAME - 1 for row in rows) >= 4, [row["excess"] for row in rows]
