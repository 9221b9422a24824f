"""Each score is held to a slow reference in float64 that is computed another way; baselines do what their names say."""

import dataclasses
import warnings

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from driving import baselines
from driving.car_following import generate
from driving.driving_scores import (
    MOST_ACCELERATION,
    MOST_CURVATURE,
    YAW_SLACK,
    boxes_overlap,
    collisions,
    displacement,
    driving_scores,
    forecast_scores,
    infeasible,
    inside_any,
    off_road,
    ran_red,
)
from driving.scenes import GREEN, RED, STEP_S, Lane, Scene, boxes


@pytest.fixture(scope="module")
def scenes():
    return generate(4, 2)


def scene_of(states, sizes=None, kinds=None, **more):
    """A scene whose history is the first step of `states` [A, T, 5]."""
    states = np.asarray(states, np.float32)
    names = tuple(f"t{k}" for k in range(len(states)))
    sizes = np.full((len(states), 2), (4.0, 2.0), np.float32) if sizes is None else sizes
    return Scene("s", "m", names, kinds or ("vehicle",) * len(names), states, sizes, 0, 1, **more)


def straight(x, y, heading, speed, steps=61):
    time = STEP_S * np.arange(steps)
    vx, vy = speed * np.cos(heading), speed * np.sin(heading)
    return np.column_stack([x + vx * time, y + vy * time, *(np.full(steps, v) for v in (heading, vx, vy))])


# Displacement


def test_displacement_is_the_textbooks():
    rng = np.random.default_rng(0)
    predicted = rng.normal(size=(7, 6, 60, 2)).cumsum(axis=2)
    truth, valid = rng.normal(size=(7, 60, 2)).cumsum(axis=1), rng.random((7, 60)) < 0.8
    valid[3] = False
    valid[4, 29] = False
    for seconds, modes in ((3, 1), (3, 6), (6, 1), (6, 6)):
        steps, got = seconds * 10, displacement(predicted, truth, valid, seconds, modes)
        for n in range(7):
            ades, fdes = [], []
            for k in range(modes):
                errors = [
                    sum((predicted[n, k, t, axis] - truth[n, t, axis]) ** 2 for axis in (0, 1)) ** 0.5
                    for t in range(steps) if valid[n, t]
                ]  # fmt: skip
                ades.append(sum(errors) / len(errors) if errors else np.nan)
                fdes.append(errors[-1] if valid[n, steps - 1] else np.nan)
            miss = np.nan if np.isnan(min(fdes)) else float(min(fdes) > 2)
            np.testing.assert_allclose([got["ade"][n], got["fde"][n], got["miss"][n]], [min(ades), min(fdes), miss])


def test_the_mean_is_over_observed_agents_and_absent_modes_are_not_scored():
    truth = np.zeros((3, 60, 2))
    predicted = np.zeros((3, 1, 60, 2))
    predicted[0] += [3, 4]
    valid = np.ones((3, 60), bool)
    valid[2] = False
    scores = forecast_scores(predicted, truth, valid)
    assert set(scores) == {f"{name}1_{s}s" for name in ("minADE", "minFDE", "miss") for s in (3, 6)}
    assert scores["minADE1_3s"] == 2.5 and scores["miss1_6s"] == 0.5


# Boxes and polygons


def clipped_area(subject, clip):
    """Area of the intersection of two convex polygons (Sutherland & Hodgman 1974)."""
    def cross(a, b):
        return a[0] * b[1] - a[1] * b[0]

    points = list(subject)
    for a, b in zip(clip, np.roll(clip, -1, axis=0), strict=True):
        kept = []
        for p, q in zip(points, points[1:] + points[:1], strict=True):
            sides = cross(b - a, p - a), cross(b - a, q - a)
            if sides[0] >= 0:
                kept.append(p)
            if sides[0] * sides[1] < 0:
                kept.append(p + (q - p) * sides[0] / (sides[0] - sides[1]))
        points = kept
    return abs(sum(cross(p, q) for p, q in zip(points, points[1:] + points[:1], strict=True))) / 2 if points else 0.0


def test_boxes_overlap_where_their_intersection_has_an_area():
    rng = np.random.default_rng(1)
    one, other = (np.column_stack([rng.uniform(-4, 4, (400, 2)), rng.uniform(-4, 4, 400)]) for _ in range(2))
    sizes = [rng.uniform(0.5, 6, (400, 2)) for _ in range(2)]
    areas = [clipped_area(boxes(a, s), boxes(b, t)) for a, s, b, t in zip(one, sizes[0], other, sizes[1], strict=True)]
    overlap = boxes_overlap(one, sizes[0], other, sizes[1])
    assert 100 < overlap.sum() < 300
    np.testing.assert_array_equal(overlap, np.array(areas) > 1e-9)


