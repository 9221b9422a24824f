"""A run is whole: it is read, sampled and scored where its data is not, and its code and its start are on record.

Rows H4, H5, H6, H7, H8, H9, M11 and M14 of what a newcomer tried, 1, 2, 3 and 8 of what other trainers' users met.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from kit import evaluations, events, final_hash, losses
from kit import in_process as aurora
from safetensors.numpy import save_file

import aurora_train
from aurora_train.checkpoint import layout
from aurora_train.errors import UserError

CONFIG = """recipe: language_model
model: {width: 32, layers: 1, heads: 2}
data: {source: txt, sequence: 32, holdout_test: 0.1, holdout_validation: 0.1}
train: {steps: 3, batch: 4}
evaluate: {final: false, examples: 8}
samples: {count: 0}
"""
BPE = ("data.tokenizer.kind=bpe", "data.tokenizer.vocab=280")
WORDS = "the of and to in is that for on are with his they be this have from one had by word but not what all".split()
OTHERS = "kernel driver buffer packet socket thread mutex queue stack heap cache page table index byte frame".split()


def write_texts(folder: Path, words: list[str]) -> None:
    draw = random.Random(0)
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(" ".join(draw.choice(words) for _ in range(60)))


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, shared_cache):
    """A folder with two texts, a config, and a run with a BPE trained on the first. Read it only."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AURORA_CACHE", str(shared_cache))
        patch.chdir(folder)
        write_texts(folder / "txt", WORDS)
        write_texts(folder / "txt2", OTHERS)
        (folder / "tiny.yaml").write_text(CONFIG)
        assert aurora("train", "tiny.yaml", *BPE, "--run", "a", "--quiet") == 0
    return folder


@pytest.fixture
def here(trained_once, tmp_path, shared_cache, monkeypatch):
    """A copy of that folder, which is the current one."""
    shutil.copytree(trained_once, tmp_path / "w")
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path / "w")
    # The run's config names its data by the place where it was made.
    config = tmp_path / "w" / "a" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained_once), str(tmp_path / "w")))
    return tmp_path / "w"


