"""The car-following generator: the model is the published one, seeds decide everything, and a kill leaves no half of a
store."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from test_scene_store import assert_same, quiet

from driving.car_following import HARDEST_BRAKING, generate, idm_acceleration
from driving.generated import generated_scenes
from driving.roads import build_roads
from driving.scene_store import SPLITS
from driving.scenes import GREEN, RED, YELLOW

DRIVER = {"headway_s": 1.4, "acceleration": 1.6, "braking": 2.0, "standing_gap": 2.2}
MAPS = {"train": 3, "validation": 1, "test": 1}


def test_the_acceleration_is_that_of_the_paper_up_to_the_desired_speed():
    rng = np.random.default_rng(0)
    speed, desired, gap = rng.uniform(0, 15, 200), 15.0, rng.uniform(1, 80, 200)
    closing = rng.uniform(-5, 5, 200)
    got = idm_acceleration(speed, desired, gap, closing, **DRIVER)
    for v, s, dv, one in zip(speed, gap, closing, got, strict=True):
        wanted = 2.2 + max(0.0, v * 1.4 + v * dv / (2 * (1.6 * 2.0) ** 0.5))
        assert one == pytest.approx(max(1.6 * (1 - (v / 15) ** 4 - (wanted / s) ** 2), -HARDEST_BRAKING), abs=1e-12)


def test_at_the_equilibrium_gap_nobody_accelerates_and_who_is_too_fast_brakes_gently():
    speed = np.linspace(0, 14, 15)
    gap = (2.2 + 1.4 * speed) / np.sqrt(1 - (speed / 15) ** 4)
    np.testing.assert_allclose(idm_acceleration(speed, 15.0, gap, 0.0, **DRIVER), 0, atol=1e-12)
    fast = idm_acceleration(np.array([15.0, 20.0, 60.0]), 15.0, np.inf, 0.0, **DRIVER)
    assert fast[0] == 0 and 0 > fast[1] > fast[2] > -DRIVER["braking"]


def test_seeds_decide_the_map_and_the_traffic_and_nothing_else_does():
    one, again, other = generate(7, 1)[0], generate(7, 1)[0], generate(7, 1, seed=1)[0]
    assert_same(one, again)
    assert other.map_id == one.map_id and other.states.tobytes() != one.states.tobytes()
    assert other.lanes[0].centre.tobytes() == one.lanes[0].centre.tobytes()
    assert generate(8, 1)[0].map_id != one.map_id


def test_each_arm_has_green_then_yellow_then_all_have_red():
    roads = next(roads for roads in map(build_roads, range(9)) if roads.num_arms == 4)
    cycle = np.stack([roads.arm_lights(0.1 * step) for step in range(1200)])
    assert ((cycle != RED).sum(axis=1) <= 1).all() and set(np.unique(cycle)) == {GREEN, YELLOW, RED}
    for arm in cycle.T:
        changes = [(int(a), int(b)) for a, b in zip(arm, arm[1:], strict=False) if a != b]
        assert set(changes) == {(GREEN, YELLOW), (YELLOW, RED), (RED, GREEN)}


def test_every_lane_ends_where_its_successors_begin():
    for roads in map(build_roads, range(4)):
        lanes = {lane.id: lane for lane in roads.lanes}
        assert len(lanes) == len(roads.lanes) and any(lane.successors for lane in roads.lanes)
        for lane in roads.lanes:
            for name in lane.successors:
                np.testing.assert_allclose(lane.centre[-1], lanes[name].centre[0], atol=1e-3)


KILLED = """
import os, signal, sys
from pathlib import Path
from driving.generated import generated_scenes
def progress(done, total, what):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
generated_scenes(Path(sys.argv[1]), {maps}, 1, 0, progress)
"""


@pytest.mark.slow
def test_a_preparation_that_was_killed_starts_clean_and_makes_the_same_store(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED.format(maps=MAPS), str(tmp_path / "killed")]
    (tmp_path / "killed").mkdir()
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    left = [path for path in (tmp_path / "killed").iterdir() if path.is_dir()]
    assert len(left) == 1 and ".tmp-" in left[0].name
    store, whole = (generated_scenes(tmp_path / name, MAPS, 1, 0, quiet) for name in ("killed", "whole"))
    assert store.fingerprint == whole.fingerprint and not left[0].exists()
    for split in SPLITS:
        for index in range(whole.count(split)):
            assert_same(store.scene(split, index), whole.scene(split, index))
