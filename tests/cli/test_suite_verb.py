"""`aurora evaluate --suite`: what the tasks gave is kept and shown, and a mistake in a task is told in one message."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from aurora_train.cli.main import main

TASKS = Path(__file__).parents[1] / "evals" / "tasks"
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install -e '.[parity]'")


def suite(*arguments) -> list[str]:
    return ["evaluate", *map(str, arguments), "--suite-tasks", str(TASKS), "--quiet"]


@needs_lm_eval
def test_what_tasks_give_is_kept_in_the_run_with_every_example_and_shown_in_its_report(language_run, capsys):
    assert main(suite("run", "--suite", "capitals", "--limit", "3")) == 0
    assert "acc_norm" in capsys.readouterr().out
    kept = json.loads((language_run / "suites" / "capitals.json").read_text())
    assert kept["step"] == 4 and kept["examples"] == len(kept["samples"]) == 3
    assert kept["samples"][0]["document"]["country"] == "France"
    for figure in kept["figures"]:
        low, high = figure["interval"]
        assert 0 <= low <= figure["value"] <= high <= 1
    assert main(["report", "run"]) == 0
    assert "Tasks of lm-eval" in (language_run / "report.html").read_text()


@needs_lm_eval
@pytest.mark.parametrize(
    "text,says",
    [
        ("task: [", ["left out task files", "broken.yaml"]),
        ("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\n", ["none.jsonl"]),
        ("task: broken\ndataset_path: some/where\n", ["no data are downloaded"]),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_read_is_told_with_its_reason(text, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TASKS, tmp_path / "tasks")
    (tmp_path / "tasks" / "broken.yaml").write_text(text)
    assert main(["evaluate", "run", "--suite", "broken", "--suite-tasks", "tasks", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in says), said


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["--suite", "capitls"], ["there is no task 'capitls'", "capitals"]),
        (["--suite", "capitals", "--limit", "0"], ["--limit", "1 or more"]),
        (["--suite", "capitals", "--on", "x.txt"], ["--on would have no effect"]),
        (["--limit", "3"], ["it belongs to --suite"]),
        (["--suite", ","], ["no task is named"]),
    ],
)  # fmt: skip
@needs_lm_eval
def test_a_wrong_question_is_refused_with_what_would_work(arguments, says, capsys):
    tasks = ["--suite-tasks", str(TASKS)] if "--suite" in arguments else []
    assert main(["evaluate", "run", *arguments, *tasks, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in says), said


def test_without_lm_eval_the_command_to_install_it_is_said(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name))
    assert main(suite("run", "--suite", "capitals")) == 2
    assert "pip install 'aurora_train[lm-eval]'" in capsys.readouterr().err