def test_collisions_are_those_of_all_pairs_in_sight():
    rng = np.random.default_rng(2)
    states = np.concatenate([rng.uniform(-15, 15, (12, 20, 2)), rng.uniform(-3, 3, (12, 20, 1))], axis=-1)
    sizes, valid = rng.uniform(1, 6, (12, 2)), rng.random((12, 20)) < 0.7
    states[~valid] = np.nan
    expected = np.zeros((12, 20), bool)
    for t in range(20):
        for a in range(12):
            for b in range(12):
                if a != b and valid[a, t] and valid[b, t]:
                    area = clipped_area(boxes(states[a, t], sizes[a]), boxes(states[b, t], sizes[b]))
                    expected[a, t] |= area > 1e-9
    assert 20 < expected.sum() < 150
    np.testing.assert_array_equal(collisions(states, sizes, valid), expected)


def test_points_are_inside_a_polygon_as_matplotlib_says():
    rng = np.random.default_rng(3)
    turns = np.arange(10) / 5 * np.pi
    star = np.where(np.arange(10) % 2, 5, 2)[:, None] * np.column_stack([np.cos(turns), np.sin(turns)])
    square = np.array([[3, 3], [8, 3], [8, 8], [3, 8]])
    points = rng.uniform(-9, 9, (3000, 2))
    expected = Outline(star).contains_points(points) | Outline(square).contains_points(points)
    assert 300 < expected.sum() < 1500
    np.testing.assert_array_equal(inside_any(points, [star, square]), expected)
    assert not inside_any(points, []).any()


def test_a_car_is_off_the_road_with_its_first_corner():
    road = np.array([[0, 0], [100, 0], [100, 4], [0, 4]], float)
    states = np.array([[[50, 2.0, 0], [50, 1.1, 0], [50, 0.9, 0], [np.nan] * 3]])
    valid = np.array([[True, True, True, False]])
    assert off_road(states, np.array([[4.0, 2.0]]), valid, [road]).tolist() == [[False, False, True, False]]


# Lights and motion


def lane_to(stop_x, y=0.0, name="1"):
    x = np.linspace(stop_x - 40, stop_x, 9)
    line = np.column_stack([x, np.full(9, y)]).astype(np.float32)
    return Lane(name, line, line + [0, 1.75], line - [0, 1.75])


def test_only_a_front_bumper_that_crosses_a_red_line_in_its_direction_runs_the_light():
    lane = lane_to(20.0)
    cars = {
        "crosses": straight(15, 0, 0, 5), "stops before": straight(5, 0, 0, 2), "has passed": straight(18.5, 0, 0, 5),
        "comes the other way": straight(30, 0, np.pi, 5), "in the next lane": straight(15, 3.5, 0, 5),
    }  # fmt: skip
    states = np.stack(list(cars.values()))
    scene = scene_of(states, lanes=(lane,), lights=np.full((1, 61), RED, np.int8), light_lanes=("1",),
                     light_stops=np.array([[20, 0]], np.float32))  # fmt: skip
    ran = ran_red(states, scene.sizes, scene.valid, scene, scene.lights)
    assert dict(zip(cars, ran.any(axis=1), strict=True)) == {name: name == "crosses" for name in cars}
    step = int(ran[0].argmax())
    assert states[0, step - 1, 0] + 2 <= 20 < states[0, step, 0] + 2
    assert not ran_red(states, scene.sizes, scene.valid, scene, np.full((1, 61), GREEN, np.int8)).any()
    scores = driving_scores(scene, states[:, 1:], scene.valid[:, 1:])
    assert scores["red_light_3s"] == 0.2 and np.isnan(scores["off_road_3s"])


def test_infeasible_motion_is_the_definitions():
    rng = np.random.default_rng(4)
    steps = rng.normal(0, 0.05, (20, 30, 3)) + [0.8, 0, 0]
    heading = np.cumsum(rng.normal(0, 0.03, (20, 30)), axis=1)
    xy = np.cumsum(steps[..., :1] * np.stack([np.cos(heading), np.sin(heading)], axis=-1), axis=1)
    states, valid = np.concatenate([xy, heading[..., None]], axis=-1), rng.random((20, 30)) < 0.95
    expected = np.zeros((20, 30), bool)
    for a in range(20):
        speeds = {}
        for t in range(1, 30):
            if not (valid[a, t] and valid[a, t - 1]):
                continue
            dx, dy = (states[a, t, :2] - states[a, t - 1, :2]) / STEP_S
            turn = (states[a, t, 2] - states[a, t - 1, 2] + np.pi) % (2 * np.pi) - np.pi
            middle = states[a, t - 1, 2] + turn / 2
            speeds[t] = dx * np.cos(middle) + dy * np.sin(middle)
            reach = np.hypot(dx, dy) + MOST_ACCELERATION * STEP_S / 2
            expected[a, t] |= abs(turn) / STEP_S > MOST_CURVATURE * reach + YAW_SLACK
            if t - 1 in speeds:
                expected[a, t] |= abs(speeds[t] - speeds[t - 1]) / STEP_S > MOST_ACCELERATION
    assert 20 < expected.sum() < 500
    np.testing.assert_array_equal(infeasible(states, valid), expected)