@pytest.mark.parametrize("gone", ["H4-R3-data-grown", "H4-R3-data-moved", "H4-copied-where-neither-data-nor-cache-is"])
def test_a_run_is_sampled_loaded_and_scored_without_its_training_data(gone, here, capsys, monkeypatch, tmp_path):
    run = here / "a"
    if "grown" in gone:
        (here / "txt" / "more.txt").write_text("one document more")
    else:
        (here / "txt").rename(here / "elsewhere")
    if "copied" in gone:
        run = Path(shutil.copytree(run, tmp_path / "lent" / "by-a-colleague"))
        monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "empty"))
    assert aurora("generate", run, "--max-tokens", 4, "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert aurora_train.load(run).tokenizer.vocab_size > 257
    assert aurora("evaluate", run, "--on", "txt2", "--quiet", "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["score"]["documents"] == 30 and scored["headline"] == "bits_per_byte"
    assert (run / "scores-on" / "txt2.json").is_file() and not (run / "scores.json").exists()
    assert aurora("evaluate", run, "--quiet") == 2
    why = "not what this run started on" if "grown" in gone else "there is no file or folder"
    assert why in capsys.readouterr().err


def test_R8_the_same_bytes_at_another_place_are_gone_on_with_and_others_are_not(here, capsys):
    (here / "txt").rename(here / "elsewhere")
    assert aurora("resume", "a", "train.steps=4", "--quiet") == 2
    assert "data.source=PATH names its new place" in capsys.readouterr().err
    assert aurora("resume", "a", "train.steps=4", f"data.source={here / 'txt2'}", "--quiet") == 2
    assert "the training data is not what this run started on" in capsys.readouterr().err
    assert aurora("resume", "a", "train.steps=4", f"data.source={here / 'elsewhere'}", "--quiet") == 0
    assert events(here / "a", "resume")[-1]["step"] == 3


def test_R2_H5_another_tokenizer_is_refused_and_the_starting_points_own_is_inherited(here, capsys):
    other = ("data.source=txt2", "train.steps=1", "init.from=a")
    assert aurora("train", "tiny.yaml", *BPE, *other, "--run", "b", "--quiet") == 2
    said = capsys.readouterr().err
    assert "was trained with another tokenizer" in said and "sha256" in said and "init.facts=own" in said
    assert not (here / "b").exists()
    assert aurora("train", "tiny.yaml", *other, "--run", "b", "--quiet") == 0
    assert aurora_train.load("b").tokenizer.sha256 == aurora_train.load("a").tokenizer.sha256
    ours, theirs = (here / run / "facts" / "tokenizer.json" for run in "ba")
    assert ours.read_bytes() == theirs.read_bytes()
    assert aurora("evaluate", "b", "--no-baselines", "--quiet") == 0, "its own data are cut as they were in training"
    assert aurora("resume", "b", "train.steps=2", "--quiet") == 0


def test_H6_the_parent_is_in_provenance_events_and_log(here, capsys):
    assert aurora("train", "tiny.yaml", "data.source=txt2", "train.steps=1", "init.from=a", "--run", "b") == 0
    assert "starting from " in (said := capsys.readouterr().err) and "/a at step 3" in said
    parent = json.loads((here / "b" / "provenance.json").read_text())["parent"]
    digest = json.loads((here / "a" / "checkpoints" / "3" / "manifest.aurora.json").read_text())["digest"]
    facts = json.loads((here / "a" / "provenance.json").read_text())["facts_sha256"]
    assert parent == {"from": str(here / "a"), "step": 3, "digest": digest, "facts_sha256": facts}
    assert events(here / "b", "init")[0]["parent"] == parent


def test_every_checkpoint_names_its_facts_and_others_are_refused(here, capsys):
    manifest = json.loads((here / "a" / "checkpoints" / "3" / "manifest.aurora.json").read_text())
    assert manifest["facts"] == json.loads((here / "a" / "provenance.json").read_text())["facts_sha256"]
    (here / "a" / "facts" / "tokenizer.json").write_text("{}")
    assert aurora("generate", "a") == 2
    assert "a fact of this run was changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "start,said",
    {
        "H9-hf": ("hf", "no *.safetensors here"),
        "H9-gguf": ("m.gguf", "m.gguf"),
        "H9-M13-nowhere": ("nowhere", "there is no run folder or weights file"),
    }.values(),
    ids=["H9-hf", "H9-gguf", "H9-M13-nowhere"],
)
def test_a_start_that_cannot_be_read_is_named_before_any_work(start, said, here, capsys):
    (here / "hf").mkdir()
    (here / "hf" / "config.json").write_text('{"model_type": "llama"}')
    (here / "m.gguf").write_bytes(b"GGUF")
    for verb in ("check", "train"):
        assert aurora(verb, "tiny.yaml", f"init.from={start}") == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_R1_weights_and_averages_of_any_float_dtype_are_read(here):
    wide = ("optimizer.ema=0.9", "optimizer.master=bfloat16", "train.steps=2")
    assert aurora("train", "tiny.yaml", *wide, "--run", "e", "--quiet") == 0
    assert aurora("generate", "e", "--max-tokens", 2) == 0
    kept = layout.snapshot({"params": aurora_train.load("e").state.params})
    assert {str(array.dtype) for array in kept.values()} == {"float32"}, "the average keeps its bits"
    narrow = {name.removeprefix("params."): array.astype(ml_dtypes.bfloat16) for name, array in kept.items()}
    save_file(narrow, "w.safetensors")
    for start in ("e", "w.safetensors"):
        rest = ("train.steps=1", f"init.from={start}", "--run", f"of-{start}", "--quiet")
        assert aurora("train", "tiny.yaml", *rest) == 0
    assert json.loads((here / "of-w.safetensors" / "provenance.json").read_text())["parent"]["step"] is None


def test_M14_python_has_what_the_command_line_has(here):
    trained = aurora_train.train("tiny.yaml", ["train.steps=2"], run="p", quiet=True)
    assert repr(trained) == f"<language_model of p at step 2, {trained.model.embedding.size + 16_480:,} parameters>"
    assert trained.logits([1, 2, 3]).shape == (3, 257) and trained.logits(np.zeros((2, 5), int)).shape == (2, 5, 257)
    assert trained.generate("the", max_tokens=4, seed=1) == trained.generate("the", max_tokens=4, seed=1)
    assert aurora_train.train("tiny.yaml", ["train.steps=2"], run="p", quiet=True).step == 2, "a finished run is read"
    with pytest.raises(UserError, match="did you mean"):
        aurora_train.train("tiny.yaml", ["train.stepz=2"])
    from aurora_train.train.loop import Loop  # the package is still a package

    assert Loop.__module__ == "aurora_train.train.loop"


def test_R23_R24_the_number_of_microbatches_and_few_validation_examples_leave_the_loss_what_it_is(here):
    few = ("train.steps=2", "evaluate.examples=3", "--quiet")
    for parts in (1, 4):
        assert aurora("train", "tiny.yaml", *few, f"memory.accumulation={parts}", "--run", f"in-{parts}") == 0
    one, four = (losses(here / f"in-{parts}") for parts in (1, 4))
    np.testing.assert_allclose([loss for _, loss in one], [loss for _, loss in four], rtol=1e-5)
    assert all(np.isfinite(loss) for _, loss in evaluations(here / "in-1")) and evaluations(here / "in-1")


def test_R29_a_copied_run_goes_on_with_more_steps(here):
    shutil.copytree("a", "copied")
    for run in ("a", "copied"):
        assert aurora("resume", run, "train.steps=5", "--quiet") == 0
    assert losses(here / "copied") == losses(here / "a") and [step for step, _ in losses(here / "a")] == [1, 2, 3, 4, 5]
    assert final_hash(here / "copied") == final_hash(here / "a")
