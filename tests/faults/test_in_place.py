"""A run whose saves are made in place, killed with -9 while it writes them: it comes back to the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time

import pytest
import toy
from killing import assert_whole
from kit import Aurora, events, final_hash, losses

KILLS = 2
ON = "train.stop_after_minutes=null"


def save_in_place(run) -> None:
    """Change the plan to which a run is pinned: on a machine with less memory it would have been made so."""
    pinned = json.loads((run / "plan.json").read_text())
    assert pinned["plan"]["saves_in_place"] is False, "the toy fits several times"
    pinned["plan"]["saves_in_place"] = True
    (run / "plan.json").write_text(json.dumps(pinned))


def unfinished(run) -> set[str]:
    """Checkpoints that are being written."""
    return {name for name in os.listdir(run / "checkpoints") if not name.isdigit() and name[0].isdigit()}


def killed_in_a_save(lab: Aurora, run, wait_s: float) -> bool:
    """Resume, and kill while a checkpoint is being written. False if the run ended before."""
    left = unfinished(run)
    process = lab.forked("resume", run, ON, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not unfinished(run) - left:
        time.sleep(0.001)
    time.sleep(wait_s)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_while_it_saves_in_place_is_the_run_that_copied_and_was_never_killed(tmp_path):
    settings = ("model.width=256", "train.steps=60", "checkpoint.every=5", "checkpoint.keep=2")
    toy.write(tmp_path)
    lab, run = Aurora(tmp_path, tmp_path / "cache"), tmp_path / "run"
    lab.good("train", "toy.yaml", *settings, "--run", tmp_path / "undisturbed")
    assert lab("train", "toy.yaml", *settings, "train.stop_after_minutes=0.0001", "--run", run).returncode == 75
    save_in_place(run)
    draw = random.Random(20261130)
    killed = [killed_in_a_save(lab, run, draw.uniform(0, 0.05)) for _ in range(KILLS)]
    assert all(killed), "a life ended before it was killed: the run is too short"
    said = lab.good("resume", run, ON).stderr
    assert "saves in place" in said and "in place: training waited" in said
    assert_whole(run, tmp_path / "undisturbed")
    assert final_hash(run) == final_hash(tmp_path / "undisturbed") and losses(run)[-1][0] == 60
    assert all("in_place_seconds" in event for event in events(run, "save")[1:])
