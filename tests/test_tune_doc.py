"""docs/tune.md works as written: its configs and commands, in its order, on a tiny model and tiny data."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from chats import chat
from documents import Document
from kit import losses
from preferring import judged, pairs
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent / "interop"))
import tiny_sources  # noqa: E402

# What makes a config of the document tiny; its other settings stay.
TINY = {
    "notes.yaml": ["data.sequence=256", "data.holdout_test=0.1", "data.holdout_validation=0.1", "score.exact=4"],
    "pairs.yaml": ["data.sequence=64", "data.holdout_test=0.2", "data.holdout_validation=0.2"],
}
for settings in TINY.values():
    settings += ["train.steps=2", "train.batch=2", "train.precision=float32", "memory.accumulation=1",
                 "evaluate.examples=2", "samples.count=1", "samples.max_tokens=4"]  # fmt: skip
DOC = Document("tune.md", TINY)
FEWER = ["samples.count=0", "evaluate.baselines=false"]  # of runs after the first
AT_ONCE = "aurora inspect notes.yaml"  # what the default tier runs


def write_base(folder: Path) -> None:
    """A Hugging Face folder of a tiny Qwen 3, whose sizes 4-bit storage can cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_sources.CONFIGS, "qwen3", tiny_sources.CONFIGS["qwen3"] | {"intermediate_size": 128})
        source = tiny_sources.source_of("qwen3")
    folder.mkdir()
    save_file({name: tensor.whole() for name, tensor in source.tensors.items()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(source.tokenizer)
    (folder / "chat_template.jinja").write_text(source.chat_template)
    for name, content in (("config", source.config), ("tokenizer_config", source.tokenizer_config),
                          ("generation_config", source.generation)):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_lines(path: Path, rows) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of a user of the document."""
    folder = tmp_path_factory.mktemp("tune")
    write_base(folder / "base")
    write_lines(folder / "chats" / "a.jsonl", ({"messages": chat(number)} for number in range(60)))
    write_lines(folder / "more-chats" / "b.jsonl", ({"messages": chat(number)} for number in range(60, 90)))
    write_lines(folder / "pairs.jsonl", pairs(40))
    write_lines(folder / "judged.jsonl", judged(40))
    DOC.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AURORA_CACHE", str(folder / "cache"))
        yield folder


def runs(line: str, capsys, monkeypatch) -> str:
    """What a command prints; it must succeed."""
    shorter = FEWER if line.startswith("aurora train ") and "runs/notes" not in shlex.split(line, comments=True) else ()
    return DOC.runs(line, capsys, monkeypatch, shorter)


def test_the_document_shows_what_is_learned(here, capsys, monkeypatch):
    shown, document = (runs(line, capsys, monkeypatch) for line in DOC.commands if line.startswith(AT_ONCE))
    parts = [part for segment in json.loads(document)["rows"][0]["segments"] for part in segment["parts"]]
    learned = [text for text, is_learned in parts if is_learned]
    assert learned and all(f"[[{text}" in shown and text.rstrip().endswith("<|im_end|>") for text in learned)


@pytest.mark.slow
def test_every_command_of_the_document_works_in_its_order(here, capsys, monkeypatch):
    lines = [line for line in DOC.commands if not line.startswith("aurora plan language/")]  # tests/test_configs.py
    assert len(lines) >= 18
    for line in lines:
        runs(line, capsys, monkeypatch)
    trained = [shlex.split(line, comments=True)[-1] for line in DOC.commands if line.startswith("aurora train ")]
    assert len(trained) == 6
    assert all([step for step, _ in losses(here / run)] == [1, 2] for run in trained)
    for run in trained[:-1]:
        scores = json.loads((here / run / "scores.json").read_text())
        assert scores["before"], run
    assert losses(here / "runs/preferred")[0][1] == pytest.approx(0.6931, abs=1e-4)
    frozen = next((here / "runs/more/checkpoints/frozen").rglob("*.json")).parent
    shared = [file.stat().st_nlink for file in frozen.rglob("*") if file.is_file()]
    assert max(shared) > 1, "two adapters of one base share it on disk"
    assert (here / "notes-gguf/notes-q8_0.gguf").is_file() and (here / "notes-adapter/adapter_config.json").is_file()
    assert (here / "compare.html").is_file()