@pytest.mark.parametrize("radius, possible", [(4.0, True), (2.0, False)])
def test_a_car_can_drive_on_a_circle_that_is_not_too_tight(radius, possible):
    angle = 6.0 / radius * STEP_S * np.arange(60)
    states = np.column_stack([radius * np.sin(angle), -radius * np.cos(angle), angle])[None]
    assert infeasible(states, np.ones((1, 60), bool)).any() != possible


def test_a_recorded_log_is_free_of_what_is_scored(scenes):
    for scene in scenes:
        states, valid = baselines.rollout("log replay", scene)
        for name, value in driving_scores(scene, states, valid).items():
            assert value == 0 or name.startswith("off_road") and value < 0.2, name  # a bus may cut a corner


def test_scores_of_nobody_are_nan_without_a_warning(scenes):
    scene = scenes[0]
    nothing = {"states": scene.states[:0], "sizes": scene.sizes[:0], "focal": -1}
    nobody = dataclasses.replace(scene, track_ids=(), kinds=(), **nothing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = [driving_scores(nobody, *baselines.rollout(name, nobody)) for name in baselines.NAMES]
    assert all(np.isnan(value) for score in scores for value in score.values())


def test_a_crowd_of_300_is_scored():
    states = np.stack([straight(7.0 * (k % 20), 7.0 * (k // 20), 0.0, 1.0) for k in range(300)])
    scene = scene_of(states)
    for name in baselines.NAMES[:2]:
        scores = driving_scores(scene, *baselines.rollout(name, scene))
        assert scores["collision_6s"] == 0 and scores["infeasible_6s"] == 0


# Baselines


def test_constant_velocity_and_turn_rate_continue_a_line_and_a_circle():
    line = straight(1, 2, 0.3, 8, 110)
    angle = 0.4 * STEP_S * np.arange(110)
    circle = np.column_stack([20 * np.sin(angle), 20 - 20 * np.cos(angle), angle, 8 * np.cos(angle), 8 * np.sin(angle)])
    scene = dataclasses.replace(scene_of(np.stack([line, circle])), observed=50)
    ahead = scene.states[:, 50:, :3].astype(float)
    for name, exact in (("constant velocity", [0]), ("CTRV", [0, 1])):
        states, valid = baselines.rollout(name, scene)
        assert valid.all()
        np.testing.assert_allclose(states[exact, :, :2], ahead[exact, :, :2], atol=2e-3)
        assert (np.abs(states[1, -1, :2] - ahead[1, -1, :2]).max() > 5) == (name != "CTRV")


def test_idm_stops_at_red_and_behind_a_standing_car_and_goes_on_at_green():
    states = np.stack([straight(-15, 0, 0, 8), straight(-30, 10, 0, 8), straight(5, 10, 0, 0)])
    lanes = (lane_to(20.0), lane_to(60.0, 10.0, "2"))
    scene = scene_of(states, lanes=lanes, lights=np.full((1, 61), RED, np.int8), light_lanes=("1",),
                     light_stops=np.array([[20, 0]], np.float32))  # fmt: skip
    driving = np.array([True, True, False])
    moved, valid = baselines.rollout("IDM", scene, who=driving)
    assert 14 < moved[0, -1, 0] <= 18 and -4 < moved[1, -1, 0] <= 1
    scores = driving_scores(scene, moved, valid)
    assert scores["collision_6s"] == scores["red_light_6s"] == scores["infeasible_6s"] == 0
    going, _ = baselines.rollout("IDM", scene, who=driving, lights=np.full((1, 60), GREEN, np.int8))
    assert going[0, -1, 0] > 30


def test_a_forecast_does_not_know_who_comes_later():
    states = np.stack([straight(-15, 0, 0, 8), straight(5, 0, 0, 0)])
    states[1, :10] = np.nan
    scene = scene_of(states, lanes=(lane_to(20.0), lane_to(60.0, 0.0, "2")))
    forecast, valid = baselines.rollout("IDM", scene)
    assert forecast[0, -1, 0] > 20 and not valid[1].any()
    driven, there = baselines.rollout("IDM", scene, who=np.array([True, False]))
    assert driven[0, -1, 0] < 2 and there[1, 10:].all()


def test_only_chosen_agents_leave_the_log(scenes):
    scene = scenes[0]
    who = np.arange(scene.num_agents) == scene.focal
    logged, was_valid = baselines.rollout("log replay", scene)
    for name in baselines.NAMES[:3]:
        states, valid = baselines.rollout(name, scene, who=who)
        np.testing.assert_array_equal(states[~who], logged[~who])
        np.testing.assert_array_equal(valid[~who], was_valid[~who])
        assert np.abs(states[who] - logged[who]).max() > 0.5
