"""docs/extend.md works as written: its files, in a folder of their own, train, are killed, and come back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from asking import Client, served
from kit import records, write_documented

from aurora_train.cli.main import main

DOC = Path(__file__).parents[1] / "docs" / "extend.md"
AURORA = [sys.executable, "-m", "aurora_train.cli.main"]
SHORT = ["model.width=8", "train.batch=16", "evaluate.every=null", "evaluate.examples=32"]


@pytest.fixture
def folder(tmp_path):
    """The files of the document, by the name in the first line of each block."""
    write_documented(tmp_path)
    return tmp_path


def environment(folder):
    root = str(DOC.parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "AURORA_CACHE": str(folder / "cache")}


def aurora(folder, *arguments):
    done = subprocess.run([*AURORA, *arguments], cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def steps(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "loss" in record]


def test_the_documents_recipe_is_a_single_short_file(folder):
    assert {"forecast.py", "forecast.yaml"} <= {path.name for path in folder.iterdir()}
    assert len((folder / "forecast.py").read_text().splitlines()) < 110


@pytest.mark.slow
def test_a_layer_kind_of_a_users_own_trains_and_what_it_reports_is_on_record(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("AURORA_CACHE", str(folder / "cache"))
    short = ["train.steps=60", "evaluate.every=null", "optimizer.lr=1e-2", "memory.save=[decay_kept]"]
    assert main(["train", "counting.yaml", *short, "--run", "run", "--quiet"]) == 0
    kept = [record["kept"] for record in records(folder / "run") if "kept" in record]
    assert kept[0] == pytest.approx(0.5, abs=0.1) and kept[-1] != kept[0]  # a gate that learns
    assert json.loads((folder / "run" / "scores.json").read_text())["score"]["right"] > 0.5


def test_a_users_own_recipe_passes_check_and_its_typos_are_found_by_line(folder):
    aurora(folder, "check", "forecast.yaml")
    text = (folder / "forecast.yaml").read_text()
    (folder / "forecast.yaml").write_text(text.replace("width: 64", "widht: 64"))
    typo = subprocess.run(
        [*AURORA, "check", "forecast.yaml"], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    assert typo.returncode == 2 and "forecast.yaml:3:" in typo.stderr and "width" in typo.stderr


@pytest.mark.slow
def test_a_users_own_recipe_comes_back_from_a_kill_though_its_file_has_gone_and_is_scored(folder):
    run = folder / "run"
    arguments = ["train", "forecast.yaml", *SHORT, "train.steps=100000", "checkpoint.every=20", "--run", "run"]
    victim = subprocess.Popen(
        [*AURORA, *arguments], cwd=folder, env=environment(folder), stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in victim.stderr:
        said.append(line)
        if "saved step" in line:
            break
    victim.kill()
    victim.stderr.close()
    assert victim.wait() == -9, "".join(said)
    assert "recipe forecast.py sha256 " in said[0]
    (folder / "forecast.py").unlink()
    last = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()) + 30
    aurora(folder, "resume", "run", f"train.steps={last}")
    assert steps(run) == list(range(1, last + 1))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    resumed = [event["step"] for event in events if event["event"] == "resume"]
    assert len(resumed) == 1 and resumed[0] >= 20
    scores = json.loads((run / "scores.json").read_text())
    assert scores["headline"] == "rmse" and 0 < scores["score"]["rmse"] < 1
    assert 0 < scores["baselines"]["linear prediction"] < 1


def test_the_documents_student_is_trained_from_a_teacher_that_is_kept_as_it_was(folder, monkeypatch):
    from aurora_train import load
    from aurora_train.cli.main import main

    monkeypatch.chdir(folder)
    monkeypatch.setenv("AURORA_CACHE", str(folder / "cache"))
    short = ["forecast.yaml", *SHORT, "train.steps=3", "evaluate.final=false", "--quiet", "--run"]
    assert main(["train", *short, "teacher"]) == 0
    assert main(["train", *short, "student", "recipe=distilled.py", "init.teacher=teacher"]) == 0
    student, teacher = load(folder / "student"), load(folder / "teacher")
    assert student.state.params.keys() == {"student"}
    assert (student.model.teacher.out.kernel[...] == teacher.model.out.kernel[...]).all()


@pytest.mark.slow
def test_the_documents_forecast_is_held_to_its_limit_served_and_exported(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("AURORA_CACHE", str(folder / "cache"))
    limit = ["recipe=served.py", "limits.rmse_max=1e-6"]
    train = ["train", "forecast.yaml", *SHORT, "train.steps=3", "evaluate.baselines=false", *limit, "--run", "run"]
    assert main([*train, "--quiet"]) == 4 and "more than limits.rmse_max" in capsys.readouterr().err
    answers = []

    def ask(place):
        client = Client(place)
        answers.extend([client(samples=[0.1] * 24)["next"], client(samples=[float("nan")])["error"],
                        client(samples=[])["next"], client(reset=True, samples=[])["next"]])  # fmt: skip

    assert served(["act", "run", "--override-limits", "a test"], ask) == 0
    assert len(answers[0]) == 8 and answers[2] == answers[0] != answers[3] and "finite" in answers[1]
    export = ["export", "run", "--to", "forecaster", "--format", "forecaster"]
    assert main(export) == 4 and main([*export, "--override-limits", "a test"]) == 0
    assert main(["verify", "forecaster"]) == 0
