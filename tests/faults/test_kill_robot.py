"""It comes back, robots too: recording, decoding of videos, steps, saves, simulation and score are killed with -9."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from killing import assert_kills_change_no_bit
from kit import Aurora, losses

STEPS, SEED = 24, 20261130
CONFIG = """recipe: robot/policy
model: {{kind: flow, width: 16, heads: 2, layers: 1, decoder_layers: 1, dropout: 0.1, noising: {{steps: 2}}, {vision}}}
data: {{source: "{source}", chunk: 8, validation: 0.2, {data}}}
train: {{steps: 24, batch: 16}}
optimizer: {{lr: 1e-2, ema: 0.9, schedule: {{warmup: 4}}}}
memory: {{accumulation: 2}}
checkpoint: {{every: 6, keep: 5}}
evaluate: {{every: 8, score_every: 8, examples: 16, baselines: false}}
score: {{world: two_modes, episodes: 40, gifs: 1}}
"""


def score_of(run: Path) -> dict:
    """The numbers of a run's score that the clock does not decide."""
    score = json.loads((run / "scores.json").read_text())["score"]
    return {name: value for name, value in score.items() if not name.startswith("latency")}


def check(tmp_path: Path, config: Path, phases: list[str]) -> None:
    Aurora(tmp_path, tmp_path / "undisturbed").good("train", config, "--run", tmp_path / "run")
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    killed = Aurora(tmp_path, tmp_path / "cache")
    assert_kills_change_no_bit(killed, config, STEPS, phases, SEED, tmp_path / "run")
    assert all(score_of(run) == score_of(tmp_path / "run") for run in tmp_path.glob("killed-*"))


@pytest.mark.release  # 85 s
def test_kills_while_recording_training_and_acting_change_no_bit(tmp_path):
    config = tmp_path / "two_modes.yaml"
    config.write_text(CONFIG.format(source="world:two_modes", data="episodes: 120", vision=""))
    check(tmp_path, config, ["recording", "step", "simulation", "save"])


@pytest.mark.release
def test_kills_while_videos_are_decoded_change_no_bit(tmp_path):
    pytest.importorskip("av")
    from robot.demonstrations import record
    from robot.lerobot_write import write

    made = record("two_modes", 30, 0, lambda *_: None, cache=tmp_path / "made", cameras=["above"], size=32)
    write(made, tmp_path / "dataset")
    config = tmp_path / "dataset.yaml"
    vision = "vision: {channels: 8}"
    config.write_text(CONFIG.format(source=tmp_path / "dataset", data="cameras: [above]", vision=vision))
    check(tmp_path, config, ["decoding", "simulation"])
