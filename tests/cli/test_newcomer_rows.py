"""Rows of what a newcomer met in the verbs: what they say of ends, small numbers, moved data and other data."""

import json
import shutil

import pytest
import toy
from tools.folders import make

from aurora_train.cli.main import VERBS, main
from aurora_train.run import Run, UnwritableRun
from aurora_train.units import counted, decimal


@pytest.fixture(scope="module")
def ended(tmp_path_factory, shared_cache):
    """A folder with a toy run whose evaluations did not get better: it ended before its last step."""
    folder = tmp_path_factory.mktemp("ended")
    toy.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AURORA_CACHE", str(shared_cache))
        patch.chdir(folder)
        assert main(["train", "toy.yaml", "--run", "run", "--quiet", "train.steps=40", "evaluate.every=2",
                     "evaluate.patience=1", "optimizer.lr=1e-12", "optimizer.weight_decay=0"]) == 0  # fmt: skip
    return folder


@pytest.fixture
def there(ended, shared_cache, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(ended)
    return ended


def said(arguments, capsys, status=0):
    capsys.readouterr()
    assert main(arguments) == status
    return capsys.readouterr()


def test_an_end_by_patience_is_an_end_in_the_report_and_in_the_list_of_runs(there, capsys):
    words = "early, after 1 evaluation without a new best (evaluate.patience)"
    assert f"finished {words}, step " in (there / "run" / "report.html").read_text()
    (row,) = json.loads(said(["runs", "run", "--json"], capsys).out)
    assert row["state"] == "finished" and row["step"] < row["steps"] == 40 and row["why"] == words
    assert f"run: finished: {words}" in said(["runs", "run"], capsys).out


def test_a_resume_of_a_run_that_ended_early_changes_nothing_and_names_no_rate(there, capsys):
    before = (there / "run" / "events.jsonl").read_bytes()
    err = said(["resume", "run", "optimizer.lr=1e-3"], capsys).err
    assert "this run is finished, so these keys were not changed: optimizer.lr" in err
    assert "changed optimizer.lr" not in err and "learning rate" not in err
    assert (there / "run" / "events.jsonl").read_bytes() == before


def test_small_numbers_have_significant_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a", lr=1e-7, score=("mse", 0.00001234)), make(tmp_path / "b", lr=2e-7, score=None, done=20)
    for verb in (["compare", "a", "b"], ["runs", "."]):
        out = said(verb, capsys).out
        assert "0.0000" not in out.replace("0.00001234", "") and "1.234e-05" in out and "4e-08" in out, out
    assert [decimal(value) for value in (2.5, -0.1, 0.0, 0.012345, float("nan"))] == [
        "2.5000", "-0.1000", "0.0000", "0.01235", "nan"
    ]  # fmt: skip
    assert [counted(1, "row"), counted(12_000, "row"), counted(0, "row")] == ["1 row", "12,000 rows", "0 rows"]


def test_evaluate_names_no_key_that_it_does_not_take(language_run, here, capsys):
    (here / "empty").mkdir()
    err = said(["evaluate", "run", "--quiet", "--on", "empty"], capsys, status=2).err
    assert "--on empty: " in err and "data." not in err
    out = said(["evaluate", "run", "--quiet", "--on", "corpus", "--no-baselines"], capsys).out
    assert "the score rests on" in out and "more text" in out and "data.holdout_test" not in out


def test_a_score_that_cannot_be_kept_is_shown(language_run, here, capsys, caplog):
    shutil.rmtree(language_run / "scores-on", ignore_errors=True)
    (language_run / "scores-on").touch()  # no folder can be made here, not even by root
    done = said(["evaluate", "run", "--quiet", "--on", "corpus", "--no-baselines"], capsys)
    assert "bits_per_byte" in done.out and "the score is shown and not kept" in done.err + caplog.text
    (language_run / "scores-on").unlink()
    run, kept = Run(language_run), (language_run / "scores.json").read_bytes()
    (here / "beside").mkdir()
    beside = UnwritableRun(run, here / "beside")
    assert beside.scores.read_bytes() == kept and beside.before == run.before and run.is_writable()
    assert all(one.is_relative_to(here / "beside") for one in (beside.workdir, beside.samples, beside.plots))


def test_evaluate_of_a_run_whose_data_moved_says_what_it_can_do(language_run, here, capsys):
    text = (language_run / "config.yaml").read_text()
    source = next(line for line in text.splitlines() if line.strip().startswith("source:"))
    (language_run / "config.yaml").write_text(text.replace(source, f"  source: {here / 'gone'}"))
    err = said(["evaluate", "run", "--quiet"], capsys, status=2).err
    assert "there is no file or folder" in err and "--on PATH" in err and "data.source=" not in err


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_verb_has_help_with_an_example(verb, option, capsys):
    out = said([verb, option], capsys).out
    assert "Example: aurora " in out and "--help" in out




# A conversation (chat) is for people; a script asks `generate`.
@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"unit", "schema", "recipes", "chat", "launch"}))
def test_every_verb_that_prints_for_people_prints_for_scripts_too(verb, capsys):
    assert "--json" in said([verb, "--help"], capsys).out
