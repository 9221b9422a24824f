"""A trainer that hangs ends by itself, with its stacks on disk and nobody left behind, and the next one goes on."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
import toy
from kit import Aurora, events, final_hash, losses

from aurora_train.always_on.watchdog import EXIT_HUNG

BUDGET_S = 15.0  # longer than compiling and saving take on two busy cores


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shared_cache):
    folder = tmp_path_factory.mktemp("undisturbed")
    config = toy.write(folder)
    Aurora(folder, shared_cache).good("train", config, "--run", folder / "run", "--quiet")
    return folder / "run"


def children_of(pid: int) -> list[str]:
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize(
    "where,environment,doing",
    [
        ("the loader", {"TOY_SIGNAL": "take:13:HANG"}, "a step"),
        pytest.param("the step", {"TOY_HANG": "step"}, "a step", marks=pytest.mark.slow),
        pytest.param("a save", {"TOY_HANG": "save"}, "a save", marks=pytest.mark.release),
    ],
)
def test_a_hang_ends_within_its_budget_and_the_next_process_goes_on(
    where, environment, doing, tmp_path, shared_cache, request
):
    aurora, config = Aurora(tmp_path, shared_cache), toy.write(tmp_path)
    began = time.monotonic()
    process = aurora.start(
        "train", config, "--run", "run", f"train.watchdog={BUDGET_S / 60}", "--quiet", environment=environment
    )
    undisturbed = request.getfixturevalue("undisturbed")  # which is trained while this one hangs
    _, err = process.communicate(timeout=240)
    took = time.monotonic() - began
    assert process.returncode == EXIT_HUNG, err[-2000:]
    assert took < BUDGET_S + 60 and not children_of(process.pid) and not os.path.exists(f"/proc/{process.pid}")
    assert f"hang: {doing}" in err
    (stacks,) = (tmp_path / "run").glob("hang-*.txt")
    assert "Thread" in stacks.read_text() and events(tmp_path / "run", "hang")[0]["doing"] == doing
    aurora.good("resume", "run", "train.watchdog=auto", "--quiet")
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 31))
    if where != "the step":  # a callback in the step is another program
        assert final_hash(tmp_path / "run") == final_hash(undisturbed)


@pytest.mark.slow
def test_a_loader_whose_thread_ends_does_not_wait_for_ever(undisturbed, tmp_path, shared_cache):
    aurora, config = Aurora(tmp_path, shared_cache), toy.write(tmp_path)
    settings, environment = [f"train.watchdog={BUDGET_S / 60}", "--quiet"], {"TOY_SIGNAL": "take:13:DIE"}
    process = aurora("train", config, "--run", "run", *settings, environment=environment)
    assert process.returncode == 2 and "ended its thread" in process.stderr, process.stderr[-2000:]
    aurora.good("resume", "run", "--quiet")
    assert final_hash(tmp_path / "run") == final_hash(undisturbed)
