"""What the configs for Meta-World claim, before a release: minutes of training and 50 episodes each."""

import json

import pytest
from kit import in_process


@pytest.mark.release
@pytest.mark.optimized
@pytest.mark.parametrize(("name", "least"), [
    ("robot/pick_place_act", 48), ("robot/push_flow", 48), ("robot/push_pixels", 40),
])  # fmt: skip
def test_a_policy_of_100_demonstrations_succeeds_in_most_episodes(name, least, tmp_path, monkeypatch, capsys):
    pytest.importorskip("metaworld")
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    assert in_process("train", name, "--run", tmp_path / "run", "--quiet") == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["score"]["episodes"] == 50 and scores["score"]["success"] >= least / 50
    assert scores["score"]["success"] > scores["baselines"]["random"]["success"] + 0.5
