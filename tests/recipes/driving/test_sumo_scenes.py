"""SUMO's conventions become a scene's. The simulations need the extra `driving`."""

from importlib.util import find_spec

import numpy as np
import pytest
from test_scene_store import assert_same, quiet

from aurora_train.config.load import load
from aurora_train.errors import MissingExtra
from driving import sumo_process
from driving.driving_scores import ROAD_USERS, driving_scores
from driving.generated import generated_scenes
from driving.scene_store import SPLITS
from driving.scenes import HISTORY, STEP_S, STEPS, Scene, boxes
from driving.settings import SUMO
from driving.sumo_driving import reactive_scores
from driving.sumo_scenes import box_state

HAS_SUMO = find_spec("libsumo") is not None
needs_sumo = pytest.mark.skipif(not HAS_SUMO, reason="needs the extra `driving`")


@pytest.mark.parametrize("angle, direction", [(90, (1, 0)), (0, (0, 1)), (180, (0, -1)), (270, (-1, 0))])
def test_the_front_bumper_of_sumo_is_the_middle_of_the_front_of_the_box(angle, direction):
    state = box_state((10.0, 20.0), angle, 5.0, 4.0)
    np.testing.assert_allclose(state[:2], np.array([10, 20]) - 2 * np.array(direction), atol=1e-12)
    np.testing.assert_allclose(state[3:], 5 * np.array(direction), atol=1e-12)
    front = boxes(state, np.array([4.0, 2.0]))[[0, 3]].mean(axis=0)
    np.testing.assert_allclose(front, [10, 20], atol=1e-12)


def test_who_leaves_the_world_is_scored_until_then():
    """SUMO's own driver does where its route ends; its situation stays among those of the other drivers."""
    states = np.zeros((1, STEPS, 5), np.float32)
    states[0, :, 0] = 0.5 * np.arange(STEPS)
    gone = states.copy()
    gone[0, HISTORY + 20 :] = np.nan
    scenes = [Scene("s", "m", ("1",), ("vehicle",), one, np.float32([[4, 2]]), 0, HISTORY) for one in (states, gone)]
    assert reactive_scores(scenes)["metres_6s"] == pytest.approx((30 + 10) / 2)
    assert reactive_scores(scenes)["collision_6s"] == 0


@pytest.mark.skipif(HAS_SUMO, reason="SUMO is here")
def test_without_sumo_the_extra_is_named_before_anything_is_made(tmp_path):
    with pytest.raises(MissingExtra, match="driving"):
        generated_scenes(tmp_path, dict.fromkeys(SPLITS, 1), 1, 0, quiet, SUMO)
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def simulated():
    return list(sumo_process.simulations([1, 3], 2, 0))


@needs_sumo
@pytest.mark.slow
def test_cars_of_sumo_keep_their_distance_their_lane_and_the_law(simulated):
    for scene in (scene for scenes in simulated for scene in scenes):
        assert scene.num_agents > 5 and scene.focal >= 0
        scores = driving_scores(scene, scene.states[:, scene.observed :], scene.valid[:, scene.observed :])
        assert scores["collision_6s"] == scores["red_light_6s"] == scores["off_road_6s"] == 0, scene.identifier
        assert set(scene.kinds) <= set(ROAD_USERS)


@needs_sumo
@pytest.mark.slow
def test_queues_of_sumo_stand_as_far_apart_as_sumo_lets_them(simulated):
    """minGap is 2.5 m from bumper to bumper: any other point of the box, or another angle, would give other gaps."""
    gaps = []
    for scene in (scene for scenes in simulated for scene in scenes):
        last = scene.states[:, -1].astype(float)
        standing = np.flatnonzero(np.hypot(last[:, 3], last[:, 4]) < 0.05)
        for car in standing:
            direction = np.array([np.cos(last[car, 2]), np.sin(last[car, 2])])
            to = last[standing, :2] - last[car, :2]
            gap = to @ direction - (scene.sizes[standing, 0] + scene.sizes[car, 0]) / 2
            same_lane = np.abs(to @ [-direction[1], direction[0]]) < 0.3
            gaps.extend(sorted(gap[same_lane & (gap > 0) & (gap < 6)])[:1])
    assert len(gaps) >= 5 and min(gaps) > 2.3 and np.median(gaps) < 2.8


@needs_sumo
@pytest.mark.slow
def test_velocity_is_how_the_box_moves(simulated):
    scene = simulated[0][0]
    moved = np.diff(scene.states[..., :2], axis=1) / STEP_S
    mean = (scene.states[:, 1:, 3:5] + scene.states[:, :-1, 3:5]) / 2
    both = scene.valid[:, 1:] & scene.valid[:, :-1]
    error = np.linalg.norm(moved - mean, axis=-1)[both]
    assert np.median(error) < 0.1 and np.percentile(error, 90) < 1.0


@needs_sumo
@pytest.mark.slow
def test_the_recipe_as_it_is_loaded_makes_scenes_of_sumo(tmp_path):
    """Its modules then have names that no other process can import."""
    keys = ["data.source=sumo", "data.simulated_maps=2", "data.simulated_scenes=1", "data.simulated_held_out=1"]
    config = load("driving/motion", [*keys, "model.tokens=16"])
    recipe = config.recipe_class(config, tmp_path).ready(quiet)
    assert len(recipe.data("train")) == 2 and "SUMO" in recipe.data("train").describe()["source"]
    assert recipe.data("train").scene(0).kinds


@needs_sumo
@pytest.mark.slow
def test_the_same_seeds_make_the_same_scenes_in_any_order(simulated):
    again = list(sumo_process.simulations([3, 1], 2, 0))
    for one, other in zip([*again[1], *again[0]], [*simulated[0], *simulated[1]], strict=True):
        assert_same(one, other)
    other = next(sumo_process.simulations([1], 1, 1))[0]
    assert other.lanes[0].centre.tobytes() == simulated[0][0].lanes[0].centre.tobytes()
    assert other.states.tobytes() != simulated[0][0].states.tobytes()
