"""`aurora export --format gguf`: a run as a GGUF file with a Modelfile, proved, and refused where it would differ."""

import dataclasses
import json

import pytest
from conversations import TEMPLATES
from tiny_sources import source_of

from aurora_train.cli.main import main
from aurora_train.interop.gguf import open_gguf
from aurora_train.interop.gguf.modelfile import marks_of, modelfile
from aurora_train.interop.gguf.write import write_gguf


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
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "README.md", "proof.json", "tiny-q8_0.gguf"]
    back, source = open_gguf(folder / "tiny-q8_0.gguf"), source_of("qwen3")
    assert back.tensors.keys() == source.tensors.keys() and back.chat_template == source.chat_template
    assert back.eos_ids == source.eos_ids and back.licence == "apache-2.0"
    assert json.loads((folder / "proof.json").read_text())["dtype"] == "q8_0"
    assert (folder / "Modelfile").read_text().startswith("FROM ./tiny-q8_0.gguf\nTEMPLATE")
    assert main(["verify", str(folder)]) == 0


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
