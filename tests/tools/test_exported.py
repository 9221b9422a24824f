"""The comparison by which `aurora verify` repeats the proof of an export."""

import numpy as np
import pytest

from aurora_train.tools.exported import differences

RECORDED = {"input.x": np.ones(3), "output": np.float32([[0.01, -0.02]])}  # actions in metres, say


def test_predictions_in_small_units_are_compared_by_their_own_size():
    assert differences(RECORDED, {"output": RECORDED["output"] * np.float32(1.0005)}) == []
    (line,) = differences(RECORDED, {"output": RECORDED["output"] * np.float32(1.05)})
    assert line == "the prediction `output` differs from the recorded one by up to 0.001"
    assert differences({"output": np.zeros(2)}, {"output": np.zeros(2)}) == []


@pytest.mark.parametrize("found", [{}, {"output": np.zeros((2, 2))}, {"other": RECORDED["output"]}])
def test_a_prediction_that_is_missing_or_of_another_shape_is_a_difference(found):
    assert differences(RECORDED, found) == ["the prediction `output` is missing or has another shape"]


def test_nan_is_a_difference():
    assert len(differences(RECORDED, {"output": np.full((1, 2), np.nan)})) == 1
