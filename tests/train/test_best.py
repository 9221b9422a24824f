"""The best is kept where it was measured, and a killed run keeps what an undisturbed one keeps."""

import os
import subprocess
import sys

import pytest
from harness import evaluations, events, final_hash

from aurora_train.checkpoint.ledger import Ledger
from aurora_train.checkpoint.retention import is_among_best
from aurora_train.cli.main import main

COMMAND = ["train", "toy.yaml", "--run", "run", "--quiet", "evaluate.every=7", "checkpoint.keep=1", "optimizer.lr=0.05",
           "optimizer.schedule.name=constant", "checkpoint.every=5"]  # fmt: skip


def kept(run):
    """(steps, score by step of those) as the disk has them."""
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    scores = Ledger(run / "checkpoints").read().scores
    return steps, {step: scores.get(step) for step in steps}


@pytest.mark.slow
def test_R9_each_evaluation_that_is_the_best_so_far_is_saved_and_a_killed_run_agrees(here):
    assert main(COMMAND) == 0
    known = dict(evaluations(here / "run"))
    saved = {event["step"] for event in events(here / "run", "save")}
    ahead = [step for step in known if known[step] < min((known[s] for s in known if s < step), default=float("inf"))]
    assert 7 in ahead and saved == {5, 10, 15, 20, 25, 30, *ahead}
    best = min(known, key=known.get)
    assert kept(here / "run")[0] == sorted({best, 30})
    assert main([*COMMAND[:2], "--run", "none", *COMMAND[4:], "checkpoint.best=0"]) == 0
    assert {event["step"] for event in events(here / "none", "save")} == {5, 10, 15, 20, 25, 30}

    (here / "run").rename(here / "whole")
    _killed_while_the_best_is_written(here)
    assert [step for step, _ in evaluations(here / "run")] == [7] and kept(here / "run")[0] == [5]
    assert main(COMMAND) == 0
    assert events(here / "run", "resume")[0]["step"] == 5
    assert evaluations(here / "run") == evaluations(here / "whole") and kept(here / "run") == kept(here / "whole")
    assert final_hash(here / "run") == final_hash(here / "whole")


def _killed_while_the_best_is_written(here):
    """Step 7 is evaluated and that is on record; its checkpoint, the second one, is never sealed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "aurora_train.cli.main", *(word for word in COMMAND if word != "--quiet")], cwd=here,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TOY_HANG": "save"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("step 7: validation loss"):
            break
    process.kill()
    process.communicate()


@pytest.mark.parametrize("score, earlier, best, kept", [
    (1.0, [], 1, True), (1.0, [1.0], 1, False), (1.0, [2.0, 3.0], 1, True), (2.5, [2.0, 3.0], 1, False),
    (2.5, [2.0, 3.0], 2, True), (1.0, [], 0, False), (float("nan"), [], 1, False), (1.0, [float("nan")], 1, True),
])  # fmt: skip
def test_what_is_among_the_best(score, earlier, best, kept):
    assert is_among_best(score, earlier, best) is kept
