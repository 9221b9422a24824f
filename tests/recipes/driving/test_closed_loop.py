"""The world to reset and step, the car as a bicycle, and rollouts of all agents in one program."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import traffic_batches
from flax import nnx

from driving import baselines, closed_loop
from driving.agents import Driver
from driving.batches import log_of, rolled_out
from driving.closed_loop import Action, Log, bicycle, drive, follow, reset, step, straight_on, touching
from driving.driving_scores import boxes_overlap, collisions, driving_scores, infeasible
from driving.moves import blind
from driving.scenes import HISTORY, STEP_S, STEPS
from driving.tokens import learn, motions_of, relative

FUTURE, TOKENS = STEPS - HISTORY, 32


@pytest.fixture(scope="module")
def batch():
    return traffic_batches.batch()


@pytest.fixture(scope="module")
def templates(batch):
    return learn(motions_of(batch["states"], batch["valid"], HISTORY - 1), TOKENS)


@pytest.fixture(scope="module")
def roll(templates):
    """A random network's rollouts of whole batches."""
    graph, state = nnx.split(Driver(width=8, layers=1, heads=2, relation=4, tokens=TOKENS, dtype="float32",
                                    rngs=nnx.Rngs(params=0)))  # fmt: skip
    run = jax.jit(lambda batch: rolled_out(nnx.merge(graph, state), templates, batch, 1.0, 0.9))
    return lambda batch: jax.device_get(run(batch))


def scene(log: Log, index: int) -> Log:
    return Log(*(array[index] for array in log))


def cast(batch, replayed, steered, seed=0):
    count, agents = batch["valid"].shape[:2]
    return batch | {"replayed": np.broadcast_to(replayed, (count, agents)), "steered": np.full(count, steered),
                    "key": jax.random.split(jax.random.key(seed), count)}  # fmt: skip


def test_a_car_that_is_left_alone_goes_straight_on_and_one_that_brakes_stands():
    car = jnp.array([1.0, 2.0, 0.3, 8 * np.cos(0.3), 8 * np.sin(0.3)])
    after = bicycle(car, Action(0.0, 0.0), 4.6)
    np.testing.assert_allclose(after, [1 + 0.8 * np.cos(0.3), 2 + 0.8 * np.sin(0.3), 0.3, *car[3:]], rtol=1e-6)
    for _ in range(40):
        after = bicycle(after, Action(-3.0, 0.0), 4.6)
    assert np.hypot(after[3], after[4]) == 0
    # From 8 m/s at 3 m/s2: 10.67 m; a step of 0.1 s ends the last of them early.
    assert float(jnp.hypot(*(after[:2] - car[:2]))) == pytest.approx(0.8 + 8**2 / 6, abs=0.05)


def test_a_steered_car_drives_on_the_circle_of_its_steering():
    length, steering = 4.6, 0.4
    radius, car = closed_loop.WHEELBASE * length / np.tan(steering), jnp.array([0.0, 0.0, 0.0, 4.0, 0.0])
    for number in range(1, 61):
        car = bicycle(car, Action(0.0, steering), length)
        assert np.linalg.norm(np.asarray(car[:2]) - [0, radius]) == pytest.approx(radius, rel=0.01)
        assert float(car[2]) == pytest.approx(number * 0.4 / radius, rel=1e-4)


