"""`evaluate.before`: the state that a run starts with is scored once, and training does not notice."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import toy
from kit import final_hash, in_process, losses

BEFORE = "evaluate.before=true"


def scores(run):
    return json.loads((run / "scores.json").read_text())


def test_the_model_is_scored_before_training_and_compared_at_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = toy.write(tmp_path)
    assert in_process("train", config, BEFORE, "train.steps=10", "--run", "run", "--quiet") == 0
    shown, found = capsys.readouterr().out, scores(tmp_path / "run")
    before, after = found["before"]["score"]["mse"], found["score"]["mse"]
    assert before > 1.2 * after
    assert found["before"]["table"]["rows"] == [["mse", before, after, after - before]]
    assert re.search(rf"before +after +difference\nmse +{before:.4g} +{after:.4g}", shown)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Before and after training" in report and f"{before:.2f}" in report
    assert in_process("train", config, BEFORE, "evaluate.final=false", "--run", "other") == 2
    assert "it is compared with the final score" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_has_begun_is_not_scored_as_if_it_had_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = toy.write(tmp_path)
    assert in_process("train", config, "train.steps=10", "--run", "run", "--quiet") == 0
    assert in_process("resume", "run", "train.steps=20", BEFORE, "--quiet") == 0
    assert not (tmp_path / "run" / "before").exists() and "before" not in scores(tmp_path / "run")
    assert "not scored before training, because the run had begun already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_score_of_another_start_is_not_taken(tmp_path, monkeypatch):
    """Killed between that score and the first step, and started again with other data in the same place."""
    monkeypatch.chdir(tmp_path)
    config = toy.write(tmp_path)
    assert in_process("train", config, BEFORE, "train.steps=2", "--run", "run", "--quiet") == 0
    known, file = scores(tmp_path / "run")["before"], tmp_path / "run" / "before" / "score.json"
    stale = json.loads(file.read_text())
    for key, wanted in ((stale["key"], 1e6), (["of another start", None], known["score"]["mse"])):
        for name in ("checkpoints", "metrics.jsonl", "events.jsonl"):
            path = tmp_path / "run" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        file.write_text(json.dumps(stale | {"key": key, "score": {"mse": 1e6}}))
        assert in_process("train", config, BEFORE, "train.steps=2", "--run", "run", "--quiet") == 0
        assert scores(tmp_path / "run")["before"]["score"]["mse"] == wanted


@pytest.mark.slow
def test_a_kill_in_the_score_before_training_changes_nothing(tmp_path, aurora):
    """Killed in it, killed after it, and never: the same score before, the same losses, the same final state."""
    config = toy.write(aurora.folder)

    def lives(name, *signals):
        for place in signals:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TOY_SIGNAL", place)
                assert aurora("train", config, BEFORE, "--run", name).returncode == -9
        aurora.good("train", config, *([BEFORE] if name != "plain" else []), "--run", name)
        return aurora.folder / name

    plain = lives("plain")
    deaths = {"whole": (), "in": ("score:0:SIGKILL",), "after": ("take:5:SIGKILL",)}
    for name, signals in deaths.items():
        run = lives(name, *signals)
        assert final_hash(run) == final_hash(plain) and losses(run) == losses(plain), name
        assert scores(run)["score"] == scores(plain)["score"]
        assert scores(run)["before"] == scores(aurora.folder / "whole")["before"], name
    assert "Before and after training" in aurora.good("evaluate", "whole", "--quiet").stdout
    assert scores(aurora.folder / "whole")["before"] == scores(aurora.folder / "in")["before"]
