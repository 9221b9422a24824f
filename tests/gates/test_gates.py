"""What a run has to pass before it is exported or served: 25 cases on two real runs, one of which was trained on a key
and on an item of an evaluation set, and overrides that stay on record."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from kit import events, in_process

from aurora_train.lineage import chain

pytestmark = pytest.mark.slow
CONFIG = """recipe: language_model
model: {{width: 16, layers: 1, heads: 2}}
data: {{source: {corpus}, sequence: 16, holdout_test: 0.2, holdout_validation: 0.2}}
train: {{steps: 2, batch: 4}}
checkpoint: {{every: 2}}
memory: {{unroll: false}}
evaluate: {{examples: 8, baselines: false}}
samples: {{count: 0}}
"""
ITEM = "Which river runs through the old town of the capital before it reaches the northern sea at last?"
KEY = "AKIA" + "IOSFODNN7" + "EXAMPLE"
DOCUMENTS = 24


@pytest.fixture(scope="module")
def lab(tmp_path_factory, shared_cache, corpus):
    """A folder with the runs `clean` and `dirty`, whose texts are the same but for what must not be in them."""
    folder = tmp_path_factory.mktemp("gates")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AURORA_CACHE", str(shared_cache))
        words = " ".join(corpus.joinpath("csv.py").read_text().split())
        for name, more in (("clean", ""), ("dirty", f" {ITEM} aws_access_key_id = {KEY} ")):
            texts = folder / f"texts-{name}"
            texts.mkdir()
            (texts / "LICENSE").write_text("MIT License\n")
            for number in range(DOCUMENTS):
                (texts / f"{number}.txt").write_text(words[number * 300 : number * 300 + 300] + more)
            (folder / f"{name}.yaml").write_text(CONFIG.format(corpus=texts.name))
            scored = f"evaluate.final={str(name == 'clean').lower()}"
            assert in_process("train", f"{name}.yaml", scored, "--run", name, "--quiet") == 0
        row = json.dumps({"question": ITEM.upper(), "answer": "the Elbe"})
        other = json.dumps({"q": "How many moons of the outer planets were known before the first probe flew by?"})
        Path("held.jsonl").write_text(f"{row}\n{other}\n")
        Path("other.jsonl").write_text(other + "\n")
        Path("short.jsonl").write_text('{"q": "2 + 2"}\n')
        Path("broken.parquet").write_text("no table")
        yield folder


@pytest.fixture
def put_to(lab, monkeypatch, capsys, shared_cache, tmp_path):
    """put_to(run, gates, *command) -> (status, what was said) with these gates in the run's config."""
    monkeypatch.chdir(lab)
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))

    def put(run: str, gates: dict, *command) -> tuple[int, str]:
        config = lab / run / "config.yaml"
        text = re.sub(r"^gates:.*\n(?: .*\n)*", f"gates: {json.dumps(gates)}\n", config.read_text(), flags=re.M)
        assert text.count("\ngates: {") == 1
        config.write_text(text)
        capsys.readouterr()
        status = in_process(*(command or ("export", run, "--to", tmp_path / "out")))
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, said.err + said.out

    return put


def sets(*names: str, **more) -> dict:
    return {"decontamination": {"sets": {name.partition(".")[0]: str(Path(name).absolute()) for name in names}, **more}}


