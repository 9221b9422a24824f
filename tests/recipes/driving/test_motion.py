"""The recipe `driving/motion`: from a folder of Argoverse 2 scenarios to a scored run, and on another folder."""

import json

import numpy as np
import pytest
from kit import Aurora, in_process

from aurora_train.config import load
from aurora_train.errors import UserError
from driving.argoverse_writing import write_scene
from driving.car_following import generate

SMALL = ["model.width=8", "model.layers=1", "model.heads=2", "model.relation=4", "model.tokens=24", "data.agents=4",
         "data.pieces=8", "rollout.samples=6", "rollout.batch=6", "rollout.films=1", "train.steps=2", "train.batch=2",
         "memory.accumulation=1", "memory.unroll=false", "evaluate.every=null"]  # fmt: skip


@pytest.mark.parametrize(("override", "key", "hint"), [
    ("model.heads=3", "model.heads", "1, 2, 4"),
    ("model.tokens=4", "model.tokens", "16"),
    ("data.held_out=0.7", "data.held_out", "0.6"),
    ("rollout.samples=5", "rollout.samples", "6"),
    ("limits.collision_max=2", "limits.collision_max", "1"),
    ("limits.collisions=0.1", "limits.collisions", "collision_max"),
    ("data.agent=3", "data.agent", "`agents`"),
])  # fmt: skip
def test_a_wrong_setting_is_one_message_with_its_key(override, key, hint, capsys):
    assert in_process("check", "driving/motion", override) == 2
    error = capsys.readouterr().err
    assert key in error and hint in error and "Traceback" not in error


def test_templates_of_another_number_are_not_gone_on_with(tmp_path):
    config = load("driving/motion", ["model.tokens=24"])
    recipe = config.recipe_class(config, tmp_path)
    recipe.inherited = {"templates": np.zeros((24, 5, 3)).tolist()}
    assert len(recipe.facts()["templates"]) == 24
    recipe.inherited = {"templates": np.zeros((16, 5, 3)).tolist()}
    with pytest.raises(UserError, match="16 templates") as caught:
        recipe.facts()
    assert caught.value.where == "model.tokens" and caught.value.hint == "model.tokens=16"


@pytest.mark.parametrize("made", ["missing", "empty", "one map"])
def test_a_folder_that_cannot_be_learned_from_is_one_message(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "scenarios"
    if made != "missing":
        folder.mkdir()
    if made == "one map":
        write_scene(generate(5, 1)[0], folder)
    assert in_process("train", "driving/motion", f"data.source={folder}", *SMALL, "--run", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert str(folder) in error and "Traceback" not in error and len(error.splitlines()) < 8


@pytest.mark.slow
def test_scenarios_of_argoverse_are_learned_from_scored_and_limited(tmp_path):
    """The run folder alone is enough to score it on other scenarios, on a machine without its own."""
    for part, maps in (("train", range(4)), ("val", (7,)), ("other", (8,))):
        (tmp_path / "av2" / part).mkdir(parents=True)
        for seed in maps:
            for scene in generate(seed, 2):
                write_scene(scene, tmp_path / "av2" / part)
    (tmp_path / "av2" / "other").rename(tmp_path / "other")
    aurora = Aurora(tmp_path, tmp_path / "cache")
    limits = "limits.infeasible_max=1", "limits.off_road_max=0"
    done = aurora("train", "driving/motion", f"data.source={tmp_path / 'av2'}", *SMALL, *limits, "--run", "run")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    off = scores["score"]["driven_off_road_6s"]
    assert done.returncode == (4 if off > 0 else 0), done.stderr[-3000:]
    assert len(scores["exceeded"]) == (off > 0)
    assert {"constant_velocity", "CTRV", "IDM"} <= set(scores["baselines"])
    assert scores["notes"][0].startswith("2 scenes of 1 maps")
    assert b"data:image/gif" in (tmp_path / "run" / "report.html").read_bytes()
    (tmp_path / "av2").rename(tmp_path / "gone")
    elsewhere = Aurora(tmp_path, tmp_path / "empty cache")
    assert elsewhere("evaluate", "run", "--on", tmp_path / "other", "--no-baselines").returncode in (0, 4)
    on_other = json.loads(next((tmp_path / "run" / "scores-on").glob("*.json")).read_text())
    assert on_other["score"]["minADE1_3s"] != scores["score"]["minADE1_3s"]
