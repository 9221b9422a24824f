"""Rollouts in lock step, what turns chunks into actions, and demonstrations, in the world that needs no simulator."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from aurora_train.errors import UserError
from robot.demonstrations import record
from robot.episodes import JOURNAL
from robot.rollouts import Chunked, Expert, Tape, Uniform, rollouts
from robot.worlds import world


def silent(done, total, what):
    pass


def test_the_same_seeds_give_the_same_episodes_however_many_run_together():
    one, three = (rollouts(Expert(), "two_modes", range(7), at_once=n) for n in (1, 3))
    assert [r.seed for r in one] == list(range(7)) and all(r.success for r in one)
    for a, b in zip(one, three, strict=True):
        assert np.array_equal(a.actions, b.actions) and np.array_equal(a.rewards, b.rewards)
        assert all(np.array_equal(a.observations[name], b.observations[name]) for name in a.observations)
    assert len({r.observations["observation.environment_state"][0].tobytes() for r in one}) == 7
    assert len({r.steps for r in one}) > 1, "an episode ends at its own success"


def test_random_actions_stay_within_the_limits_and_do_not_succeed():
    tried = rollouts(Uniform(), "two_modes", range(5), max_steps=20)
    assert not any(r.success for r in tried) and {r.steps for r in tried} == {20}
    assert max(np.abs(r.actions).max() for r in tried) <= 1 and tried[0].rewards.shape == (20,)


def numbered(asked):
    """A policy whose chunk says when it was asked (first entry) and for which step (second entry)."""

    def act(seen, episodes, step):
        asked.append((step, episodes.tolist(), seen["observation.state"].shape))
        rows = np.stack([np.full(4, step), step + np.arange(4)], axis=1)
        return np.repeat(rows[None].astype(np.float32), len(episodes), axis=0) / 100

    return act


def test_open_loop_takes_the_first_actions_of_each_chunk():
    asked = []
    ran = rollouts(Chunked(numbered(asked), execute=3, width=4), "two_modes", [5, 6, 7, 8, 9], at_once=4, max_steps=7)
    wanted = np.array([[0, 0], [0, 1], [0, 2], [3, 3], [3, 4], [3, 5], [6, 6]]) / 100
    assert all(np.allclose(r.actions, wanted) for r in ran)
    assert [step for step, *_ in asked] == [0, 3, 6] * 2
    assert [episodes for _, episodes, _ in asked[::3]] == [[0, 1, 2, 3], [4, 4, 4, 4]]
    assert {shape for *_, shape in asked} == {(4, 2)}, "always one shape"


def test_an_ensemble_is_the_weighted_mean_of_all_that_was_predicted_for_a_step():
    """Held to the sum over predictions, oldest first, with weights exp(-m i) (Zhao et al. 2023, algorithm 2)."""
    draws, m, chunk, steps = np.random.default_rng(0), 0.3, 4, 9
    chunks = draws.uniform(-0.1, 0.1, size=(steps, 2, chunk, 2))
    policy = Chunked(lambda seen, episodes, step: chunks[step], ensemble=m, width=2)
    ran = rollouts(policy, "two_modes", [1, 2], max_steps=steps)
    for row, r in enumerate(ran):
        for step in range(steps):
            made = range(max(0, step - chunk + 1), step + 1)
            weights = np.exp(-m * np.arange(len(made)))
            said = np.array([chunks[one, row, step - one] for one in made])
            assert np.allclose(r.actions[step], weights @ said / weights.sum(), atol=1e-6)


def test_a_score_keeps_no_pictures_of_what_was_seen():
    """Of fifty long episodes they would fill the memory."""
    (ran,) = rollouts(Expert(), "two_modes", [1], cameras=["above"], size=16, max_steps=3, filmed=1)
    assert set(ran.observations) == set(ran.last) == {"observation.state", "observation.environment_state"}
    assert ran.film[0].shape == (160, 160, 3)


def test_an_action_that_is_no_number_is_refused():
    def diverged(seen, episodes, step):
        return np.full((len(episodes), 4, 2), np.nan if step == 2 else 0.0)

    with pytest.raises(UserError, match="step 2 of an episode is not a finite number"):
        rollouts(Chunked(diverged, width=2), "two_modes", [0, 1])


def test_an_unknown_world_or_camera_is_refused_with_what_there_is():
    with pytest.raises(UserError, match="did you mean `two_modes`"):
        world("two_mode")
    with pytest.raises(UserError, match="no camera `top`"):
        world("two_modes", ["top"])


def test_pictures_are_drawn_when_they_are_looked_at_and_show_the_present(monkeypatch):
    on, drawn = world("two_modes", ["above"], 24), []
    monkeypatch.setattr(on.of, "render", lambda *of, render=on.of.render: drawn.append(of) or render(*of))
    tape = Tape(on, 0, 0, False, False)
    first = tape.observation["observation.images.above"]
    assert first.shape == (24, 24, 3) and tape.observation["observation.images.above"] is first
    for _ in range(4):
        tape.act(np.ones(2, np.float32))
    assert len(drawn) == 1  # nobody asked what was seen on the way
    now = tape.observation["observation.images.above"]
    assert len(drawn) == 2 and np.array_equal(now, on.of.render(24)) and not np.array_equal(now, first)


def test_demonstrations_come_from_the_cache_and_fewer_are_the_first_of_more(tmp_path):
    made = record("two_modes", 6, 0, silent, cache=tmp_path, noise=0.2, cameras=["above"], size=16)
    again = record("two_modes", 6, 0, lambda *_: pytest.fail("recorded again"), cache=tmp_path, noise=0.2,
                   cameras=["above"], size=16)  # fmt: skip
    fewer = record("two_modes", 4, 0, silent, cache=tmp_path, noise=0.2, cameras=["above"], size=16)
    assert made.fingerprint == again.fingerprint and fewer.digests == made.digests[:4]
    assert made.arrays["observation.images.above"].shape == (made.lengths.sum(), 16, 16, 3)
    assert made.source["failures"] == made.source["attempts"] - 6
    assert record("two_modes", 6, 1, silent, cache=tmp_path).digests != made.digests


def test_recorded_actions_are_the_experts_and_not_the_shaken_ones(tmp_path):
    made = record("two_modes", 3, 0, silent, cache=tmp_path, noise=0.5)
    state, action = made[0].arrays["observation.state"], made[0].arrays["action"]
    carried_out = np.diff(state, axis=0) * made.fps
    assert np.abs(carried_out - action[:-1]).std() > 0.2


RECORDS = """
import os, signal, sys
from pathlib import Path
from robot.demonstrations import record
def stop(done, total, what):
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
record("two_modes", 5, 3, stop, cache=Path(sys.argv[1]))
"""


def test_a_recording_that_was_killed_ends_in_the_same_demonstrations(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", RECORDS, str(tmp_path), "3"], env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (journal,) = tmp_path.glob(f"*.growing/{JOURNAL}")
    assert len(journal.read_text().splitlines()) == 4
    seen = []
    found = record("two_modes", 5, 3, lambda done, total, what: seen.append(done), cache=tmp_path)
    assert seen == [4, 5]
    assert found.fingerprint == record("two_modes", 5, 3, silent, cache=tmp_path / "other").fingerprint
