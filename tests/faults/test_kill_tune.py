"""It comes back, tuning too: preparation, steps, saves and scores of a run on conversations are killed with -9."""

from __future__ import annotations

import pytest
from chats import TUNE, write_chats
from killing import assert_kills_change_no_bit
from kit import Aurora, losses

STEPS, SEED = 40, 20261130


@pytest.mark.release
def test_ten_kills_of_a_tuning_change_no_bit(tmp_path):
    config = tmp_path / "tune.yaml"
    config.write_text(TUNE.format(folder=write_chats(tmp_path / "chats")))
    Aurora(tmp_path, tmp_path / "undisturbed").good("train", config, "--run", tmp_path / "run")
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    phases = ["prepare", "prepare", "prepare", "step", "save", "score", "compile", "step", "save", "score"]
    killed = Aurora(tmp_path, tmp_path / "cache")
    assert_kills_change_no_bit(killed, config, STEPS, phases, SEED, tmp_path / "run")
    assert not list((tmp_path / "cache").rglob("*.tmp-*"))
