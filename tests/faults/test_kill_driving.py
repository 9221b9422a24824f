"""It comes back, driving too: preparation of scenes, steps, saves and rollouts are killed with -9."""

from __future__ import annotations

import pytest
from killing import assert_kills_change_no_bit
from kit import Aurora, losses

STEPS, SEED = 24, 20261201
DRIVING = """
recipe: driving/motion
model: {width: 8, layers: 1, heads: 2, relation: 4, tokens: 24}
data: {agents: 4, pieces: 8, noise: 0.2, simulated_maps: 3, simulated_held_out: 1, simulated_scenes: 2}
rollout: {scenes: 2, samples: 6, batch: 6}
train: {steps: 24, batch: 2}
optimizer: {lr: 1e-2, ema: 0.9, schedule: {warmup: 5}}
memory: {accumulation: 1, unroll: false}
checkpoint: {every: 8}
evaluate: {every: 12, examples: 2, baselines: false}
log: {every: 1}
"""


@pytest.mark.release
def test_kills_while_a_model_learns_to_drive_change_no_bit(tmp_path):
    config = tmp_path / "driving.yaml"
    config.write_text(DRIVING)
    Aurora(tmp_path, tmp_path / "undisturbed").good("train", config, "--run", tmp_path / "run")
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    phases = ["prepare", "step", "save", "forecasting"]
    killed = Aurora(tmp_path, tmp_path / "cache")
    assert_kills_change_no_bit(killed, config, STEPS, phases, SEED, tmp_path / "run")
    assert not list((tmp_path / "cache").rglob("*.tmp-*"))
