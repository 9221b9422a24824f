"""`aurora lineage` and the card, as a user and a stranger have them: a signed run, its signed export, and only that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kit import events, in_process

from aurora_train.lineage import chain
from aurora_train.lineage.following import ChainedEvents
from aurora_train.run import Run

pytestmark = pytest.mark.slow


def test_the_tree_goes_from_the_corpus_to_the_export(lab, capsys):
    assert in_process("lineage", lab.out) == 0
    said = capsys.readouterr().out
    places = [said.rindex(one) for one in ("parent base at step 2", "corpus corpus", "run run: language_model",
                                           "export of step 6: hf", "records, head ", "signed by the key")]  # fmt: skip
    assert said.startswith("corpus corpus") and places == sorted(places) and "6 steps of 4" in said
    assert "see LICENSE" in said and "resumed 1 time" in said
    assert "settings changed 1 time" in said and str(lab.folder) not in said
    assert in_process("lineage", lab.out, "--json") == 0
    held = json.loads(capsys.readouterr().out)
    assert held["begin"]["parents"][0]["lineage"]["begin"]["data"]["licence"] == "see LICENSE"
    assert held["begin"]["shards"] and held["begin"]["packages"]["jax"] and held["begin"]["seed"] == 0
    assert held["state_sha256"] == events(lab.run, "finish")[-1]["state_sha256"]
    assert "Lineage" in (lab.run / "report.html").read_text()


def test_a_stranger_verifies_with_the_export_alone(lab, tmp_path, capsys):
    """Another folder, without the run, the data and the cache; then with OpenSSF's own program."""
    there = shutil.copytree(lab.out, tmp_path / "downloaded")
    shutil.copy(lab.key, tmp_path / "lab.pub")
    (there / ".gitattributes").write_text("*.safetensors filter=lfs\n")  # as a hub adds
    verb = (sys.executable, "-m", "aurora_train.cli.main", "lineage", "downloaded", "--verify", "--key", "lab.pub")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "AURORA_CACHE": "none"}
    result = subprocess.run(verb, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "signed by the holder of lab.pub" in result.stdout, result.stderr
    program = Path(sys.executable).with_name("model_signing")
    command = [program, "verify", "key", there, "--signature", there / "model.sig", "--public_key", lab.key]
    assert subprocess.run(command, capture_output=True).returncode == 0
    weights = there / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"~")
    assert subprocess.run(command, capture_output=True).returncode != 0
    assert in_process("lineage", there, "--verify", "--key", lab.key, "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert not found["intact"] and any("model.safetensors" in line for line in found["faults"])


def test_the_card_says_what_the_chain_says_and_no_folder_goes_out(lab):
    card = (lab.out / "README.md").read_text()
    begin = chain.read(lab.out / chain.NAME)[0]
    scores = json.loads((lab.run / "scores.json").read_text())
    assert f"sha256 {begin['data']['fingerprint']}" in card and "Licence of the data: see LICENSE." in card
    assert f"| bits_per_byte | {scores['score']['bits_per_byte']:.4f} |" in card and "## Energy" in card
    assert f"Started from: `base` at step 2 (sha256 {begin['parents'][0]['digest']})" in card
    texts = [path.read_bytes() for path in lab.out.rglob("*") if path.is_file()]
    assert not any(str(lab.folder).encode() in text for text in texts)


def an_event(run: Run) -> None:
    with ChainedEvents(run) as events:
        events.event("other_code", 6, by="generate", before="0" * 64, after="1" * 64)


def a_score(run: Run) -> None:
    assert in_process("evaluate", run.folder, "--quiet") == 0


@pytest.mark.parametrize("what", [an_event, pytest.param(a_score, marks=pytest.mark.release)])
def test_a_run_that_goes_on_after_its_signature_says_so_until_it_is_signed_again(what, lab, signed, capsys):
    run = Run(signed.run)
    with_key = ("lineage", signed.run, "--verify", "--key", lab.key)
    what(run)
    assert in_process(*with_key) == 3
    assert "came after the signature: sign again" in capsys.readouterr().out
    assert in_process("lineage", signed.run, "--verify") == 0, "the chain itself has what is new"
    assert in_process("lineage", signed.run, "--sign", lab.folder / "lab.pem") == 0
    assert in_process(*with_key) == 0
    with run.lock():
        assert in_process("lineage", signed.run, "--sign", lab.folder / "lab.pem") == 2
    assert "this run is being trained" in capsys.readouterr().err


def test_what_a_user_gets_wrong_is_one_message(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert in_process("lineage", "--new-key", "lab.pem") == 0
    assert os.stat("lab.pem").st_mode & 0o777 == 0o600
    assert in_process("lineage", "--new-key", "lab.pem") == 2 and "never replaced" in capsys.readouterr().err
    Path("words.pem").write_text("words")
    Path("empty").mkdir()
    for arguments, words in (
        (("empty",), "not a run folder"), ((lab.run, "--key", "lab.pub"), "add --verify"), ((), "is missing"),
        ((lab.run, "--sign", "none.pem"), "cannot read the key"), ((lab.run, "--sign", "words.pem"), "cannot sign"),
        ((lab.run, "--sign", "lab.pub"), "cannot sign"), ((lab.out, "--verify", "--key", "words.pem"), "no public key"),
        ((lab.out, "--verify", "--key", "none"), "cannot read the key"),
    ):  # fmt: skip
        assert in_process("lineage", *arguments) == 2, arguments
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said
    assert in_process("export", lab.run, "--to", "never", "--sign", "words.pem") == 2 and not Path("never").exists()
    assert in_process("lineage", lab.out, "--verify", "--key", "lab.pub") == 3
    assert "is not the signature that the holder of lab.pub made" in capsys.readouterr().out
