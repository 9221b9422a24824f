"""A car that a policy drives among SUMO's goes where it was sent, and the others react. Needs the extra `driving`."""

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from test_scene_store import quiet

from aurora_train.errors import UserError
from driving import baselines, sumo_process
from driving.agents import Driver
from driving.batches import rolled_out
from driving.generated import generated_scenes
from driving.moves import Moves
from driving.scene_store import SPLITS
from driving.scenes import HISTORY, STEP_S, STEPS
from driving.sumo_driving import PLANNED, SumoWorld, drive, reactive_scores
from driving.sumo_scores import reactive
from driving.tokens import learn, motions_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("libsumo") is None, reason="needs the extra `driving`"),
]
MAPS = [1, 3]  # on the second, another car follows the ego


def idm(scenes):
    return np.stack([baselines.rollout("IDM", scene, PLANNED)[0][scene.focal] for scene in scenes])


def brake(scenes):
    """Straight on, 3 m/s2 slower each second."""
    plans = []
    for scene in scenes:
        x, y, heading, vx, vy = scene.states[scene.focal, -1].astype(float)
        speed = np.maximum(np.hypot(vx, vy) - 3 * STEP_S * np.arange(1, PLANNED + 1), 0)
        way = np.cumsum(speed * STEP_S)
        plans.append(np.column_stack([x + way * np.cos(heading), y + way * np.sin(heading), np.full(PLANNED, heading)]))
    return np.stack(plans)


@pytest.fixture(scope="module")
def own():
    return drive(None, MAPS, 0, quiet)


def test_the_ego_is_the_same_car_and_its_history_the_same_whoever_drives(own):
    seen = []
    driven = drive(lambda scenes: seen.append(scenes) or idm(scenes), MAPS, 0, quiet)
    for one, other in zip(own, driven, strict=True):
        assert one.steps == other.steps == STEPS and one.track_ids[one.focal] == other.track_ids[other.focal]
        known = [scene.states[scene.focal, :HISTORY] for scene in (one, other)]
        assert known[0].tobytes() == known[1].tobytes()
    assert len(seen) == (STEPS - HISTORY) // PLANNED
    assert all(scene.steps == scene.observed == HISTORY and scene.valid.any(axis=1).all() for scene in seen[-1])
    scores = reactive_scores(driven)
    assert scores["collision_6s"] == scores["red_light_6s"] == scores["infeasible_6s"] == 0 and scores["metres_6s"] > 1


def test_the_others_brake_for_a_car_that_brakes_where_it_would_not_have(own):
    driven = drive(brake, MAPS, 0, quiet)
    assert reactive_scores(driven)["collision_6s"] == 0
    apart = []
    for one, other in zip(own, driven, strict=True):
        assert other.valid[other.focal].all()
        np.testing.assert_allclose(np.hypot(*other.states[other.focal, -1, 3:]), 0, atol=1e-3)
        places = {name: k for k, name in enumerate(other.track_ids)}
        both = [(k, places[name]) for k, name in enumerate(one.track_ids) if name in places and k != one.focal]
        apart.extend(np.abs(one.states[a, HISTORY:, :2] - other.states[b, HISTORY:, :2]) for a, b in both)
    assert np.nanmax(np.concatenate(apart)) > 2  # metres; nothing but the ego differs between the two


def test_sumo_has_the_ego_where_the_policy_put_it():
    with SumoWorld(1, 0) as world:
        scene = world.observe()
        x, y, heading = scene.states[scene.focal, -1, :3].astype(float)
        poses = np.array([[x + 0.4 * k * np.cos(heading), y + 0.4 * k * np.sin(heading), heading] for k in range(1, 6)])
        world.advance(poses)
        world.advance(None)  # from here SUMO drives on
        states = world.recorded().states[world.recorded().focal]
        np.testing.assert_allclose(states[HISTORY : HISTORY + 5, :3], poses, atol=1e-4)
        assert np.linalg.norm(states[HISTORY + 5, :2] - states[HISTORY + 4, :2]) < 1.0


def test_a_road_without_cars_is_one_message_and_leaves_no_process(monkeypatch):
    """With a demand that has ended before it begins. The roads stay empty, however long one waits."""
    quiet_roads = "from driving import sumo_process as here; here.STEPS = -250; here.serve()"
    monkeypatch.setattr(sumo_process, "SERVE", quiet_roads)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    with pytest.raises(UserError, match="no car of SUMO's stays for 5 s") as caught:
        SumoWorld(1, 0)
    assert "rollout.sumo_maps" in caught.value.hint and children.read_text() == before


def test_a_model_drives_beside_the_baselines_in_the_same_situations(tmp_path):
    """A random network: it does not drive well, but as a car, and from where SUMO's car was."""
    store = generated_scenes(tmp_path, dict.fromkeys(SPLITS, 1), 1, 0, quiet)
    source = Moves(store, "train", 6, 20, 8, 120.0)
    batch = source.take(np.array([0]))
    templates = learn(motions_of(batch["states"], batch["valid"], HISTORY - 1), 32)
    graph, state = nnx.split(Driver(width=8, layers=1, heads=2, relation=4, tokens=32, dtype="float32",
                                    rngs=nnx.Rngs(params=0)))  # fmt: skip
    run = jax.jit(lambda batch: rolled_out(nnx.merge(graph, state), templates, batch, 1.0, 0.9))
    config = SimpleNamespace(sumo_maps=1, batch=1)
    rates = reactive(lambda batch: jax.device_get(run(batch)), source, config, jax.random.key(0), quiet)
    assert list(rates) == ["SUMO", "constant velocity", "IDM", "the model"]
    assert rates["SUMO"]["collision_6s"] == 0 and rates["the model"]["infeasible_6s"] == 0
    assert len({round(scores["metres_6s"], 3) for scores in rates.values()}) > 2
