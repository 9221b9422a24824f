"""It comes back: a run killed with -9 at any moment is, when it has finished, the run that was never killed."""

from __future__ import annotations

import subprocess

import pytest
from killing import PHASES, assert_kills_change_no_bit, schedule
from kit import TINY, Aurora, losses

STEPS = 40  # of the tiny config: accumulation 2, dropout, BPE, packing, EMA and Muon are on
SEED = 20261122


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus):
    """The run nobody kills, with a cache and, as a process started anew, a hash seed of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = folder / "tiny.yaml"
    config.write_text(TINY.format(corpus=corpus))
    aurora = Aurora(folder, folder / "cache")
    command = aurora.command("train", config, "--run", folder / "run")
    subprocess.run(command, cwd=folder, env=aurora.environment(), capture_output=True, check=True)
    assert [step for step, _ in losses(folder / "run")] == list(range(1, STEPS + 1))
    return folder / "run"


def kill(phases, seed, undisturbed, tiny, tmp_path):
    assert_kills_change_no_bit(Aurora(tmp_path, tmp_path / "cache"), tiny, STEPS, phases, seed, undisturbed)


def test_a_run_killed_while_it_saves_and_steps_is_the_run_that_was_never_killed(undisturbed, tiny, tmp_path):
    kill(["save", "step"], SEED, undisturbed, tiny, tmp_path)


@pytest.mark.slow
def test_a_kill_in_every_phase_changes_no_bit(undisturbed, tiny, tmp_path):
    kill(schedule(len(PHASES), SEED + 1), SEED + 1, undisturbed, tiny, tmp_path)


@pytest.mark.release
def test_kills_during_preparation_and_again_right_after_each_resume_change_no_bit(
    undisturbed, tiny, tmp_path
):
    phases = ["prepare", "prepare", "compile", "resumed", "step", "resumed", "save", "resumed", "resumed", "step"]
    kill(phases, SEED + 2, undisturbed, tiny, tmp_path)


@pytest.mark.release
def test_a_hundred_kills_over_all_phases_change_no_bit(undisturbed, tiny, tmp_path):
    kill(schedule(100, SEED + 3), SEED + 3, undisturbed, tiny, tmp_path)
