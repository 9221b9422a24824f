"""A run moves between numbers of devices: the same batches, the same losses to the order of floating-point sums."""

from __future__ import annotations

import pytest
import toy
from kit import Aurora, events, losses

LEGS = ((8, 13), (4, 26), (1, 39), (2, 50))  # devices, and the step that they take it to
PLAIN = {"schedule: {warmup: 3}": "schedule: {name: constant}", "{accumulation: 2}": "{accumulation: 1}"}


@pytest.mark.parametrize(
    "axis", [pytest.param("data", marks=pytest.mark.release), pytest.param("fsdp", marks=pytest.mark.slow)]
)
def test_a_run_goes_from_eight_devices_to_four_to_one_to_two(axis, tmp_path, shared_cache):
    aurora, config = Aurora(tmp_path, shared_cache), toy.write(tmp_path, **PLAIN)
    aurora.good("train", config, "train.steps=50", "--run", "still", "--quiet")
    said = ""
    for devices, steps in LEGS:
        mesh = {"data": 1, "fsdp": 1} | {axis: devices}
        settings = [f"train.steps={steps}", *(f"mesh.{name}={size}" for name, size in mesh.items())]
        first = devices == LEGS[0][0]
        verb = ("train", config, "--run", "moved") if first else ("resume", "moved")
        said += aurora.good(*verb, *settings, devices=devices).stderr
    still, moved = losses(tmp_path / "still"), losses(tmp_path / "moved")
    assert [step for step, _ in moved] == [step for step, _ in still] == list(range(1, 51))
    assert [loss for _, loss in moved] == pytest.approx([loss for _, loss in still], rel=1e-5)
    meshes = [event["after"][axis] for event in events(tmp_path / "moved", "replan") if event["what"] == "mesh"]
    assert meshes == [4, 1, 2]
    assert "mesh is not what this run had before: equal to tolerance" in said
