"""A policy answers observations: checked by name, shape and value, and held to the bound of its actions."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from aurora_train.config import load_values
from aurora_train.errors import UserError
from aurora_train.machine.precision import settled
from aurora_train.random import stream
from robot.limits import Limits, bound_of, exceeded, of_bound

VALUES = {
    "recipe": "robot/policy", "data": {"chunk": 4, "cameras": ["top"], "test": 0.1},
    "model": {"kind": "flow", "width": 16, "heads": 2, "layers": 1, "decoder_layers": 1, "noising": {"steps": 2},
              "vision": {"channels": 8}},
    "train": {"steps": 1, "batch": 2},
}  # fmt: skip
FACTS = {
    "state": ["observation.state"], "cameras": ["top"], "tasks": ["left", "right"], "fps": 10.0,
    "shapes": {"observation.state": [3], "top": [16, 16, 3], "action": [2]},
    "names": {"observation.state": ["shoulder", "elbow", "wrist"], "top": [], "action": ["x", "y"]},
    "scale": {
        "observation.state": {"mean": [0, 0, 0], "std": [1, 1, 1], "min": [-1, -1, 2], "max": [1, 1, 2]},
        "top": {"mean": [0.5] * 3, "std": [0.2] * 3},
        "action": {"mean": [0, 0], "std": [1, 1], "min": [-1, -1], "max": [1, 1]},
    },
}  # fmt: skip
GOOD = {"observation.state": [0.1, 0.2, 2.0], "observation.images.top": np.zeros((16, 16, 3), np.uint8), "task": "left"}


def recipe_of(**limits):
    config = settled(load_values(VALUES | {"limits": limits}, "served"))
    return config.recipe_class(config, Path("unused")).use(FACTS)


@pytest.fixture(scope="module")
def predict():
    recipe = recipe_of()
    graph, _ = nnx.split(nnx.eval_shape(lambda: recipe.model(nnx.Rngs(params=stream(0, "init")))))
    made = jax.jit(lambda: nnx.split(recipe.model(nnx.Rngs(params=stream(0, "init"))))[1])()
    model = nnx.merge(graph, made)
    model.eval()
    run = jax.jit(lambda batch: recipe.predict(model, batch))
    return lambda batch: np.asarray(run(batch))


def test_the_answer_is_a_chunk_that_follows_from_the_observations_so_far(predict):
    recipe = recipe_of()
    one, other = recipe.responder(predict), recipe.responder(predict)
    first, second = one(GOOD), one(GOOD)
    assert first["action"].shape == (4, 2) and first["execute"] == 2 and "warnings" not in first
    assert not np.array_equal(first["action"], second["action"]), "each answer has its own draw"
    assert np.array_equal(other(GOOD)["action"], first["action"]), "and the n-th is the same for every client"
    lists = GOOD | {"observation.images.top": GOOD["observation.images.top"].tolist(), "observation.more": "not read"}
    assert np.array_equal(recipe.responder(predict)(lists)["action"], first["action"])


def test_the_policy_is_compiled_before_the_first_client_and_not_again_for_each(predict):
    recipe, asked = recipe_of(), []

    def counted(batch):
        asked.append(batch)
        return predict(batch)

    first = recipe.responder(counted)
    assert len(asked) == 1
    second = recipe.responder(counted)
    assert np.array_equal(first(GOOD)["action"], second(GOOD)["action"]) and len(asked) == 3


BAD = {
    "there is no `observation.state`": {"observation.state": None},
    "there is no `observation.images.top`": {"observation.images.top": None},
    "there is no `task`": {"task": None}, "does not know the task 'lift'": {"task": "lift"},
    "does not know the task array": {"task": np.zeros(3)}, "does not know the task 7": {"task": 7},
    "`state` is not known": {"state": [1, 2, 3]}, "did you mean `task`": {"tasks": "left"},
    "float64[2]": {"observation.state": [1.0, 2.0]}, "int64[1, 3]": {"observation.state": [[1, 2, 3]]},
    "not an array of numbers": {"observation.state": [[1], [2, 3]]}, "not an array": {"observation.state": "abc"},
    "bool[3]": {"observation.state": [True, False, True]},
    "[1]` (elbow) is nan": {"observation.state": [0, math.nan, 2]},
    "(wrist) is inf": {"observation.state": [0, 0, math.inf]},
    "(shoulder) is 1e+60": {"observation.state": [1e60, 0, 2]},
    "uint8[8, 8, 3]": {"observation.images.top": np.zeros((8, 8, 3), np.uint8)},
    "no bytes": {"observation.images.top": np.full((16, 16, 3), 0.5)},
    "from 0 to 255": {"observation.images.top": np.full((16, 16, 3), 256)},
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_a_bad_observation_is_answered_with_what_was_expected(predict, said):
    request = {name: value for name, value in (GOOD | BAD[said]).items() if value is not None}
    with pytest.raises(UserError) as fault:
        recipe_of().responder(predict)(request)
    assert said in str(fault.value)
    assert "float32[3]" in str(fault.value) or "finite float32" in str(fault.value)


def test_another_unit_or_a_broken_sensor_is_reported(predict):
    respond = recipe_of().responder(predict)
    assert "warnings" not in respond(GOOD | {"observation.state": [2.9, -2.9, 2.001]})
    (warning,) = respond(GOOD | {"observation.state": [0, 57.3, 2]})["warnings"]
    assert warning.startswith("observation far from the training data: ") and "(elbow) is 57.3" in warning
    assert "(wrist) is 2.1" in respond(GOOD | {"observation.state": [0, 0, 2.1]})["warnings"][0]


def test_an_action_beyond_its_bound_is_cut_and_the_answer_says_so(predict):
    free = recipe_of().responder(predict)(GOOD)["action"]
    bound = float(np.abs(free).max()) / 2
    answer = recipe_of(action_bound=bound).responder(predict)(GOOD)
    assert np.array_equal(answer["action"], np.clip(free, -np.float32(bound), np.float32(bound)))
    (warning,) = answer["warnings"]
    assert warning.startswith("action cut to limits.action_bound: ") and f"{np.abs(free).max():.4g}" in warning
    wide = recipe_of(action_bound=[1e3, 1e3]).responder(predict)(GOOD)
    assert np.array_equal(wide["action"], free) and "warnings" not in wide


def test_a_limit_is_exceeded_by_its_number_and_by_the_lack_of_it():
    limits = Limits(success_min=0.9, latency_p99_ms=5, action_bound=2.0, jerk_max=1)
    good = {"success": 0.9, "latency_ms_p99": 5.0, "action_of_bound": 1.0, "jerk": 0.5}
    assert exceeded(limits, good) == [] and exceeded(Limits(), {}) == []
    for name, value, key in (("success", 0.89, "success_min"), ("latency_ms_p99", 5.1, "latency_p99_ms"),
                             ("action_of_bound", 1.01, "action_bound"), ("jerk", math.nan, "jerk_max")):  # fmt: skip
        (line,) = exceeded(limits, good | {name: value})
        assert f"limits.{key}" in line and name in line
    assert len(exceeded(limits, {})) == 4
    actions = np.float32([[0.5, -3], [1, 1]])
    assert of_bound(actions, Limits(action_bound=[1, 2])) == {"action_of_bound": 1.5}
    assert of_bound(actions, Limits()) == {}
    with pytest.raises(UserError, match="3 bounds, and an action has 2"):
        bound_of(Limits(action_bound=[1, 2, 3]), 2)


BAD_LIMITS = [{"action_bound": -1}, {"action_bound": [1, 0]}, {"success_min": 2}, {"sucess_min": 0.5},
              {"action_error_max": 1.0}]  # which is not measured in a world


@pytest.mark.parametrize("limits", BAD_LIMITS)
def test_a_limit_that_is_none_is_refused(limits):
    with pytest.raises(UserError, match="limits"):
        recipe_of(**limits)
