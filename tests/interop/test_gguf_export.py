"""`aurora export --format gguf`: a run as a GGUF file with a Modelfile, proved, and refused where it would differ."""

import dataclasses
import json

import numpy as np
import pytest
from conversations import TEMPLATES
from tiny_sources import source_of

from aurora_train.cli.main import main
from aurora_train.errors import UserError
from aurora_train.interop.gguf import open_gguf
from aurora_train.interop.gguf.export import write_gguf_folder
from aurora_train.interop.gguf.modelfile import marks_of, modelfile
from aurora_train.interop.gguf.write import write_gguf
from aurora_train.interop.kept import facts_of
from aurora_train.interop.placing import matched
from aurora_train.interop.result import Result
from aurora_train.interop.source import located


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny open model as a run at step 0."""
    folder = tmp_path_factory.mktemp("run")
    write_gguf(source_of("qwen3"), folder / "tiny.gguf", "bf16", "tiny")
    assert main(["import", str(folder / "tiny.gguf"), "--to", str(folder / "tiny")]) == 0
    return folder / "tiny"


def test_a_run_goes_out_as_gguf_with_a_modelfile_and_a_proof(run, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["export", str(run), "--to", str(folder), "--format", "gguf", "--dtype", "q8_0"]) == 0
    assert "proof (round trip)" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "Modelfile", "README.md", "lineage.jsonl", "proof.json", "tiny-q8_0.gguf"]
    back, source = open_gguf(folder / "tiny-q8_0.gguf"), source_of("qwen3")
    assert back.tensors.keys() == source.tensors.keys() and back.chat_template == source.chat_template
    assert back.eos_ids == source.eos_ids and back.licence == "apache-2.0"
    assert json.loads((folder / "proof.json").read_text())["dtype"] == "q8_0"
    assert (folder / "Modelfile").read_text().startswith("FROM ./tiny-q8_0.gguf\nTEMPLATE")
    assert main(["verify", str(folder)]) == 0
    assert located(folder) == str(folder / "tiny-q8_0.gguf"), "the folder names its only model"
    assert located(run) == run


def test_bf16_is_the_default_and_what_came_in_goes_out_bitwise(run, tmp_path):
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--format", "gguf"]) == 0
    back, source = open_gguf(tmp_path / "out" / "tiny-bf16.gguf"), source_of("qwen3")
    assert all((back.tensors[name].whole() == source.tensors[name].whole()).all() for name in source.tensors)


@pytest.mark.parametrize(
    "options,says",
    [
        (["--format", "gguf", "--dtype", "float32"], "--dtype: --format gguf has no float32"),
        (["--format", "hf", "--dtype", "q8_0"], "--dtype: --format hf has no q8_0"),
        (["--format", "gguf", "--verify", "transformers"], "--verify: transformers is compared"),
    ],
)
def test_an_option_that_the_format_does_not_have_is_refused(options, says, run, tmp_path, capsys):
    assert main(["export", str(run), "--to", str(tmp_path / "out"), *options]) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_modelfile_has_the_marks_of_a_template_that_writes_the_same_around_every_message():
    source = source_of("llama")
    text = modelfile(source, "m.gguf")
    assert text.splitlines()[0] == "FROM ./m.gguf"
    assert '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ else' in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n')
    assert marks_of(source).default is None


def test_a_system_prompt_that_a_template_adds_is_written_down():
    text = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    source = source_of("llama")
    source = dataclasses.replace(source, chat_template=text + source.chat_template)
    assert marks_of(source).default == "You help." and 'SYSTEM """You help."""\n' in modelfile(source, "m.gguf")


@pytest.mark.parametrize("name", ["strict", "dated", "answers in a macro"])
def test_a_template_that_ollama_cannot_express_is_left_to_the_file_and_that_is_said(name):
    source = dataclasses.replace(source_of("llama"), chat_template=TEMPLATES[name])
    assert marks_of(source) is None
    text = modelfile(source, "m.gguf")
    assert "TEMPLATE" not in text and "# Ollama's language cannot express the chat template" in text


@pytest.mark.parametrize("name,window,context", [("mistral", 32, 32), ("phi3", 32, 32), ("mistral", 4096, 256)])
def test_where_llama_cpp_has_no_window_the_context_is_no_longer_than_it(name, window, context, tmp_path):
    source = source_of(name)
    source = dataclasses.replace(source, config=source.config | {"sliding_window": window})
    remarks = write_gguf(source, tmp_path / "m.gguf", "bf16", "m")
    assert open_gguf(tmp_path / "m.gguf").config["max_position_embeddings"] == context
    assert [f"a context of {window} tokens and not of 256" in remark for remark in remarks] == [True] * (window < 256)


def test_a_transposed_matrix_of_several_parts_is_compared_in_whole_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("aurora_train.interop.gguf.write._BUFFER", 4 * 64 * 48)  # 48 rows of a matrix of 64 at a time
    assert write_gguf(source_of("gpt2"), tmp_path / "m.gguf", "q8_0", "m") == []


def test_an_end_of_texts_for_which_the_file_has_no_key_is_refused(tmp_path):
    source = dataclasses.replace(source_of("llama"), generation={"eos_token_id": [2, 0, 5, 6]})
    with pytest.raises(UserError, match="texts end at 4 ids.*at most 3"):
        write_gguf(source, tmp_path / "m.gguf", "bf16", "m")


def test_each_value_of_the_file_is_rounded_once(tmp_path):
    """A run in float32 whose base was stored in bfloat16 is not rounded to bfloat16 before it becomes Q8_0."""
    found = matched(source_of("qwen3"))
    facts = facts_of(found.source, "qwen3")
    facts["origin"]["dtype"] = "bfloat16"
    record = {"run": "m", "step": 1, "recipe": "language_model", "sequence": 64, "precision": "float32", "data": {},
              "parent": None, "base": None, "licence": None}  # fmt: skip

    def finer(name):
        return (found.read(name) * np.float32(1.001)).astype(np.float32)

    result = Result(found.config, found.vocabulary, found.shapes, finer, facts, record)
    (tmp_path / "out").mkdir()
    write_gguf_folder(result, tmp_path / "out", "f16")
    back = matched(open_gguf(tmp_path / "out" / "m-f16.gguf")).read("stack.units.0000.attention.query")
    assert np.array_equal(back, finer("stack.units.0000.attention.query").astype(np.float16))
