"""It comes back, preferences too: preparation, the reference's pass, steps, saves and scores are killed with -9."""

from __future__ import annotations

import pytest
from killing import assert_kills_change_no_bit
from kit import Aurora, losses
from preferring import pairs, write_config, write_start

STEPS, SEED = 24, 20261130


@pytest.mark.release
def test_ten_kills_of_a_run_on_preferences_change_no_bit(tmp_path):
    config = write_config(tmp_path, write_start(tmp_path), pairs(600), STEPS)
    text = config.read_text().replace(", schedule", ", ema: 0.9, schedule").replace(".gguf}", ".gguf, dropout: 0.1}")
    config.write_text(text + "memory: {accumulation: 2}\n")  # and dropout and a moving average: what a resume needs
    Aurora(tmp_path, tmp_path / "undisturbed").good("train", config, "--run", tmp_path / "run")
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    phases = ["prepare", "reference", "reference", "step", "save", "score", "compile", "step", "save", "last step"]
    killed = Aurora(tmp_path, tmp_path / "cache")
    assert_kills_change_no_bit(killed, config, STEPS, phases, SEED, tmp_path / "run")
    (kept,), (wanted,) = ((tmp_path / name / "data").glob("reference-*.f32") for name in ("cache", "undisturbed"))
    assert kept.read_bytes() == wanted.read_bytes()