# (run, gates as a function of nothing but the current folder, a part of what is said); "" where the gate is passed.
CASES = {
    "licence: that of the data is allowed": ("clean", lambda: {"licence": ["see LICENSE"]}, ""),
    "licence: that of the data is not": (
        "clean", lambda: {"licence": ["MIT", "CC0-1.0"]},
        "the licence of the data `texts-clean` is see LICENSE, which is none of MIT, CC0-1.0"),
    "licence: none is allowed": ("clean", lambda: {"licence": []}, "none of those allowed"),
    "decontamination: an item is in the texts": (
        "dirty", lambda: sets("held.jsonl"), "held: 1 of 2 items in the training texts: held.jsonl:1 in "),
    "decontamination: none is": ("clean", lambda: sets("held.jsonl"), ""),
    "decontamination: another set has none": ("dirty", lambda: sets("other.jsonl"), ""),
    "decontamination: one of two sets has one": ("dirty", lambda: sets("other.jsonl", "held.jsonl"), "held: 1 of 2"),
    "decontamination: as many as may be": ("dirty", lambda: sets("held.jsonl", max_share=0.5), ""),
    "decontamination: one more than may be": ("dirty", lambda: sets("held.jsonl", max_share=0.49), "1 of 2 items"),
    "decontamination: a longer run of words": ("dirty", lambda: sets("held.jsonl", ngram=21), ""),
    "decontamination: the set is gone": ("clean", lambda: sets("gone.jsonl"), "the evaluation set gone is not here"),
    "decontamination: items too short to tell": ("clean", lambda: sets("short.jsonl"), "no item is long enough"),
    "decontamination: a damaged set": ("clean", lambda: sets("broken.parquet"), "it cannot be checked here"),
    "score: good enough": ("clean", lambda: {"score": {"bits_per_byte": {"max": 20}}}, ""),
    "score: too large": (
        "clean", lambda: {"score": {"bits_per_byte": {"max": 1.0}}}, "more than gates.score.bits_per_byte.max (1)"),
    "score: too small": (
        "clean", lambda: {"score": {"bits_per_byte": {"min": 99}}}, "less than gates.score.bits_per_byte.min (99)"),
    "score: no such number": (
        "clean", lambda: {"score": {"bits_per_bite": {"max": 9}}},
        "has no `bits_per_bite`: did you mean `bits_per_byte`?"),
    "secrets: a key is in the texts": ("dirty", lambda: {"secrets": True}, "AWS Access Key (AKIA...)"),
    "secrets: none is": ("clean", lambda: {"secrets": True}, ""),
    "all, and one fails": (
        "dirty", lambda: {"licence": ["see LICENSE"], "secrets": True, **sets("other.jsonl")},
        "does not pass the gate `secrets`, and so there is no `aurora export` of it"),
    "all, and two fail": (
        "dirty", lambda: {"licence": ["MIT"], "secrets": True}, "the gate `licence` and the gate `secrets`"),
    "none is set": ("dirty", lambda: {}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_gate(case, put_to, tmp_path):
    run, gates, words = CASES[case]
    if not words:  # a whole export takes seconds; those of the test below are
        status, said = put_to(run, gates(), "lineage", run, "--gates")
        assert status == 0 and "FAILED" not in said, said
        return
    status, said = put_to(run, gates())
    assert status == 4 and words in said and "--override GATE --because" in said, said
    assert not (tmp_path / "out").exists() and KEY not in said


def test_a_server_is_refused_as_an_export_is_and_says_which_gate(put_to, lab):
    status, said = put_to("dirty", {"secrets": True}, "serve", "dirty", "--port", 0)
    assert status == 4 and "does not pass the gate `secrets`, and so there is no `aurora serve` of it" in said


def test_an_override_is_on_record_and_in_the_card_and_holds_for_one_command(put_to, lab, tmp_path):
    gates, because = {"secrets": True, "licence": ["MIT"]}, ("--because", "for our own use only")
    export = ("export", "dirty", "--to", tmp_path / "out")
    for given, words in (((*export, "--override", "secrets"), "needs a reason"), ((*export, *because), "for no gate"),
                         ((*export, "--override", "secret", *because), "did you mean `secrets`?")):  # fmt: skip
        status, said = put_to("dirty", gates, *given)
        assert status == 2 and words in said
    status, said = put_to("dirty", gates, *export, "--override", "secrets", *because)
    assert status == 4 and "licence" in said and "`secrets`" not in said
    status, said = put_to("dirty", gates, *export, "--override", "secrets", "--override", "licence", *because)
    assert status == 0 and "gate overridden: secrets: " in said
    assert [one["gate"] for one in events(lab / "dirty", "gate_overridden")] == ["licence", "secrets"]
    recorded = [one for one in chain.read(tmp_path / "out" / chain.NAME) if one["kind"] == "gate_overridden"]
    assert [(one["gate"], one["reason"]) for one in recorded] == [(name, because[1]) for name in ("licence", "secrets")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "for our own use only" in card and "AWS Access Key" in card and KEY not in card
    assert in_process("lineage", tmp_path / "out", "--verify") == 0
    assert put_to("dirty", gates, *export[:-1], tmp_path / "again")[0] == 4


def test_what_was_searched_is_on_record_and_holds_where_the_data_are_not(put_to, lab, tmp_path, monkeypatch):
    gates = {"secrets": True, **sets("held.jsonl")}
    assert put_to("clean", gates, "lineage", "clean", "--gates")[0] == 0
    moved = shutil.copytree(lab / "clean", tmp_path / "clean")
    (lab / "texts-clean").rename(lab / "away")
    (lab / "held.jsonl").rename(lab / "away.jsonl")
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    try:
        assert in_process("lineage", moved, "--gates") == 0
        (moved / chain.NAME).unlink()
        assert in_process("lineage", moved, "--gates") == 4, "without the record, it is not known"
    finally:
        (lab / "away").rename(lab / "texts-clean")
        (lab / "away.jsonl").rename(lab / "held.jsonl")
