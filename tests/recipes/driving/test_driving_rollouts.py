"""Scores of rollouts, with predictors whose scores are known: the recording itself, and constant velocity."""

import dataclasses
import io
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from aurora_train.errors import UserError
from driving import baselines
from driving.driving_scores import driving_scores
from driving.generated import generated_scenes
from driving.moves import Moves, blind
from driving.rollouts import OTHERS_REACT, OTHERS_REPLAY, chosen, in_batches, modes_of, scored
from driving.scenes import HISTORY, STEP_S
from driving.settings import LimitsConfig, RolloutConfig

CONFIG = RolloutConfig(scenes=4, samples=6, batch=5)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    maps = {"train": 1, "validation": 1, "test": 1}
    store = generated_scenes(tmp_path_factory.mktemp("scenes"), maps, 2, 0, silent)
    return Moves(store, "test", agents=8, pieces=8, lights=8, piece_m=120.0)


@pytest.fixture(scope="module")
def straight_on(source, tmp_path_factory):
    """(the score of constant velocity, its folder with films, whether each call could see the future)."""
    seen, folder = [], tmp_path_factory.mktemp("films")

    def predict(batch):
        seen.append(bool(batch["valid"][:, :, HISTORY:].any()))
        return straight(batch)

    return score(source, predict, folder, films=2), folder, seen


def silent(*_):
    pass


def score(source, predict, folder, films=0):
    return scored(predict, source, CONFIG, jax.random.key(0), films, folder, silent)


def straight(batch):
    """Constant velocity for those who do not replay."""
    now = batch["states"][:, :, HISTORY - 1 : HISTORY]
    time = STEP_S * np.arange(1, 61)[:, None]
    moved = np.concatenate([now[..., :2] + now[..., 3:] * time, np.repeat(now[..., 2:], 60, axis=2)], -1)
    there = np.repeat(batch["valid"][:, :, HISTORY - 1 : HISTORY], 60, axis=2)
    replayed = batch["replayed"][..., None]
    return {"states": np.where(replayed[..., None], batch["states"][:, :, HISTORY:], moved),
            "present": np.where(replayed, batch["valid"][:, :, HISTORY:], there)}  # fmt: skip


def as_recorded(source):
    """The recording, also for forecasts, which do not see it: scenes are told by where their agents are."""
    truth = source.take(np.arange(len(source)))

    def predict(batch):
        same = (batch["states"][:, None, :, HISTORY - 1] == truth["states"][None, :, :, HISTORY - 1]).all((2, 3))
        assert (same.sum(1) == 1).all()
        rows = same.argmax(1)
        return {"states": truth["states"][rows][:, :, HISTORY:], "present": truth["valid"][rows][:, :, HISTORY:]}

    return predict


def rows_of(result, table):
    return {row[0]: row[1:] for row in result["tables"][table]["rows"]}


@pytest.mark.slow
def test_who_knows_the_recording_has_no_error_and_drives_as_recorded(source, tmp_path):
    result = score(source, as_recorded(source), tmp_path)
    assert next(iter(result)) == "minADE1_3s"
    assert result["minADE1_3s"] == result["minFDE6_6s"] == result["miss1_6s"] == 0
    driven = rows_of(result, 1)
    assert driven[OTHERS_REPLAY] == driven["as recorded"]
    assert result["remarks"] == ["the score rests on 2 scenes: raise rollout.scenes, or hold out more"]


@pytest.mark.slow
def test_who_goes_straight_on_scores_as_constant_velocity_does(straight_on):
    forecasts, driven = rows_of(straight_on[0], 0), rows_of(straight_on[0], 1)
    np.testing.assert_allclose(forecasts["the model"], forecasts["constant velocity"], atol=1e-4)
    assert forecasts["constant velocity"][0] > 0.1
    assert driven[OTHERS_REPLAY] == driven["constant velocity, others replay"] != driven["as recorded"]
    assert OTHERS_REACT in driven


def test_a_forecaster_is_shown_nothing_of_the_future(source, straight_on):
    assert straight_on[2] == [False] * 3 + [True] * 2  # 2 scenes x 6 samples, 5 at once; then two closed loops
    batch = source.take(np.arange(2))
    hidden = blind(batch)
    assert not hidden["states"][:, :, HISTORY:].any() and batch["states"][:, :, HISTORY:].any()
    assert (hidden["lights"][..., HISTORY - 1 :] == batch["lights"][..., HISTORY - 1 : HISTORY]).all()
    np.testing.assert_array_equal(hidden["states"][:, :, :HISTORY], batch["states"][:, :, :HISTORY])