def test_more_than_a_car_can_do_is_not_done():
    car = jnp.array([0.0, 0.0, 0.0, 10.0, 0.0])
    slid = bicycle(car, Action(99.0, 9.0), 4.6)
    assert slid[3] ** 2 + slid[4] ** 2 == pytest.approx(10.4**2, rel=1e-5)
    assert 10.2 * float(slid[2]) / STEP_S == pytest.approx(6.0 * 1.02**2, rel=0.01), "m/s2 across"
    slow = jnp.array([0.0, 0.0, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(bicycle(slow, Action(0.0, 9.0), 4.6), bicycle(slow, Action(0.0, 0.6), 4.6))
    assert bicycle(car, Action(-99.0, 0.0), 4.6)[3] == pytest.approx(10 - 0.8)


def test_a_car_follows_a_path_that_it_can_drive():
    """A bend of 20 m at 7 m/s, half a second at a time."""
    pace, radius, car = 7.0, 20.0, jnp.array([0.0, 0.0, 0.0, 7.0, 0.0])
    for token in range(6):
        angle = (5 * token + np.arange(1, 6)) * pace * STEP_S / radius
        path = np.stack([radius * np.sin(angle), radius * (1 - np.cos(angle)), angle], 1).astype(np.float32)
        for k in range(5):
            car = bicycle(car, follow(car, jnp.asarray(path), 5 - k, 4.6), 4.6)
        assert np.linalg.norm(np.asarray(car[:2]) - path[-1, :2]) < 0.1
        assert abs(float(car[2]) - path[-1, 2]) < 0.05


def test_boxes_touch_where_an_independent_test_says_so():
    rng = np.random.default_rng(0)
    one, other = (np.column_stack([rng.uniform(-4, 4, (400, 2)), rng.uniform(-4, 4, 400)]) for _ in range(2))
    sizes = rng.uniform(0.5, 5, (2, 400, 2))
    expected = boxes_overlap(one, sizes[0], other, sizes[1])
    found = jax.vmap(lambda a, s, b, t: touching(a, s, b[None], t[None])[0])(one, sizes[0], other, sizes[1])
    assert 50 < expected.sum() < 350
    np.testing.assert_array_equal(found, expected)


def test_the_world_replays_the_log_around_an_ego_that_acts(batch):
    log = scene(log_of(jax.tree.map(jnp.asarray, batch)), 0)
    state, move = reset(log, HISTORY - 1), jax.jit(step)
    for now in range(HISTORY, HISTORY + 4):
        before = state.agents[0]
        state = move(log, state, Action(jnp.float32(1.0), jnp.float32(0.1)))
        assert int(state.step) == now
        np.testing.assert_array_equal(state.agents[1:], log.states[1:, now])
        np.testing.assert_array_equal(state.present[1:], log.valid[1:, now])
        np.testing.assert_allclose(state.agents[0], bicycle(before, Action(1.0, 0.1), log.sizes[0, 0]), rtol=1e-5)


def test_an_ego_that_drives_into_a_parked_car_has_collided():
    states, valid = np.zeros((2, 12, 5), np.float32), np.ones((2, 12), bool)
    states[0, :, 3], states[1, :, 0] = 10.0, 9.0
    log = Log(*(jnp.asarray(a)[None] for a in (states, valid, np.full((2, 2), 2.0, np.float32))))
    path, collided = drive(straight_on, log, 0, 5)
    assert not collided[0] and path[0, -1, 0] == pytest.approx(5.0)
    assert drive(straight_on, log, 0, 11)[1][0]
    absent = log._replace(valid=log.valid.at[:, 1].set(False))
    assert not drive(straight_on, absent, 0, 11)[1][0]


def test_constant_velocity_in_closed_loop_is_that_of_the_baselines():
    most = max(scene.num_agents for scene in traffic_batches.scenes())
    everybody = jax.tree.map(jnp.asarray, traffic_batches.batch(agents=most))
    path, collided = drive(straight_on, log_of(everybody), HISTORY - 1, FUTURE)
    for row, scene in enumerate(traffic_batches.scenes()):
        ego = np.arange(scene.num_agents) == scene.focal
        states, valid = baselines.rollout("constant velocity", scene, FUTURE, ego)
        origin = scene.states[scene.focal, HISTORY - 1, :2]
        np.testing.assert_allclose(np.asarray(path)[row, :, :2] + origin, states[scene.focal, :, :2], atol=0.02)
        scores = driving_scores(scene, states, valid, ego, (6,))
        assert bool(collided[row]) == bool(scores["collision_6s"])


@pytest.mark.slow
def test_in_a_rollout_some_replay_and_the_others_follow_templates(batch, templates, roll):
    replayed = np.arange(batch["valid"].shape[1]) >= 3
    out = roll(cast(batch, replayed, False))
    truth, there = batch["states"][:, 3:, HISTORY:], batch["valid"][:, 3:, HISTORY:]
    np.testing.assert_array_equal(out["present"][:, 3:], there)
    np.testing.assert_array_equal(out["states"][:, 3:][there], truth[there])
    path = np.concatenate([batch["states"][:, :3, HISTORY - 1 : HISTORY, :3], out["states"][:, :3, :, :3]], 2)
    moved = relative(np, path[:, :, 0:-1:5], path[:, :, 5::5])[batch["valid"][:, :3, HISTORY - 1]]
    off = np.abs(moved[:, :, None] - templates[:, -1]).max(-1).min(-1)
    # The first token begins where the templates have led so far, which is not quite the recorded pose.
    assert off[:, 1:].max() < 1e-3


@pytest.mark.parametrize("steered", [False, True])
def test_who_has_collided_is_who_touches_another_in_the_rollout(batch, roll, steered):
    """Of large boxes, so that some do, whether the ego is a car or follows its templates."""
    sizes = batch["sizes"] * np.float32(1.6)
    out = roll(cast(batch | {"sizes": sizes}, np.arange(batch["valid"].shape[1]) > 0, steered))
    rows = zip(out["states"], sizes, out["present"], strict=True)
    expected = [collisions(*row)[0].any() for row in rows]
    assert out["collided"].tolist() == expected
    assert any(expected) and not all(expected)


def test_a_steered_ego_moves_as_a_car_can(batch, roll):
    out = roll(cast(batch, np.arange(batch["valid"].shape[1]) > 0, True))
    states = np.concatenate([batch["states"][:, :1, HISTORY - 1 : HISTORY], out["states"][:, :1]], 2)
    assert not any(infeasible(one, np.ones(one.shape[:2], bool)).any() for one in states)
    assert np.abs(np.diff(states[:, 0, :, 3:], axis=1)).max() < 2.0


def test_a_forecast_does_not_know_the_future(batch, roll):
    everybody = cast(batch, False, False)
    hidden = cast(blind({name: batch[name] for name in batch}), False, False)
    held = everybody | {"lights": hidden["lights"]}
    np.testing.assert_array_equal(roll(held)["states"], roll(hidden)["states"])


def test_a_rollout_depends_on_its_own_scene_and_key_alone(batch, roll):
    first = roll(cast(batch, False, False))
    np.testing.assert_array_equal(roll(cast(batch, False, False))["states"], first["states"])
    assert (roll(cast(batch, False, False, seed=1))["states"] != first["states"]).any()
    order = np.array([2, 0, 3, 1])
    mixed = roll({name: array[order] for name, array in cast(batch, False, False).items()})
    np.testing.assert_allclose(mixed["states"], first["states"][order], atol=1e-3)
    np.testing.assert_array_equal(mixed["collided"], first["collided"][order])


def with_agents(scene, count: int):
    """The scene with so many agents, copies beside each other if it has fewer."""
    which = np.arange(count) % max(scene.num_agents, 1)
    states = scene.states[which] + np.float32([0.1, 0, 0, 0, 0]) * np.arange(count)[:, None, None]
    return replace(scene, states=states.astype(np.float32), sizes=scene.sizes[which], focal=0 if count else -1,
                   track_ids=tuple(map(str, range(count))), kinds=tuple(scene.kinds[k] for k in which))  # fmt: skip


def test_odd_scenes_roll_out_too(roll):
    """Without agents, with one, with three hundred; and without a map, with a track that ends in the history."""
    scene = traffic_batches.scenes()[0]
    *odd, unmapped = (with_agents(scene, count) for count in (0, 1, 300, 3))
    unmapped.states[0], unmapped.states[1, HISTORY - 20 :] = scene.states[scene.focal], np.nan
    no_lights = {"lights": None, "light_lanes": (), "light_stops": unmapped.light_stops[:0]}
    odd.append(replace(unmapped, lanes=(), drivable=(), **no_lights))
    batch = traffic_batches.batch(odd)
    out = roll(cast(batch, False, False))
    assert np.isfinite(out["states"]).all()
    assert out["present"].any((1, 2)).tolist() == [False, True, True, True]
    assert out["present"][1].any(1).sum() == 1
    assert batch["valid"][3, 2, HISTORY - 21] and not batch["valid"][3, 2, HISTORY - 1]
    assert not out["present"][3, 2].any()
