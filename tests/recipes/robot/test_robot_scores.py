"""The numbers of rollouts, each held to a direct computation, and a policy's score in the world without a simulator."""

import importlib

import jax
import numpy as np
import pytest

from aurora_train.config import load
from aurora_train.errors import UserError
from aurora_train.evals.intervals import wilson
from aurora_train.machine.precision import settled
from robot.fitting import refuse_other
from robot.robot_scores import jerk, measured, returned
from robot.rollouts import Rollout
from robot.two_modes import TwoModes


def silent(done, total, what):
    pass


def ran(actions, rewards, success) -> Rollout:
    states = np.cumsum(actions, axis=0, dtype=np.float32)
    return Rollout(0, success, {"observation.state": states}, actions, np.array(rewards),
                   {"observation.state": states[-1]})  # fmt: skip


def test_the_numbers_of_rollouts():
    calm = np.zeros((4, 2), np.float32)
    wild = np.array([[0.5, 0], [1.5, 0], [0, -2], [1, -1]], np.float32)
    numbers = measured([ran(calm, [1, 2, 3, 4], True), ran(wild, [0, 0, 0, 1], False)], TwoModes())
    assert next(iter(numbers)) == "success" and numbers["success"] == 0.5 and numbers["episodes"] == 2
    assert (numbers["success_low"], numbers["success_high"]) == wilson(1, 2)
    assert numbers["steps_to_success"] == 4
    assert numbers["return"] == pytest.approx(((10 + 4 * (TwoModes.max_steps - 4)) + 1) / 2)
    assert numbers["actions_outside"] == 2 / 8 and numbers["action_excess"] == 1.0
    assert "steps_to_success" not in measured([ran(wild, [0] * 4, False)], TwoModes())


def test_a_faster_success_returns_more_and_a_failure_gains_nothing_after_its_end():
    three, two = np.zeros((3, 2), np.float32), np.zeros((2, 2), np.float32)
    assert returned(ran(two, [0, 1], True), 10) == 9 > returned(ran(three, [0, 0, 1], True), 10) == 8
    assert returned(ran(three, [0, 0, 1], False), 10) == 1


def test_jerk_is_the_third_derivative_in_seconds():
    time = np.arange(20) / 50
    path = np.stack([0.5 * time**3, time**2, np.ones(20)], axis=1)
    assert jerk(path, fps=50) == pytest.approx(3.0)
    assert jerk(path[:3], fps=50) == 0


def made(tmp_path, *overrides):
    (tmp_path / "tiny.yaml").write_text(
        "recipe: robot/policy\nmodel: {kind: cloning, width: 8, heads: 2, layers: 1, decoder_layers: 1}\n"
        "data: {source: 'world:two_modes', episodes: 6, chunk: 4, test: 0.3, validation: 0.2}\n"
        "score: {episodes: 12, execute: 2, gifs: 1}\ntrain: {steps: 2, batch: 4, seed: 0}\noptimizer: {lr: 1e-3}\n"
    )
    config = settled(load(str(tmp_path / "tiny.yaml"), list(overrides)))
    return config.recipe_class(config, tmp_path / "cache").ready(silent)


def kit(recipe, name: str):
    """A module of the kit as the recipe has it: a recipe is loaded with modules of its own."""
    return importlib.import_module(f"{type(recipe).__module__}.robot.{name}")


def left_of_the_disc(batch):
    """A policy that passes on the left: to a waypoint, then to the goal. It is asked in the form of training."""
    assert batch["state"].shape[1] == 4 and batch["task"].dtype == np.int32 and len(batch["key"]) == len(batch["state"])
    at, goal = batch["state"][:, :2], batch["state"][:, 2:]
    way = np.where(at[:, 1:] >= 0, goal, [-0.8, 0.05]) - at
    action = way / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 0.1)
    return np.repeat(action[:, None], 4, axis=1)


def test_a_good_policy_scores_well_and_the_same_each_time(tmp_path):
    recipe, key = made(tmp_path), jax.random.key(1)
    first, second = (recipe.score(left_of_the_disc, "test", key, tmp_path, silent) for _ in range(2))
    timed = ("latency_ms_p50", "latency_ms_p99")
    assert {name: first[name] for name in first if name not in timed} == {
        name: second[name] for name in second if name not in timed}  # fmt: skip
    assert next(iter(first)) == recipe.metric[0] == "success"
    assert first["success"] == 1 and first["episodes"] == 12 and first["success_low"] == wilson(12, 12)[0]
    assert 0 < first["latency_ms_p50"] <= first["latency_ms_p99"]
    assert [plot["file"] for plot in first["plots"]] == ["paths-x-y.svg", "rollout-0.gif"]
    assert all((tmp_path / plot["file"]).stat().st_size > 100 for plot in first["plots"])
    assert [row[0] for row in first["tables"][0]["rows"]] == list(range(1_000_000, 1_000_012))
    assert "rests on 12 episodes" in first["remarks"][0]
    while_training = recipe.score(left_of_the_disc, "validation", key, tmp_path, silent)
    assert "plots" not in while_training and while_training["return"] != first["return"], "other goals choose"