@pytest.mark.slow
def test_a_pedestrian_is_forecast_but_is_no_ego_car(source, straight_on, tmp_path):
    """Recordings have focal agents of all kinds. A car's rates are those of cars."""
    class Walked:
        names = source.names

        def __len__(self):
            return len(source)

        def scene(self, index):
            scene = source.scene(index)
            kinds = ["pedestrian" if k == scene.focal and index == 0 else kind for k, kind in enumerate(scene.kinds)]
            return dataclasses.replace(scene, kinds=tuple(kinds))

        def located(self, indices):
            return source.located(indices)

    result = score(Walked(), straight, tmp_path, films=2)
    assert "in the 1 scenes where" in result["notes"][1] and "in the 2 scenes where" in straight_on[0]["notes"][1]
    assert result["minADE1_3s"] == straight_on[0]["minADE1_3s"] and len(result["plots"]) == 2
    alone = source.scene(1)
    states, valid = baselines.rollout("constant velocity", alone, 60, np.arange(alone.num_agents) == alone.focal)
    expected = driving_scores(alone, states, valid, np.arange(alone.num_agents) == alone.focal)
    columns, rows = result["tables"][1]["columns"][1:], rows_of(result, 1)
    np.testing.assert_equal(dict(zip(columns, rows["constant velocity, others replay"], strict=True)), expected)


def test_films_show_the_recording_and_both_rollouts(straight_on):
    result, folder, _ = straight_on
    assert len(result["plots"]) == 2 and result["plots"][0]["file"] != result["plots"][1]["file"]
    film = Image.open(io.BytesIO((folder / result["plots"][0]["file"]).read_bytes()))
    assert (film.format, film.n_frames, film.size) == ("GIF", 20, (912, 300))
    frames = []
    for number in (0, 19):
        film.seek(number)
        frames.append(np.asarray(film.convert("RGB"), int))
    assert (np.abs(frames[0] - [11, 107, 203]).sum(-1) < 40).sum() > 100, "the ego car is blue"
    assert (frames[0] != frames[1]).any()


def test_modes_are_those_of_every_choice_tried_in_turn():
    paths = np.random.default_rng(0).normal(size=(2, 9, 4, 2)).cumsum(2)
    for one, modes in zip(paths, modes_of(paths, 3), strict=True):
        apart = np.array([[np.linalg.norm(a - b, axis=-1).mean() for b in one] for a in one])
        picks = []
        for _ in range(3):
            costs = [np.min([apart[k] for k in (*picks, i)], axis=0).sum() for i in range(9)]
            picks.append(int(np.argmin(costs)))
        np.testing.assert_allclose(modes, one[picks])


def test_batches_have_one_shape_and_rows_stay_in_order():
    sizes = []

    def predict(batch):
        sizes.append(len(batch["valid"]))
        return {"states": batch["valid"] * 2}

    found = in_batches(predict, {"valid": np.arange(7)}, 3, silent, "")
    assert sizes == [3, 3, 3] and found["states"].tolist() == list(range(0, 14, 2))


def test_scenes_that_cannot_be_scored_are_left_out(source):
    class Cut:
        def __init__(self, without):
            self.without = without

        def __len__(self):
            return len(source)

        def scene(self, index):
            scene = source.scene(index)
            if index in self.without:
                return type(scene)(**{**vars(scene), "states": scene.states[:, :80], "lights": scene.lights[:, :80]})
            return scene

    assert chosen(Cut({0}), 99).tolist() == [1]
    with pytest.raises(UserError) as caught:
        chosen(Cut({0, 1}), 99)
    assert caught.value.where == "data.source"


def test_limits_are_lines_with_key_and_number():
    rates = {f"driven_{name}_6s": value for name, value in (("collision", 0.1), ("off_road", float("nan")))}
    assert LimitsConfig().exceeded(rates) == []
    assert LimitsConfig(collision_max=0.1).exceeded(rates) == []
    lines = LimitsConfig(collision_max=0.05, off_road_max=1, red_light_max=1).exceeded(rates)
    assert len(lines) == 3 and "limits.collision_max is 0.05" in lines[0] and "0.100" in lines[0]
    assert all(itertools.starmap(str.__contains__, zip(lines, ("collision", "off_road", "red_light"), strict=True)))
