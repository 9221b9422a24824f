"""Exact match: what counts as the same answer, and a run that learns to give it."""

import json

import numpy as np
import pytest
from chats import TEMPLATE
from kit import in_process

from aurora_train.config import load_values
from language.exact_match import answers, normalised, whole
from language.tune import Tune

END = "<|endoftext|>"


def rows(folder, said):
    """A table of conversations of two turns each, with the second answer last, and their template."""
    lines = [
        {"messages": [
            {"role": "user", "content": f"number {number}" + "!" * (number % 3)},
            {"role": "assistant", "content": "so"}, {"role": "user", "content": "again"},
            {"role": "assistant", "content": answer},
        ]} for number, answer in enumerate(said)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "chat.jinja").write_text(TEMPLATE)
    return {"source": str(folder / "rows.jsonl"), "template": str(folder / "chat.jinja"), "sequence": 200}


class Scripted:
    """What a `Generator` gives, said beforehand: by the number in the prompt, bytes and whether they end."""

    def __init__(self, tokenizer, said):
        self.tokenizer, self.said, self.asked = tokenizer, said, []

    def fitted(self, prompts, most):
        return prompts, most

    def generate_batch(self, prompts, most, temperature):
        assert temperature == 0
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        self.asked.append(texts)
        out = []
        for text in texts:
            assert text.endswith("user: again\nassistant: ") and "assistant: so" in text
            written = self.said[int(text.split("number ")[1].split("\n")[0].rstrip("!"))]
            ids = self.tokenizer.encode(written.removesuffix(END)).tolist()
            out.append(ids[:most] if written.endswith(END) else (ids + [32] * most)[:most])
        return out


def test_an_answer_matches_if_its_text_is_the_same_and_ends(tmp_path, shared_cache):
    said = ["yes", "caf\u00e9", "a  b\nc", "Yes", "yes", "yes", "twelve words are longer than this", "x"]
    data = rows(tmp_path, said) | {"holdout_test": 0.98, "holdout_validation": 0.0}
    config = load_values({"recipe": "language/tune", "model": {"width": 32, "layers": 1, "heads": 2}, "data": data,
                          "train": {"precision": "float32"}, "evaluate": {"final": False}}, "tune")  # fmt: skip
    store = Tune(config, shared_cache).ready(lambda *_: None).store
    written = [f"yes{END}", f"cafe\u0301{END}", f" a b c{END}", f"yes{END}", "yes", f"yes, sir{END}", f"twelve{END}"]
    pieces = store.of_split("test")
    assert len(pieces) >= 7, "the hash holds out nearly all"
    generator = Scripted(store.tokenizer, [*written, END])
    found = answers(store, pieces, generator, 3, lambda *_: None)
    expected = np.array([1, 1, 1, 0, 0, 0, 0, 0.0])[store.conversation[pieces]]
    np.testing.assert_array_equal(found["exact"], expected)
    assert found["reference"].tolist() == [said[number] for number in store.conversation[pieces]]
    lengths = [len(text) for batch in generator.asked for text in batch]
    assert lengths == sorted(lengths) and {len(batch) for batch in generator.asked} == {3}
    assert normalised(" A\t b ") == "A b" != normalised("a b")


def test_an_answer_that_was_cut_off_where_its_row_ends_is_not_asked_for(tmp_path, shared_cache):
    said = ["yes" * 40, "yes", "no" * 100, "so" * 3, "a" * 4, "b"]
    data = rows(tmp_path, said) | {"sequence": 120, "overlong": "cut", "holdout_test": 0.98, "holdout_validation": 0.0}
    config = load_values({"recipe": "language/tune", "model": {"width": 32, "layers": 1, "heads": 2}, "data": data,
                          "train": {"precision": "float32"}, "evaluate": {"final": False}}, "tune")  # fmt: skip
    store = Tune(config, shared_cache).ready(lambda *_: None).store
    pieces = np.arange(len(said))
    kept = whole(store, pieces, 120, {store.tokenizer.eos_id})
    assert [said[store.conversation[piece]] for piece in kept] == ["yes", "so" * 3, "a" * 4, "b"]
    exact = int(store.offsets[2] - store.offsets[1]) - 1  # a row that the second conversation just fills
    assert 1 in whole(store, pieces, exact, {store.tokenizer.eos_id})


@pytest.mark.slow
def test_a_run_learns_an_answer_by_heart_and_shows_what_changed(tmp_path, shared_cache, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path, ["learned"] * 150) | {"holdout_test": 0.2, "holdout_validation": 0.1}
    (tmp_path / "tune.yaml").write_text(json.dumps({
        "recipe": "language/tune", "model": {"width": 48, "layers": 2, "heads": 2}, "data": data,
        "train": {"steps": 300, "batch": 8, "precision": "float32"},
        "optimizer": {"lr": 0.005, "weight_decay": 0.0, "schedule": {"warmup": 10}},
        "evaluate": {"before": True, "score_every": 30, "patience": 2}, "score": {"exact": 20, "exact_batch": 8},
        "samples": {"count": 2, "max_tokens": 12, "temperature": 0},
    }))  # fmt: skip
    assert in_process("check", "tune.yaml", "--prepare") == 0, "its score is rehearsed, with the model that it asks for"
    assert in_process("train", "tune.yaml", "--run", "run", "--quiet") == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["headline"] == "exact_match" and scores["better"] == "max" and scores["score"]["exact_match"] == 1.0
    table = {row[0]: row[1:] for row in scores["before"]["table"]["rows"]}
    was, was_between, now, now_between, change, between, number = table["exact_match"]
    assert (was, now, change, number) == (0.0, 1.0, 1.0, 20) and between == [1.0, 1.0]
    assert was_between[1] < now_between[0] and was_between[0] == 0 and now_between[1] == 1
    assert table["answer_loss"][5][1] < 0, "the loss is lower, and its interval is clear of 0"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {one["step"]: one["evaluation"]["exact_match"] for one in records if "evaluation" in one}
    first = min(step for step, value in found.items() if value == max(found.values()))
    assert max(found) == first + 60 < 300, "two scores in a row without a better exact match end the run"
    assert (tmp_path / "run" / "checkpoints" / str(first)).is_dir(), "the best by exact match is kept"
    report = (tmp_path / "run" / "report.html").read_text()
    assert "on the same held-out rows" in report and "<h3>before training</h3>" in report
