"""The benchmark beside rivals' policies runs, and ours recomputes no more than any of them in one small case."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.mark.slow
def test_ours_is_no_dearer_than_any_policy_at_the_same_budget():
    sys.path.insert(0, BENCHMARKS)
    try:
        import plan_rivals

        found = plan_rivals.measure("rtx-5090", "gpt2-350m", 1024, 32, "f32")
    finally:
        sys.path.remove(BENCHMARKS)
    plans = found["plans"]
    assert set(plans) == {"ours", "full", "dots", "named", "estimator", "ratio"} and plans["ours"]
    assert plans["ours"]["bytes"] <= found["budget"]
    for rival, plan in plans.items():
        assert plan is None or plans["ours"]["seconds"] <= 1.001 * plan["seconds"], (rival, plan)
