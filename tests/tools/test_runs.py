"""`aurora runs`: one row a run, from the ends of the logs, whatever state its folder is in."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tools.folders import make

from aurora_train.cli.main import main
from aurora_train.errors import UserError
from aurora_train.record.metrics import EventLog, MetricsLog, newest
from aurora_train.run import Run
from aurora_train.tools.runs import listing, settings


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_name(folder=None):
    return {row.name: row for row in listing(folder)}


def test_M10_runs_are_listed_by_state_step_score_and_what_sets_them_apart(here, capsys):
    make(here / "runs" / "a", lr=0.01)
    make(here / "runs" / "b", lr=0.001, done=20, score=None)
    make(here / "runs" / "toy-sweep" / "lr=0.1", lr=0.1)
    make(here / "runs" / "c", recipe="neural/decoding", lr=5, score=("r2", 0.9))
    (here / "runs" / "ft-1811e584").mkdir()
    (here / "runs" / "ft-1811e584" / ".lock").touch()
    imported = make(here / "runs" / "open", lr=7, done=0, score=None)
    (imported / "provenance.json").write_text("{}")  # nobody has chosen its data
    (here / "runs" / "notes").mkdir()  # no run
    (here / "runs" / "compare.html").touch()
    rows = by_name()
    assert {name: (row.state, row.step, row.steps) for name, row in rows.items()} == {
        "a": ("finished", 30, 30), "b": ("stopped", 20, 30), "c": ("finished", 30, 30),
        "toy-sweep/lr=0.1": ("finished", 30, 30), "open": ("imported", 0, None),
        "ft-1811e584": ("failed start", 0, None),
    }  # fmt: skip
    assert rows["open"].why == "" and rows["open"].differs == {}
    assert rows["a"].differs == {"optimizer.lr": 0.01} and rows["c"].differs == {}  # alone of its recipe
    assert rows["b"].validation_loss == 4 * 0.001 / 20 and rows["b"].why == "by SIGINT" and rows["a"].bytes > 1000
    assert main(["runs"]) == 0
    told = capsys.readouterr().out
    for words in ("mse 0.5000", "r2 0.9000", "validation loss 0.0002", "optimizer.lr=0.001", "failed start", "20/30"):
        assert words in told
    assert main(["runs", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == set(rows)


def test_the_run_written_last_comes_first_and_a_run_alone_is_the_only_row(here):
    old, new = make(here / "runs" / "b"), make(here / "runs" / "a")
    for folder, age in ((old, 5000), (new, 50)):
        for name in ("metrics.jsonl", "events.jsonl", "config.yaml"):
            os.utime(folder / name, (time.time() - age,) * 2)
    assert [row.name for row in listing()] == ["a", "b"]
    os.utime(old / "metrics.jsonl")
    assert [row.name for row in listing()] == ["b", "a"]
    assert [row.name for row in listing(old)] == ["b"]


def test_a_run_that_a_process_holds_is_training_and_looking_does_not_keep_others_out(here):
    folder = make(here / "runs" / "a", done=20)
    with open(folder / ".lock") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        row = by_name()["a"]
        assert (row.state, row.step) == ("training", 20)
        with pytest.raises(UserError, match="is being trained by process 1 on nowhere"), Run(folder).lock():
            pass
    with Run(folder).lock():
        assert by_name()["a"].state == "training"
    assert by_name()["a"].state == "stopped"


def test_a_run_that_ended_by_an_error_says_it_until_it_is_resumed_and_one_without_a_word_was_killed(here):
    folder = make(here / "runs" / "a", done=20)
    with EventLog(folder / "events.jsonl") as events:
        time.sleep(0.002)
        events.event("fail", 20, why="the data are gone")
        assert (by_name()["a"].state, by_name()["a"].why) == ("failed", "the data are gone")
        time.sleep(0.002)
        events.event("resume", 20)
        assert (by_name()["a"].state, by_name()["a"].why, by_name()["a"].step) == ("killed", "", 20)


@pytest.mark.parametrize("harm", ["config", "scores", "metrics", "events"])
def test_one_damaged_run_does_not_hide_the_others(here, harm):
    make(here / "runs" / "good")
    bad = make(here / "runs" / "bad")
    name = {"config": "config.yaml", "scores": "scores.json"}.get(harm, f"{harm}.jsonl")
    (bad / name).write_bytes(b"\xff{{{\n")
    rows = by_name()
    assert rows["good"].state == "finished"
    assert rows["bad"].state == ("killed" if harm == "events" else "finished" if harm == "metrics" else "unreadable")
    assert rows["bad"].why or harm in ("metrics", "events")


def test_nothing_there_is_one_line_and_a_folder_that_is_not_there_an_error(here, capsys):
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == (
        "no runs in runs: `aurora train CONFIG` starts one, such as `aurora train quickstart`\n"
    )
    assert main(["runs", "rnus"]) == 2
    assert "rnus: there is no such folder" in capsys.readouterr().err
    (here / "config.yaml").write_text("recipe: toy.py\n")  # a config of the user's own makes no run of a folder
    assert listing(here) == []


def test_a_config_edited_by_hand_reads_as_its_own_writing(here):
    folder = make(here / "a")
    own = settings(folder / "config.yaml")
    assert own["optimizer.lr"] == 0.01 and own["data.source"] == "/some where/rows.parquet" and own["log.sinks"] == "[]"
    text = (folder / "config.yaml").read_text()
    edited = text.replace("lr: 0.01", "lr: 1e-2  # by hand").replace("\n  sinks: []", " {sinks: []}")
    assert edited != text
    (folder / "config.yaml").write_text(edited)
    assert settings(folder / "config.yaml") == own


def test_the_newest_record_is_found_from_the_end_of_a_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert newest(path, "loss") is None
    path.touch()
    assert newest(path, "loss") is None
    with MetricsLog(path) as log:
        log.write({"step": 1, "evaluation": {"loss": 5.0}})
        for step in (1, 2):
            log.write({"step": step, "loss": float("nan"), "note": "evaluation"})
        log.write({"step": 2, "evaluation": {"loss": 4.0}})
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "loss": 1.0')
    assert newest(path, "loss")["step"] == 2 and newest(path, "evaluation")["evaluation"] == {"loss": 4.0}
    assert newest(path, "step", 1)["note"] == "evaluation"
    assert newest(path, "lr") is None


def test_M10_forty_runs_are_listed_and_compared_without_jax(here):
    """The listing alone is timed: how long an interpreter takes to start is not its affair."""
    first = make(here / "first")
    config = (Path(__file__).parents[1] / "config" / "golden" / "language-quickstart.yaml").read_text()
    for number in range(40):
        copy = shutil.copytree(first, here / "runs" / f"r{number}")
        (copy / "config.yaml").write_text(re.sub(r"^  lr: .*$", f"  lr: {number}.5", config, flags=re.MULTILINE))
    began = time.process_time()
    assert len(listing()) == 40
    assert time.process_time() - began < 1
    code = (
        "import sys; from aurora_train.cli.main import main; assert main(['runs']) == 0; "
        "assert main(['compare', 'runs/r0', 'runs/r1']) == 0; assert not {'jax', 'flax', 'orbax'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
