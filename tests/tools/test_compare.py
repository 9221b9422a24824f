"""`aurora compare`: runs side by side on one page that needs nothing else, never two recipes in one figure."""

import json
import re

import pytest
from tools.folders import make
from tools.test_report import Page

from aurora_train.cli.main import main
from aurora_train.errors import UserError
from aurora_train.tools.compare import compare


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_M10_two_runs_stand_side_by_side_as_text_as_json_and_on_one_page(here, capsys):
    make(here / "runs" / "a", lr=0.01, batch=8), make(here / "runs" / "b", lr=0.001, batch=8, score=("mse", 0.25))
    assert main(["compare", "runs/a", "runs/b"]) == 0
    told = capsys.readouterr().out
    for words in ("optimizer.lr", "0.001", "0.5000", "0.2500", "30/30", "compare.html"):
        assert words in told
    assert "train.batch" not in told
    text = (here / "runs" / "compare.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 2 and len(page.ids) == len(set(page.ids))
    assert not re.search(r"<script|@import|<link|<iframe|<img|url\((?!#)", text)
    assert main(["compare", "runs/a", "runs/b", "--json", "--out", "c.html"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["differences"] == {"optimizer.lr": {"a": 0.01, "b": 0.001}} and record["page"] == "c.html"
    assert [run["mse"] for run in record["runs"]] == [0.5, 0.25] and record["remarks"] == []
    assert record["runs"][1]["best_validation_loss"] == 4 * 0.001 / 30


def test_a_folder_of_runs_stands_for_all_of_them_and_failed_starts_are_named(here):
    for number in range(12):
        make(here / "s" / f"lr={number}", lr=0.001 * (number + 1))
    (here / "s" / "torn").mkdir()
    (here / "s" / "torn" / ".lock").touch()
    found = compare([here / "s", here / "s" / "lr=3"])  # named twice, compared once
    assert len(found.runs) == 12 and len(found.differences["optimizer.lr"]) == 12
    assert found.remarks[0].startswith("torn is left out: failed start")


def test_unlike_recipes_data_and_lengths_are_remarked_and_drawn_apart(here, capsys):
    make(here / "a" / "x"), make(here / "b" / "x", done=20, data="0" * 64, score=None)
    make(here / "n", recipe="neural/decoding", score=("r2", 0.9))
    found = compare([here / "a" / "x", here / "b" / "x", here / "n"])
    assert [run.name for run in found.runs] == [str(here / "a" / "x"), str(here / "b" / "x"), "n"]
    told = "\n".join(found.remarks)
    assert "runs of 2 recipes" in told and "did not have the same data" in told and "(20 of 30)" in told
    assert main(["compare", "a/x", "b/x", "n", "--out", "page.html"]) == 0
    page = Page((here / "page.html").read_text())
    assert page.tags.count("svg") == 4 and len(page.ids) == len(set(page.ids))
    assert "mse" in capsys.readouterr().out
    assert main(["compare", "a/x", "n"]) == 0
    said = capsys.readouterr().out
    assert "configs of different recipes are not compared" in said and "the configs are the same" not in said


def test_fewer_than_two_runs_is_one_message(here):
    make(here / "a")
    with pytest.raises(UserError, match="1 run to compare"):
        compare([here / "a"])
    (here / "empty").mkdir()
    with pytest.raises(UserError, match="no run, and no folder of runs"):
        compare([here / "a", here / "empty"])
