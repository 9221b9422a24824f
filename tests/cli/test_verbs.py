"""The verbs that read a run say what the run knows, to a person and to a script, and the same from Python."""

import json
import shutil

import numpy as np
import pytest
from kit import losses

from aurora_train.cli.main import main


def said(arguments, capsys):
    capsys.readouterr()
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_evaluating_a_run_again_gives_the_score_it_recorded(language_run, capsys):
    recorded = json.loads((language_run / "scores.json").read_text())
    again = json.loads(said(["evaluate", "run", "--no-baselines", "--json", "--quiet"], capsys))
    assert again["headline"] == "bits_per_byte" and again["step"] == 4
    assert again["score"]["bits_per_byte"] == pytest.approx(recorded["score"]["bits_per_byte"], rel=1e-6)
    assert 1 < again["score"]["bits_per_byte"] < 9


def test_an_earlier_checkpoint_has_a_score_of_its_own(language_run, capsys):
    first = json.loads(said(["evaluate", "run", "--step", "2", "--no-baselines", "--json", "--quiet"], capsys))
    last = json.loads(said(["evaluate", "run", "--no-baselines", "--json", "--quiet"], capsys))
    assert first["step"] == 2 and first["score"]["bits_per_byte"] != last["score"]["bits_per_byte"]


def test_L2_M4_baselines_counted_once_are_kept_and_a_score_of_few_documents_says_so(language_run, capsys):
    counted = said(["evaluate", "run", "--quiet"], capsys).splitlines()
    again = said(["evaluate", "run", "--quiet"], capsys).splitlines()
    assert [line for line in again if not line.startswith("baselines: kept from ")] == counted and again != counted
    assert any(line.startswith("xz_9 ") for line in again)
    (note,) = [line for line in again if line.startswith("note: ")]
    documents = json.loads((language_run / "scores.json").read_text())["score"]["documents"]
    assert f"the score rests on {documents} document" in note and note.endswith("raise data.holdout_test")


def test_generating_is_a_function_of_the_seed(language_run, capsys):
    def text(*more):
        return json.loads(said(["generate", "run", "--prompt", "def ", "--max-tokens", "12", *more, "--json"], capsys))

    one = text("--seed", "1")
    assert one == text("--seed", "1") and one["text"] != text("--seed", "2")["text"]
    assert one["prompt"] == "def " and one["step"] == 4 and one["seed"] == 1
    shown = said(["generate", "run", "--prompt", "def ", "--max-tokens", "12", "--seed", "1"], capsys)
    assert shown.startswith("def ") and shown.rstrip("\n").startswith(f"def {one['text']}".rstrip("\ufffd\n"))


def test_an_empty_prompt_starts_a_text_from_nothing(language_run, capsys):
    made = json.loads(said(["generate", "run", "--max-tokens", "3", "--temperature", "0", "--json"], capsys))
    assert made["prompt"] == "" and isinstance(made["text"], str)


def test_a_report_is_drawn_from_what_was_saved(language_run, capsys):
    (language_run / "report.html").unlink()
    drawn = json.loads(said(["report", "run", "--json"], capsys))
    page = (language_run / "report.html").read_text()
    assert drawn["bytes"] == (language_run / "report.html").stat().st_size and "bits per byte" in page


def test_inspecting_a_config_shows_its_rows(here, capsys):
    facts = json.loads(said(["inspect", "language.yaml", "--rows", "1", "--json"], capsys))
    assert facts["data_step"] == 0 and facts["examples"] > 0 and facts["arrays"]["tokens"]["shape"] == [4, 16]


@pytest.mark.slow
def test_a_copied_recipe_trains_and_goes_on_without_the_copy(here, capsys):
    said(["recipes", "copy", "neural/decoding", "lab"], capsys)
    (config,) = (here / "lab").glob("*.yaml")
    small = ["train.steps=2", "train.batch=4", "model.width=8", "model.heads=2", "model.layers=1",
             "data.simulated_trials=20", "data.simulated_units=5", "evaluate.final=false", "evaluate.examples=4"]
    said(["train", str(config), *small, "--run", "copied", "--quiet"], capsys)
    assert len(losses(here / "copied")) == 2 and (here / "copied" / "code" / "decoding.py").is_file()
    shutil.rmtree(here / "lab")
    said(["resume", "copied", "train.steps=3", "--quiet"], capsys)
    assert len(losses(here / "copied")) == 3, "the recipe and the kit that it imports are in the run"


def test_training_answers_a_script_in_json(here, capsys):
    arguments = ["train", "toy.yaml", "train.steps=1", "--run", "toyrun", "--quiet", "--json"]
    first = json.loads(said(arguments, capsys))
    assert first["status"] == 0 and first["step"] == 1 and first["scores"]["score"]["mse"] > 0
    assert json.loads(said(arguments, capsys)) == first


def test_a_loaded_run_is_a_model_a_config_and_a_tokenizer(language_run):
    import aurora_train

    trained = aurora_train.load("run")
    ids = np.asarray(trained.tokenizer.encode("import os"), np.int32)[None]
    logits = trained.model.logits(trained.model(ids))
    assert logits.shape == (*ids.shape, trained.tokenizer.vocab_size) and np.isfinite(logits).all()
    assert trained.step == 4 and trained.config.model.width == 16
    assert aurora_train.load("run", 2).step == 2


@pytest.mark.slow
def test_the_doctor_answers_a_script_in_json(here, capsys):
    found = json.loads(said(["doctor", "--json"], capsys))
    assert found["ok"] is True and found["checks"]
