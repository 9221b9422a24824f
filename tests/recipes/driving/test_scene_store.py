"""Scenes on disk are the scenes that were written; as batches they have one shape and say what is absent."""

import dataclasses

import numpy as np
import pytest

from driving.car_following import generate
from driving.generated import generated_scenes
from driving.scene_batches import SceneBatches, as_arrays, cut_lanes
from driving.scene_store import SPLITS, scene_store
from driving.scenes import HISTORY, KINDS, STEPS, Scene


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def scenes():
    return [*generate(0, 2), *generate(2, 1)]


@pytest.fixture(scope="module")
def store(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return scene_store(folder, {"test": 1}, lambda: [("train", scene) for scene in scenes], {"source": "test"}, quiet)


def without_agents(scene: Scene) -> Scene:
    return dataclasses.replace(
        scene, track_ids=(), kinds=(), states=scene.states[:0], sizes=scene.sizes[:0], focal=-1, identifier="empty"
    )


def crowd(scene: Scene, number: int = 300) -> Scene:
    """The scene's first agent, `number` times, each 3 m further to the east."""
    states = np.repeat(scene.states[:1], number, axis=0)
    states[..., 0] += 3 * np.arange(number)[:, None]
    names = tuple(f"c{k}" for k in range(number))
    kinds, sizes = scene.kinds[:1] * number, np.repeat(scene.sizes[:1], number, axis=0)
    return dataclasses.replace(scene, track_ids=names, kinds=kinds, states=states, sizes=sizes, focal=0)


def assert_same(one: Scene, other: Scene):
    for field in dataclasses.fields(Scene):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "lanes":
            a, b = [dataclasses.astuple(lane) for lane in a], [dataclasses.astuple(lane) for lane in b]
        for x, y in zip(flat(a), flat(b), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=field.name)


def flat(value):
    return [leaf for item in value for leaf in flat(item)] if isinstance(value, tuple | list) else [value]


def test_a_scene_is_read_as_it_was_written(scenes, store):
    for number, scene in enumerate(scenes):
        assert_same(scene, store.scene("train", number))
    assert store.manifest["maps"] == 2 and store.count("train") == 3 and store.count("test") == 0
    assert store.scene("train", 0).lanes is store.scene("train", 1).lanes


def test_odd_scenes_are_stored_and_batched_beside_ordinary_ones(scenes, tmp_path):
    truncated = dataclasses.replace(scenes[0], states=scenes[0].states[:, :70], lights=scenes[0].lights[:, :70])
    no_lights = {"lights": None, "light_lanes": (), "light_stops": np.zeros((0, 2), np.float32)}
    no_map = dataclasses.replace(scenes[0], lanes=(), drivable=(), **no_lights)
    odd = [scenes[0], without_agents(scenes[0]), crowd(scenes[0], 1), crowd(scenes[0]), truncated, no_map]
    store = scene_store(tmp_path, {"test": 2}, lambda: [("test", scene) for scene in odd], {"source": "test"}, quiet)
    for number, scene in enumerate(odd):
        assert_same(scene, store.scene("test", number))
    batch = SceneBatches(store, "test", agents=16).take(np.arange(len(odd)))
    assert batch["states"].shape == (6, 16, STEPS, 5) and all(np.isfinite(a).all() for a in batch.values())
    agents = (batch["agents"] >= 0).sum(axis=1)
    assert list(agents[1:4]) == [0, 1, 16] and agents[0] == min(scenes[0].num_agents, 16)
    assert not batch["valid"][1].any() and batch["pieces_valid"][1].any()
    assert batch["valid"][4, :, :70].any() and not batch["valid"][4, :, 70:].any()
    assert not batch["pieces_valid"][5].any() and not batch["lights_valid"][5].any()


def test_a_short_history_ends_where_a_whole_one_does(scenes):
    scene = scenes[0]
    late = dataclasses.replace(scene, states=scene.states[:, 20:], lights=scene.lights[:, 20:], observed=HISTORY - 20)
    pieces = cut_lanes(scene.lanes)
    whole, short = (as_arrays(s, pieces, 12, 64, 8) for s in (scene, late))
    seen = whole["agents"][whole["valid"][:, HISTORY - 1]]
    assert list(short["agents"][: len(seen)]) == list(seen)
    np.testing.assert_array_equal(whole["states"][: len(seen), 20:], short["states"][: len(seen), 20:])
    assert not short["valid"][:, :20].any()


def test_batches_hold_the_focal_agent_first_and_the_nearest_after_it(scenes, store):
    batches = SceneBatches(store, "train", agents=24)
    batch = batches.take(np.array([2, 0]))
    for row, scene in zip((0, 1), (scenes[2], scenes[0]), strict=True):
        order = batch["agents"][row][batch["agents"][row] >= 0]
        assert order[0] == scene.focal
        np.testing.assert_allclose(batch["states"][row, 0, HISTORY - 1, :2], 0, atol=1e-6)
        here = scene.states[order, HISTORY - 1, :2] - scene.states[scene.focal, HISTORY - 1, :2]
        distance = np.linalg.norm(here, axis=1)
        assert np.all(np.diff(distance[np.isfinite(distance)][1:]) >= 0)
        valid = batch["valid"][row, : len(order)]
        np.testing.assert_array_equal(valid, scene.valid[order])
        back = batch["states"][row, : len(order), :, :2] + batch["origin"][row]
        np.testing.assert_allclose(back[valid], scene.states[order, :, :2][valid], atol=1e-4)
        assert [KINDS[k] for k in batch["kinds"][row, : len(order)]] == [scene.kinds[k] for k in order]
    assert batches.take(np.array([0]))["states"].tobytes() == batch["states"][1:].tobytes()


def test_a_light_is_tied_to_the_pieces_that_end_at_its_stop_line(scenes, store):
    batch = SceneBatches(store, "train").take(np.array([0]))
    tied = np.flatnonzero(batch["pieces_light"][0] >= 0)
    assert len(tied) > 0
    for piece in tied:
        light = batch["pieces_light"][0, piece]
        np.testing.assert_allclose(batch["pieces"][0, piece, -1], batch["stops"][0, light, :2], atol=1e-4)


def test_generated_splits_share_no_map_and_are_made_once(tmp_path):
    maps = dict.fromkeys(SPLITS, 1)
    store = generated_scenes(tmp_path, maps, 1, 0, quiet)
    names = {split: {store.scene(split, k).map_id for k in range(store.count(split))} for split in SPLITS}
    assert [len(names[split]) for split in SPLITS] == [1, 1, 1] and len(set.union(*names.values())) == 3
    made = (store.folder / "states-train.bin").stat().st_mtime_ns
    again = generated_scenes(tmp_path, maps, 1, 0, quiet)
    assert again.fingerprint == store.fingerprint and (again.folder / "states-train.bin").stat().st_mtime_ns == made
    assert generated_scenes(tmp_path, maps, 1, 1, quiet).fingerprint != store.fingerprint
