"""Meta-World's tasks as worlds, held to the package itself, and a tiny policy from demonstrations to a report."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from kit import in_process

from aurora_train.errors import MissingExtra, UserError
from robot import metaworld_worlds
from robot.rollouts import Expert, rollouts
from robot.worlds import world

VECTORS = ("observation.state", "observation.environment_state")
TASKS = ("pick-place-v3", "push-v3")


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch):
    metaworld_worlds._metaworld.cache_clear()
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(MissingExtra, match=r"needs the package `metaworld`, .*\n  pip install 'aurora_train\[robot\]'"):
        world("metaworld:push-v3")


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("metaworld")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_seed_fixes_the_episode_whatever_ran_before(task, package):
    on, other = world(f"metaworld:{task}"), world(f"metaworld:{task}")
    first = on.reset(3)
    for _ in range(30):
        on.step(np.array([0.3, 0.9, -0.4, 1.0]))
    on.reset(4)
    again, elsewhere = on.reset(3), other.reset(3)
    steps = [[one.step(np.array([0.1, 0.2, -1.0, 0.5]))[0] for _ in range(20)][-1] for one in (on, other)]
    for name in first:
        assert np.array_equal(first[name], again[name]) and np.array_equal(first[name], elsewhere[name])
        assert np.array_equal(steps[0][name], steps[1][name])
        assert first[name].dtype == np.float32 and len(on.names[name]) == len(first[name])
    goals = {on.reset(seed)["observation.environment_state"][-3:].tobytes() for seed in range(8)}
    assert len(goals) == 8


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_observations_rewards_and_expert_are_those_of_the_package(task, package):
    """The same actions from the same goal in an environment that Meta-World makes itself: equal to the bit."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    from metaworld.policies import ENV_POLICY_MAP

    (ours,) = rollouts(Expert(), f"metaworld:{task}", [11])
    assert ours.success and 30 < ours.steps < 150
    drawn = world(f"metaworld:{task}")
    drawn.reset(11)
    env, expert = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"](seed=1), ENV_POLICY_MAP[task]()
    env._last_rand_vec = drawn._env._last_rand_vec  # the places of object and goal
    seen, _ = env.reset()
    for step, action in enumerate(ours.actions):
        shown = np.concatenate([ours.observations[name][step] for name in VECTORS])
        assert np.array_equal(shown, np.concatenate([seen[:11], seen[-3:]]).astype(np.float32)), step
        assert np.allclose(np.clip(expert.get_action(seen), -1, 1), action, atol=1e-5)
        seen, reward, _, _, info = env.step(action)
        assert reward == ours.rewards[step] and bool(info["success"]) == (step == ours.steps - 1)


@pytest.mark.slow
def test_a_task_that_does_not_exist_is_refused(package):
    with pytest.raises(UserError, match="no task `push-v2`\n  did you mean `push-v3`"):
        world("metaworld:push-v2")


@pytest.mark.slow
def test_a_picture_shows_the_scene_or_one_message_says_why_not(package):
    draw = """
from robot.worlds import world
one, two = (world('metaworld:push-v3', ['side'], 64) for _ in range(2))
def seen(on, seed):
    on.reset(seed)
    return on.pictures()['observation.images.side']
first, other, again = seen(one, 1), seen(two, 2), seen(two, 1)
print(first.std() > 10, (first == again).all(), (first != other).any(), one.render(32).shape)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    off = subprocess.run([sys.executable, "-c", draw], env=environment | {"MUJOCO_GL": "disabled"}, capture_output=True,
                         text=True, timeout=120)  # fmt: skip
    assert "UserError: MuJoCo cannot draw on this machine" in off.stderr and "set MUJOCO_GL=egl" in off.stderr
    assert "ignored" not in off.stderr
    environment.pop("MUJOCO_GL", None)
    drawn = subprocess.run([sys.executable, "-c", draw], env=environment, capture_output=True, text=True, timeout=120)
    assert "ignored" not in drawn.stderr
    cannot = "UserError: MuJoCo cannot draw on this machine" in drawn.stderr
    assert cannot or drawn.stdout == "True True True (32, 32, 3)\n"


@pytest.mark.slow
def test_a_tiny_policy_goes_from_demonstrations_to_a_report(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    small = ["model.width=16", "model.heads=2", "model.layers=1", "model.decoder_layers=1", "data.episodes=5",
             "data.validation=0.3", "train.steps=3", "train.batch=8", "evaluate.examples=8", "score.episodes=2",
             "score.gifs=1"]  # fmt: skip
    assert in_process("train", "robot/pick_place_act", *small, "--run", "run", "--quiet") == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["headline"] == "success" and scores["score"]["episodes"] == 2
    assert scores["baselines"]["expert"]["success"] == 1.0 and scores["baselines"]["random"]["success"] == 0.0
    assert scores["baselines"]["expert"]["return"] > scores["baselines"]["random"]["return"]
    page = (tmp_path / "run" / "report.html").read_text()
    films = page.count("data:image/gif;base64,")
    assert films == 1 or any("cannot draw" in remark for remark in scores["remarks"])
    assert page.count("data:image/svg+xml;base64,") == 3
    data = json.loads((tmp_path / "run" / "provenance.json").read_text())["data"]
    assert data["episodes"] + round(0.3 * 5) >= 4 and data["failures"] == data["attempts"] - 5
    assert "mujoco" in data["simulator"] and data["noise"] == 0.3
