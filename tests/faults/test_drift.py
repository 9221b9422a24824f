"""Nothing that a run is made of changes in silence: every frozen key, the data, and what is allowed is on record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from kit import TINY, Aurora, events

from aurora_train import run as runs
from aurora_train.check.intent import for_resume
from aurora_train.config import dump, flat, load
from aurora_train.errors import UserError

GOLDEN = Path(__file__).parents[1] / "checkpoint" / "golden" / "0.1"
OTHER = [
    "true", "false", "1", "2", "3", "8", "16", "64", "5000", "0.25", "0.5", "0.05", "1e-3", "float32", "bfloat16",
    "other", "own", "byte", "lion", "muon", "adamw", "layernorm", "rmsnorm", "gelu", "swiglu", "learned", "rope", "{}",
    "bpe", "null", "d12", "all", "none", "linear", "[0.8, 0.9]", "int8", "{rank: 2}", "[{kind: full}]", "after",
    "[1, 2]", "[local, global]", str(GOLDEN), "{other: {source: python-stdlib}}", "{policy: runs/other}",
]  # fmt: skip
# A value that fits, of keys for which many of OTHER do not.
FITS = {
    "init.from": str(GOLDEN), "init.parts": "{policy: runs/other}", "init.facts": "own", "model.size": "d12",
    "model.activation": "gelu", "model.norm": "layernorm", "model.norm_place": "after", "model.bias": "all",
    "model.positions": "learned", "model.rope_scaling.kind": "linear", "optimizer.name": "lion", "optimizer.ema": "0.5",
    "model.linear": "{key_heads: 1, value_heads: 2, key_dim: 4, value_dim: 4}", "init.tokens": '["<|turn|>"]',
    "data.tokenizer.split": "gpt2", "data.mix": "{other: {source: python-stdlib}}", "model.lora": "{}",
    "model.window_pattern": "[local, global]", "model.layer_table": "[{kind: full}]",
}  # fmt: skip
# What must be set too.
BESIDE = {
    "init.tokens": f"init.from={GOLDEN}", "model.window_pattern": "model.window=64",
    "train.bf16_ends": "train.precision=fp8",
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run folder of the bundled language model, as far as the config goes."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump(load("quickstart")))
    return tmp_path / "run"


def keys(kind: str) -> list[str]:
    asked_of_a_file = ("recipe", "data.tokenizer.separator")
    return [key for key, (_, found) in flat(load("quickstart")).items() if found == kind and key not in asked_of_a_file]


def parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def others(key: str) -> list[str]:
    """OTHER, with what is likely to fit first: the first that fits is taken, and a try takes a tenth of a second."""
    now = flat(load("quickstart"))[key][0]
    values = [*OTHER, *FITS.values()]
    return sorted(values, key=lambda text: (text != FITS.get(key), type(parsed(text)) is not type(now)))


@pytest.mark.parametrize("key", keys("frozen"))
def test_each_frozen_key_is_refused_by_name_and_passes_only_where_it_is_allowed(key, run):
    beside = [BESIDE[key]] if key in BESIDE else []
    allowed = [key, *(wish.partition("=")[0] for wish in beside)]
    for value in others(key):
        try:
            _, _, changes = for_resume(run, [f"{key}={value}", *beside], allowed)
        except UserError:
            continue  # not a value that this key takes
        kinds = {kind for name, _, _, kind in changes if name == key or name.startswith(f"{key}.")}
        if not kinds:
            continue  # it is the value that the key has
        assert kinds == {"allowed"}
        with pytest.raises(UserError) as caught:
            for_resume(run, [f"{key}={value}", *beside])
        assert "frozen" in str(caught.value) and f"--allow-change {key}" in str(caught.value)
        return
    raise AssertionError(f"no other value of {key} is in OTHER")


def test_allowing_what_is_not_frozen_is_a_mistake(run):
    with pytest.raises(UserError, match="`log.every` is not a frozen key"):
        for_resume(run, [], ["log.every"])
    with pytest.raises(UserError, match="did you mean `model.width`"):
        for_resume(run, [], ["model.wdith"])


@pytest.fixture
def begun(tmp_path, shared_cache):
    shutil.copytree(GOLDEN, tmp_path / "run")
    (tmp_path / "run" / "expected.json").unlink()
    return Aurora(tmp_path, shared_cache), tmp_path / "run"


def test_a_frozen_key_that_is_allowed_goes_on_and_is_on_record(begun):
    aurora, run = begun
    refused = aurora("resume", run, "train.seed=5")
    assert refused.returncode == 2 and "train.seed: 0 -> 5" in refused.stderr
    aurora.good("resume", run, "train.seed=5", "--allow-change", "train.seed")
    (change,) = json.loads((run / "provenance.json").read_text())["allowed_changes"]
    assert (change["key"], change["old"], change["new"], change["step"]) == ("train.seed", 0, 5, 20)
    assert events(run, "override")[0]["changes"] == [["train.seed", 0, 5, "allowed"]]


def test_data_that_was_edited_in_place_is_refused(tmp_path, corpus, shared_cache):
    text = tmp_path / "text"
    shutil.copytree(corpus, text) if Path(corpus).is_dir() else shutil.copy(corpus, text)
    aurora, config = Aurora(tmp_path, shared_cache), tmp_path / "tiny.yaml"
    config.write_text(TINY.format(corpus=text).replace("steps: 40", "steps: 10"))
    unread = ("evaluate.every=null", "evaluate.final=false", "samples.count=0")
    aurora.good("train", config, *unread, "--run", "run")
    file = max((p for p in [text, *text.rglob("*")] if p.is_file()), key=lambda p: p.stat().st_size)
    file.write_text(file.read_text().replace("e", "f", 1))
    done = aurora("resume", "run", "train.steps=20")
    assert done.returncode == 2 and "is not what this run started on" in done.stderr, done.stderr[-2000:]


def test_the_code_is_the_same_from_a_wheel_which_alone_has_the_recipes_inside(tmp_path, monkeypatch):
    (tmp_path / "_bundled" / "recipes").mkdir(parents=True)
    for name in ("run.py", "other.py"):
        (tmp_path / name).write_text(f"name = {name!r}")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "run.py"))
    before = runs.code_hash()
    (tmp_path / "_bundled" / "recipes" / "language_model.py").write_text("")
    assert runs.code_hash() == before
    (tmp_path / "other.py").write_text("")
    changed = runs.code_hash()
    (tmp_path / "machines.toml").write_text("")
    assert before != changed != runs.code_hash()