def test_the_expert_and_chance_stand_beside_the_score(tmp_path):
    found = made(tmp_path).baselines(tmp_path, silent)
    assert found["expert"]["success"] > 0.9 > found["random"]["success"] + 0.5
    (table,) = found["tables"]
    assert [row[0] for row in table["rows"]] == ["expert", "random"]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_a_world_that_cannot_be_drawn_is_remarked_and_scored(tmp_path, monkeypatch):
    def dark(self, size=96, camera=None):
        raise UserError("this machine cannot draw", why="no GL", hint="install it")

    recipe = made(tmp_path)
    monkeypatch.setattr(kit(recipe, "two_modes").TwoModes, "render", dark)
    found = recipe.score(left_of_the_disc, "test", jax.random.key(1), tmp_path, silent)
    assert found["success"] == 1 and [plot["file"] for plot in found["plots"]] == ["paths-x-y.svg"]
    assert any("cannot draw (no GL); install it" in remark for remark in found["remarks"])


def test_a_world_of_other_features_is_refused(tmp_path):
    recipe = made(tmp_path)
    recipe.known["shapes"]["observation.state"] = [7]
    with pytest.raises(UserError, match="shows 2 entries of `observation.state`, and the policy was trained on 7"):
        recipe.score(left_of_the_disc, "test", jax.random.key(1), tmp_path, silent)


OTHER = {
    "has 10 frames per second and the demonstrations 30": {"fps": 30.0},
    "3 in the demonstrations": {"shapes": {"action": [3]}},
    "pictures of 16 x 16 pixels, and the policy was trained on 16 x 24": {"cameras": ["above"],
                                                                         "shapes": {"above": [16, 24, 3]}},
    "does not know the task 'reach the goal": {"tasks": ["push", "pull"]},
}  # fmt: skip


@pytest.mark.parametrize("said", OTHER)
def test_a_world_that_is_not_that_of_the_data_is_refused(tmp_path, said):
    known = made(tmp_path).known
    other = known | OTHER[said] | {"shapes": known["shapes"] | OTHER[said].get("shapes", {})}
    with pytest.raises(UserError, match=said) as fault:
        refuse_other(other, "two_modes")
    assert fault.value.where == "score.world"
    refuse_other(known, "two_modes")


def test_a_world_for_the_score_is_looked_at_before_any_training(tmp_path):
    with pytest.raises(UserError, match="no world `two_mode`"):
        made(tmp_path, "score.world=two_mode")
    made(tmp_path, "score.world=two_mode", "evaluate.final=false")  # scored later, perhaps by another machine


def test_without_a_world_the_score_is_the_error_of_held_out_actions(tmp_path, monkeypatch):
    recipe = made(tmp_path)
    monkeypatch.setattr(type(recipe), "world", None)
    source, off = recipe.data("test"), np.array([0.1, -0.2])
    batch = source.take(np.arange(len(source)))
    right, keys = iter(batch["action"]), []  # the batches come in order, and the last is padded

    def nearly(asked):
        keys.extend(map(bytes, np.asarray(jax.random.key_data(asked["key"]))))
        return np.stack([next(right, np.full((4, 2), 1e3)) + off for _ in asked["state"]])

    monkeypatch.setattr(kit(recipe, "robot_scores"), "BATCH", 7)
    monkeypatch.setattr(kit(recipe, "robot_scores"), "TIMED", 1)
    found = recipe.score(nearly, "test", jax.random.key(1), tmp_path, silent)
    assert len(set(keys)) == -(-len(source) // 7) * 7, "each chunk has a draw of its own"
    assert next(iter(found)) == "action_error"
    wanted = np.sqrt(np.mean((off / recipe.known["scale"]["action"]["std"]) ** 2))
    assert found["action_error"] == pytest.approx(float(wanted), rel=1e-5)
    assert [row[1] for row in found["tables"][0]["rows"]] == pytest.approx([0.1, 0.2], rel=1e-5)
    assert recipe.baselines(tmp_path, silent) == {}
    recipe.known["scale"]["action"]["std"] = [1.0, 0.0]  # the second entry stood still in training
    right = iter(batch["action"])
    still = recipe.score(nearly, "test", jax.random.key(1), tmp_path, silent)
    assert still["action_error"] == pytest.approx(float(np.sqrt(np.mean(off**2))), rel=1e-5)
    right = iter(batch["action"] * np.nan)
    with pytest.raises(UserError, match="for chunk 0 of test or one after it is not a finite number"):
        recipe.score(nearly, "test", jax.random.key(1), tmp_path, silent)


def test_limits_that_no_score_could_keep_are_refused_before_any_training(tmp_path):
    with pytest.raises(UserError, match="3 bounds, and an action has 2 entries"):
        made(tmp_path, "limits.action_bound=[1, 2, 3]")
    for limit in ("success_min=0.5", "jerk_max=1"):
        with pytest.raises(UserError, match="measured by acting in a world, and there is none"):
            load(str(tmp_path / "tiny.yaml"), [f"data.source={tmp_path}", f"limits.{limit}"])


def test_checkpoints_are_not_chosen_by_the_episodes_of_the_final_score(tmp_path, monkeypatch):
    recipe = made(tmp_path)
    monkeypatch.setattr(type(recipe), "world", None)
    for split in ("test", "validation"):
        asked, source = [], recipe.data(split)

        def still(batch, asked=asked):
            asked.append(batch["state"])
            return np.zeros((len(batch["state"]), 4, 2))

        recipe.score(still, split, jax.random.key(1), tmp_path, silent)
        wanted = source.take(np.arange(len(source)))["state"]
        assert {tuple(row) for row in np.concatenate(asked)} == {tuple(row) for row in wanted}
    with pytest.raises(UserError, match="which choose checkpoints, need episodes"):
        load(str(tmp_path / "tiny.yaml"), [f"data.source={tmp_path}", "data.validation=0", "evaluate.score_every=2"])
