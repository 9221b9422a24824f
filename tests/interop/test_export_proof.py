"""What an export writes beside its weights, what its proof looks at, and what it leaves alone on the disk."""

import json
import os
import shutil
import signal
import sys

import ml_dtypes
import numpy as np
import pytest
from kit import in_process as aurora
from open_models import write_model
from safetensors.numpy import load_file, save_file

from aurora_train.errors import UserError
from aurora_train.interop import export, proof
from aurora_train.interop.kept import facts_of
from aurora_train.interop.placing import matched
from aurora_train.interop.proof_of_text import refuse_other_text
from aurora_train.interop.result import Result, result_of
from aurora_train.interop.source import open_source
from aurora_train.loading import unread
from aurora_train.nn.decoder_config import DecoderConfig

GENERATION = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [256]}
CLASSIFY = """
recipe: language/classify
data: {source: table.csv, sequence: 16, tokenizer: {kind: byte}}
model: {width: 16, layers: 1, heads: 2}
train: {steps: 1, batch: 4, precision: float32}
evaluate: {final: false}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with an open model `open` whose tensors differ in dtype, the run `base` imported from it, and `out`."""
    folder = tmp_path_factory.mktemp("proof")
    write_model(folder / "open", dtype="bfloat16")
    weights = load_file(folder / "open" / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_norm.weight"):
        weights[name] = weights[name].astype(np.float32) + np.float32(1e-4)  # which bfloat16 does not hold
    save_file(weights, folder / "open" / "model.safetensors", metadata={"format": "pt"})
    (folder / "open" / "generation_config.json").write_text(json.dumps(GENERATION | {"transformers_version": "4.51.0"}))
    settings = json.loads((folder / "open" / "tokenizer_config.json").read_text())
    (folder / "open" / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    assert aurora("import", folder / "open", "--to", folder / "base") == 0
    assert aurora("export", folder / "base", "--to", folder / "out") == 0
    return folder


@pytest.fixture(autouse=True)
def inside(here, monkeypatch):
    monkeypatch.chdir(here)


@pytest.fixture
def copy(here, tmp_path):
    """A copy of the export, to be changed."""
    return shutil.copytree(here / "out", tmp_path / "copy")


def result_in(folder, name, **changed):
    write_model(folder, name, **changed)
    found = matched(open_source(folder))
    record = {"run": "r", "step": 0, "recipe": "language_model", "sequence": 64, "precision": "float32", "data": {},
              "parent": None, "base": None, "licence": None}  # fmt: skip
    facts = facts_of(found.source, found.family.model_type)
    return Result(found.config, found.vocabulary, found.shapes, found.read, facts, record)


def test_each_tensor_keeps_the_dtype_of_its_base_unless_one_is_asked_for(here, capsys):
    before, after = ((here / side / "model.safetensors").read_bytes() for side in ("open", "out"))
    assert before == after and "2 of its tensors in the dtype of its base" in (here / "out" / "README.md").read_text()
    assert aurora("export", "base", "--to", "all", "--dtype", "bfloat16") == 0
    dtypes = {array.dtype for array in load_file(here / "all" / "model.safetensors").values()}
    assert dtypes == {np.dtype(ml_dtypes.bfloat16)}


def test_settings_of_generation_and_tokenizer_go_out_as_they_came_in(here):
    written = json.loads((here / "out" / "generation_config.json").read_text())
    assert written == GENERATION | {"eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 256}
    settings = json.loads((here / "out" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is False and settings["model_input_names"] == ["input_ids", "attention_mask"]


def test_card_and_proof_name_the_origin_and_no_folder_of_this_machine(here):
    card, written = ((here / "out" / name).read_text() for name in ("README.md", "proof.json"))
    origin = json.loads(written)["origin"]
    assert origin["parent"]["from"] == "open" and len(origin["parent"]["digest"]) == 64
    assert origin["code_sha256"] in card and f"jax {origin['versions']['jax']}" in card
    assert "Started from: `open`" in card
    assert str(here) not in card + written


def test_a_folder_of_the_user_beside_the_target_is_left_alone(here, tmp_path):
    target, mine = tmp_path / "my-model", tmp_path / "my-model.new" / "mine"
    mine.parent.mkdir()
    mine.write_text("mine")
    target.mkdir()
    assert export.beside(target) != export.beside(target)
    assert aurora("export", "base", "--to", target) == 0
    assert mine.read_text() == "mine" and (target / "proof.json").is_file()


def test_the_current_folder_is_no_target(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert aurora("export", here / "base", "--to", ".") == 2
    assert "the folder in which the command runs" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_file_that_was_added_is_a_fault_and_an_edited_card_is_none(copy, capsys):
    (copy / "README.md").write_text("better words")
    assert aurora("verify", copy) == 0
    (copy / "added_tokens.json").write_text("{}")
    assert aurora("verify", copy) == 3 and "added_tokens.json was added after the proof" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed,named",
    [({"files": None}, "files"), ({"texts": []}, "texts"), ({"texts": [["a"]]}, "texts"), ({"kind": 1}, "kind")],
)
def test_a_record_that_lacks_something_is_named(changed, named, copy, capsys):
    written = json.loads((copy / "proof.json").read_text())
    (copy / "proof.json").write_text(json.dumps(written | changed))
    assert aurora("verify", copy) == 2
    said = capsys.readouterr().err
    assert f"no usable `{named}`" in said and "proof.json" in said


def test_a_missing_library_is_no_damage(copy, capsys, monkeypatch):
    written = json.loads((copy / "proof.json").read_text())
    (copy / "proof.json").write_text(json.dumps(written | {"kind": "independent"}))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert aurora("verify", copy) == 2 and "aurora_train[parity]" in capsys.readouterr().err


def test_an_export_with_another_tokenizer_template_or_end_is_refused(here, tmp_path):
    result = result_in(tmp_path / "in", "qwen3")
    source = open_source(tmp_path / "in")
    refuse_other_text(result.facts, source, proof.TEXTS)
    definition = json.loads(source.tokenizer)
    vocabulary = definition["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    faults = {
        "tokenizer.json": json.dumps(definition), "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"eos_token_id": 0}',
    }  # fmt: skip
    said = {
        "tokenizer.json": "cuts 'The capital", "chat_template.jinja": "template", "generation_config.json": "end at",
    }  # fmt: skip
    for name, content in faults.items():
        folder = shutil.copytree(tmp_path / "in", tmp_path / name)
        (folder / name).write_text(content)
        with pytest.raises(UserError, match=said[name]):
            refuse_other_text(result.facts, open_source(folder), proof.TEXTS)


def test_there_are_always_8_rows_and_none_is_longer_than_learned_positions(tmp_path):
    result = result_in(tmp_path / "in", "gpt2", n_positions=16)
    (tmp_path / "out").mkdir()
    family = export.write_folder(result, tmp_path / "out", "float32")
    shown = proof.prove(result, family, tmp_path / "out", "float32", None)
    assert len(shown["texts"]) == 8 and {len(row) for row in shown["texts"]} == {16}
    assert result.facts["origin"]["max_length"] == 16
    digits = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"1": 0, "2": 1}, "merges": []},
                         "added_tokens": []})  # fmt: skip
    rows = proof.rows_of(digits, 5, DecoderConfig())
    assert len(rows) == 8 and all(len(row) > 1 and row.max() < 5 for row in rows)
    with pytest.raises(UserError, match="the embedding 1 rows"):
        proof.rows_of(digits, 1, DecoderConfig())


def test_an_export_that_is_asked_to_end_leaves_nothing_behind(here, monkeypatch):
    before, handler = sorted(here.iterdir()), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(proof, "prove", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        aurora("export", "base", "--to", "ended")
    assert ended.value.code == 128 + signal.SIGTERM and sorted(here.iterdir()) == before
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
def test_a_run_without_a_decoder_is_refused(here, capsys):
    lines = [f"{word} number {number},{word}" for number in range(10) for word in ("good", "bad")]
    (here / "table.csv").write_text("\n".join(["text,label", *lines]))
    (here / "classify.yaml").write_text(CLASSIFY)
    assert aurora("train", "classify.yaml", "--run", "classes", "--quiet") == 0
    assert aurora("export", "classes", "--to", "none") == 2
    said = capsys.readouterr().err
    assert "no decoder to export" in said and "copy it as it is" in said and not (here / "none").exists()
    assert aurora("export", "classes", "--to", "none", "--format", "policy") == 2
    said = capsys.readouterr().err
    assert "has no format 'policy'" in said and "Traceback" not in said


def test_a_decoder_whose_tokens_see_later_ones_is_refused(here):
    with unread("base", by="export") as found:
        assert found.mask == "causal" and result_of(found).shapes.keys() == found.specs.keys()
        with pytest.raises(UserError, match="no decoder to export") as refused:
            result_of(found._replace(mask="bidirectional"))
    assert "see those that come after them" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tokenizer", "ends"])
def test_the_independent_proof_sees_what_transformers_reads_otherwise(what, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    result = result_in(tmp_path / "in", "qwen3")
    (tmp_path / "out").mkdir()
    family = export.write_folder(result, tmp_path / "out", "float32")
    proof.prove(result, family, tmp_path / "out", "float32", "transformers")
    if what == "tokenizer":
        other = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        other.add_tokens(["capital"])
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: other)
    else:
        read = transformers.AutoModelForCausalLM.from_pretrained

        def changed(*args, **kwargs):
            model, loading = read(*args, **kwargs)
            model.generation_config.eos_token_id = 0
            return model, loading

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", changed)
    with pytest.raises(UserError, match="transformers cuts" if what == "tokenizer" else "transformers ends texts"):
        proof.prove(result, family, tmp_path / "out", "float32", "transformers")
