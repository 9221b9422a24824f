"""The best is kept where it was measured, and a killed run keeps what an undisturbed one keeps."""

import os
import subprocess
import sys

import pytest
from kit import evaluations, events, final_hash, records

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


# ---- by the recipe's metric


RISING = '''"""The toy, whose best evaluation is the one with the highest loss: the first, while it learns."""
import toy


class Rising(toy.Toy):
    metric = ("height", "max")

    def loss(self, model, batch, key):
        loss = super().loss(model, batch, key)
        return loss._replace(metrics={"height": (loss.total, loss.weight)})
'''
BY_METRIC = ["train", "toy.yaml", "recipe=rising.py", "--run", "run", "--quiet", "evaluate.final=false",
             "train.steps=60", "checkpoint.keep=1"]  # fmt: skip


def test_the_recipes_metric_decides_which_is_best_and_when_there_is_no_better_any_more(here, capsys):
    (here / "rising.py").write_text(RISING)
    assert main([one for one in [*BY_METRIC, "evaluate.patience=2"] if one != "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "finished at step 30" in shown.out
    assert "ended at step 30 of 60: 2 evaluations in a row without a new best (evaluate.patience)" in shown.err
    results = evaluations(here / "run")
    assert [step for step, _ in results] == [10, 20, 30] and results[0][1] > max(results[1][1], results[2][1])
    steps, scores = kept(here / "run")
    assert steps == [10, 30] and scores == {10: results[0][1], 30: results[2][1]}
    assert main([*BY_METRIC, "evaluate.patience=2"]) == 0
    assert "finished at step 30" in capsys.readouterr().out and len(events(here / "run", "finish")) == 1
    assert main(["resume", "run", "evaluate.patience=null", "--quiet"]) == 0
    assert events(here / "run", "finish")[-1]["step"] == 60 and kept(here / "run")[0] == [10, 60]


def test_a_score_every_so_many_steps_is_on_record_beside_the_evaluation_and_decides(here):
    """The toy's score is its mean squared error over all of a split; the loss leaves a fifth of the targets out."""
    text = (here / "toy.py").read_text()
    (here / "toy.py").write_text(text.replace("class Toy(Base):\n", 'class Toy(Base):\n    metric = ("mse", "min")\n'))
    assert main(["train", "toy.yaml", "--run", "run", "--quiet", "evaluate.score_every=20", "train.steps=40"]) == 0
    results = {r["step"]: r["evaluation"] for r in records(here / "run") if "evaluation" in r}
    assert {step: "mse" in result for step, result in results.items()} == {10: False, 20: True, 30: False, 40: True}
    assert Ledger(here / "run" / "checkpoints").read().scores == {step: results[step]["mse"] for step in (20, 40)}
