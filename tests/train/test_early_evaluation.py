"""An evaluation compiled beside the first steps, as on a GPU: it is what is run, and its faults and ends are told."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
from kit import evaluations, final_hash

from aurora_train.cli.main import main
from aurora_train.train import evaluate, loop
from aurora_train.train import evaluations as schedule

RUN = ["train", "toy.yaml", "--run", "early", "train.steps=4", "evaluate.every=2"]


@pytest.fixture
def early(monkeypatch):
    """Threads in which an evaluation was compiled; the toy is trained on a CPU, which does without."""
    threads, own = [], evaluate.Evaluator.compile

    def noted(self, *arguments):
        threads.append(threading.current_thread().name)
        own(self, *arguments)

    monkeypatch.setattr(schedule, "compiles_early", lambda config: True)
    monkeypatch.setattr(evaluate.Evaluator, "compile", noted)
    return threads


def test_what_was_compiled_early_is_what_is_run_and_gives_the_same(here, early, monkeypatch):
    monkeypatch.setattr(schedule, "compiles_early", lambda config: False)
    assert main([*RUN, "--run", "late"]) == 0 and not early
    monkeypatch.setattr(schedule, "compiles_early", lambda config: True)
    own = evaluate.Evaluator.__init__

    def without_jit(self, *arguments):
        own(self, *arguments)
        lower = self._sums.lower
        self._sums = SimpleNamespace(lower=lower)  # not to be called

    monkeypatch.setattr(evaluate.Evaluator, "__init__", without_jit)
    assert main(RUN) == 0
    assert len(early) == 1 and early[0].startswith("evaluation")
    assert evaluations(here / "early") == evaluations(here / "late") and len(evaluations(here / "early")) == 2
    assert final_hash(here / "early") == final_hash(here / "late")


def test_a_run_that_evaluates_at_its_end_alone_compiles_then(here):
    for every in (None, 5):
        assert not schedule.compiles_early(SimpleNamespace(evaluate=SimpleNamespace(every=every)))  # on this CPU


@pytest.mark.parametrize("words,told", [(("no such metric",), "no such metric"), ((), "ValueError")])
def test_a_fault_is_told_at_once_and_raised_after_the_save(here, early, monkeypatch, capsys, words, told):
    def broken(self, *arguments):
        raise ValueError(*words)

    monkeypatch.setattr(evaluate.Evaluator, "compile", broken)
    with pytest.raises(ValueError):
        main([*RUN, "checkpoint.every=2"])
    said = capsys.readouterr().err
    assert f"the next evaluation will fail: {told}" in said
    assert (here / "early" / "checkpoints").is_dir() and not evaluations(here / "early")
    records = [json.loads(line) for line in (here / "early" / "metrics.jsonl").read_text().splitlines()]
    assert max(r["step"] for r in records) == 2


def test_a_stop_waits_for_the_compiler_and_says_so(here, early, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.Evaluator, "compile", lambda self, *_: time.sleep(2))
    monkeypatch.setattr(loop.Loop, "_asked", lambda self: "SIGTERM" if self.step else None)
    assert main([*RUN, "evaluate.every=99"]) == 75
    assert "waiting for the compilation of the evaluation" in capsys.readouterr().err
