"""Tuning on conversations: what is learned, packed rows against single conversations, a run, and what it shows."""

import json

import numpy as np
import pytest
from chats import TEMPLATE, TUNE, chat, write_chats
from kit import in_process, losses

from aurora_train.check.inspection import LEARNED_MARKS, inspect_batch
from aurora_train.config import load_values
from aurora_train.data.order import Part
from aurora_train.errors import UserError
from language import answer_scores
from language.chat import decisive
from language.tune import Tune

LINEAR = {"key_heads": 2, "value_heads": 2, "key_dim": 8, "value_dim": 8}
WINDOW = {"kind": "window", "window": 9}
TABLES = {
    "all": {"layers": 3, "layer_table": [{"kind": "linear"}, WINDOW, {}], "linear": LINEAR},
    "full": {},
    "window": {"layer_table": [WINDOW]},
    "delta": {"layer_table": [{"kind": "linear"}], "linear": LINEAR},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats"))


def recipe_of(folder, cache, data=None, **model):
    data = {"source": str(folder / "chats.jsonl"), "template": str(folder / "chat.jinja"), "sequence": 400,
            "holdout_test": 0.1, "holdout_validation": 0.1} | (data or {})  # fmt: skip
    config = load_values({
        "recipe": "language/tune", "model": {"width": 32, "layers": 2, "heads": 2, **model}, "data": data,
        "train": {"precision": "float32"}, "evaluate": {"final": False},
    }, "tune")  # fmt: skip
    return Tune(config, cache).ready(lambda *_: None)


def alone(batch):
    """The pieces of packed rows, each in a row of its own."""
    rows = []
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == number
            one = {name: np.zeros_like(array[row]) for name, array in batch.items()}
            for name, array in batch.items():
                one[name][: here.sum()] = 1 if name == "segments" else array[row][here]
            rows.append(one)
    return {name: np.stack([one[name] for one in rows]) for name in batch}


@pytest.mark.parametrize("table", [
    pytest.param(one, marks=pytest.mark.slow if one == "all" else pytest.mark.release) for one in TABLES
])  # fmt: skip
def test_packed_rows_have_the_loss_and_gradients_of_single_conversations(folder, shared_cache, table):
    import jax
    from flax import nnx

    recipe = recipe_of(folder, shared_cache, **TABLES[table])
    packed = recipe.data("train").take(np.arange(2))
    single = alone(packed)
    assert packed["segments"].max() >= 3 and len(single["tokens"]) >= 6
    more = len(single["tokens"]) - 2  # empty rows, so that both compile once
    packed = {name: np.pad(array, [(0, more), (0, 0)]) for name, array in packed.items()}
    graph, state = nnx.split(recipe.model(nnx.Rngs(0)))

    @jax.jit
    def measured(state, batch):
        def total(state):
            found = recipe.loss(nnx.merge(graph, state), batch, None)
            return found.total / found.weight

        return jax.value_and_grad(total)(state)

    ours, theirs = measured(state, packed), measured(state, single)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    largest = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (ours[1], theirs[1])), strict=True))
    print(f"{table}: loss {ours[0]:.6f}, gradients differ by at most {largest:.2e}")
    assert largest <= 1e-5


def test_the_answers_and_their_ends_are_learned_and_nothing_else(folder, shared_cache):
    recipe = recipe_of(folder, shared_cache)
    messages = [json.loads(line)["messages"] for line in (folder / "chats.jsonl").read_text().splitlines()]
    store, end = recipe.store, recipe.tokenizer.separator
    assert store.manifest["sources"][""]["kept"] == len(messages)
    for piece in range(len(store.conversation)):
        answers = [m["content"] + end for m in messages[store.conversation[piece]] if m["role"] == "assistant"]
        assert [text for text, is_learned in store.shown(piece) if is_learned] == answers
        learned = store.ids(piece)[store.learned(piece)]
        assert (learned == recipe.tokenizer.eos_id).sum() == len(answers), "each end is learned, once"
        assert store.answer_bytes(piece) == sum(len(a) - len(end) for a in answers)


def test_a_run_learns_scores_and_shows_what_it_learned(folder, tmp_path, shared_cache, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "tune.yaml"
    config.write_text(TUNE.format(folder=folder))
    small = ["train.steps=20", "model.layers=1"]
    assert in_process("train", config, "--run", "run", "--quiet", *small) == 0, capsys.readouterr().err
    first, last = losses(tmp_path / "run")[0], losses(tmp_path / "run")[-1]
    assert last[1] < first[1]
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["headline"] == "answer_loss" and scores["better"] == "min"
    found = scores["score"]
    bits = found["answer_loss"] * found["learned_tokens"] / np.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"]) and 0 <= found["token_accuracy"] <= 1
    of_conversations = np.load(tmp_path / "run" / "work" / "answers.npz")
    assert of_conversations["learned"].sum() == found["learned_tokens"]
    samples = json.loads(next((tmp_path / "run" / "samples").glob("*.json")).read_text())
    assert all(one["prompt"].endswith("assistant: ") and one["reference"].endswith("<|endoftext|>") for one in samples)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "What is learned, in the first row" in report and "&lt;|endoftext|&gt;</ins>" in report
    capsys.readouterr()
    (folder / "chat.jinja").rename(tmp_path / "away.jinja")  # the run has its template
    try:
        assert in_process("evaluate", "run", "--on", folder / "chats.jsonl", "--json") == 0, capsys.readouterr().err
    finally:
        (tmp_path / "away.jinja").rename(folder / "chat.jinja")
    other = json.loads(capsys.readouterr().out)
    assert other["score"]["conversations"] == 120 and "held out" in scores["notes"][0]
    assert "held out" not in other["notes"][0], "nothing is known of what else was trained on"


def test_an_example_is_shown_with_marks_around_what_is_learned(folder, tmp_path, shared_cache, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    config = tmp_path / "tune.yaml"
    config.write_text(TUNE.format(folder=folder))
    assert in_process("inspect", config, "--example", 3, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["indices"] == [3] and len(facts["rows"]) == 1
    for segment in facts["rows"][0]["segments"]:
        number = int(segment["document"].split()[1]) - 1
        answers = [m["content"] for m in chat(number) if m["role"] == "assistant"]
        assert [text for text, learned in segment["parts"] if learned] == [f"{text}<|endoftext|>" for text in answers]
        assert segment["text"].startswith(f"user: {chat(number)[0]['content']}\nassistant: ")
    assert in_process("inspect", config, "--example", 3) == 0
    shown, (opening, closing) = capsys.readouterr().out, LEARNED_MARKS
    assert f"assistant: {opening}{answers[-1]}<|endoftext|>{closing}" in shown.replace("\n", "")
    assert in_process("inspect", config, "--example", 10_000) == 2
    assert "the train split has no example 10000" in capsys.readouterr().err


def test_a_template_decides_the_prepared_rows_and_its_date_only_if_it_tells_it(folder, tmp_path, shared_cache):
    recipe = recipe_of(folder, shared_cache)
    assert recipe.known["chat_template.jinja"] == TEMPLATE.encode()
    assert recipe.known["template_date"].endswith("T00:00:00")
    assert decisive(recipe.known)["date"] is None
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ strftime_now('%Y') }} " + TEMPLATE)
    other = recipe_of(folder, shared_cache, {"template": str(dated)})
    assert decisive(other.known)["date"] == other.known["template_date"]
    assert other.data("train").fingerprint != recipe.data("train").fingerprint
    assert other.store.shown(0)[0][0].startswith("20")


def test_a_mixture_is_packed_source_by_source_and_trained_by_its_weights(folder, tmp_path, shared_cache):
    few = write_chats(tmp_path / "few", 40)
    mix = {"few": {"source": str(few / "chats.jsonl"), "weight": 3}, "many": {"source": str(folder / "chats.jsonl")}}
    recipe = recipe_of(folder, shared_cache, {"source": None, "mix": mix, "sequence": 160})
    rows = recipe.data("train")
    facts = inspect_batch(rows, "train", 0, 64, 0, rows=1)
    assert {name: part["share"] for name, part in facts["mix"].items()} == {"few": 0.75, "many": 0.25}
    assert sum(part["rows"] for part in facts["mix"].values()) == len(rows)
    first = {segment["document"].partition(" of ")[2] for segment in rows.shown(0)}
    assert first == {"few/chats.jsonl"} and recipe.data("validation").mixture is None


def test_the_work_of_a_learned_token_is_that_of_all_tokens_read_for_it(folder, tmp_path, shared_cache):
    few = write_chats(tmp_path / "few", 40)
    (few / "few.jsonl").write_text("".join(
        json.dumps({"instruction": f"Say {n} {'please ' * 12}", "output": f"{n}"}) + "\n" for n in range(40)
    ))  # fmt: skip
    mix = {"few": {"source": str(few / "few.jsonl"), "weight": 1}, "many": {"source": str(folder / "chats.jsonl")}}
    for settings in ({}, {"source": None, "mix": mix}):
        recipe = recipe_of(folder, shared_cache, {"holdout_test": 0, "holdout_validation": 0, **settings})
        of_every_token, rows = super(Tune, recipe).flops(1000, 100), recipe.data("train")
        assert recipe.flops(1000, 100) * rows.learned_share == pytest.approx(of_every_token)
        shares = []
        for part in rows.mixture or [Part(1, 0, len(rows))]:
            batch = rows.take(np.arange(part.first, part.first + part.count))
            shares.append(batch["weights"].sum() / (batch["segments"] > 0).sum())
        assert rows.learned_share == pytest.approx(np.mean(shares)), "nothing is held out, so the counts are exact"
        assert len(shares) == 1 or shares[0] < shares[1] / 2
    learned = recipe_of(folder, shared_cache, {"holdout_test": 0, "holdout_validation": 0})
    rows = learned.data("train")
    weights = rows.take(np.arange(len(rows)))["weights"].sum()
    assert learned.targets_per_example == pytest.approx(weights / len(rows))


def test_each_source_of_a_mixture_has_a_score_of_its_own():
    found = {"conversation": np.arange(3), "source": np.array([0, 2, 2]), "nats": np.array([1.0, 2.0, 6.0]),
             "learned": np.array([1, 1, 3]), "right": np.array([1, 0, 0]), "bytes": np.array([2, 1, 1])}  # fmt: skip
    assert answer_scores.by_source(found, ["a", "b", "c"]) == {
        "answer_loss_a": 1.0, "bits_per_byte_a": 0.5 / np.log(2), "answer_loss_c": 2.0,
        "bits_per_byte_c": 4 / np.log(2),
    }  # fmt: skip
    assert answer_scores.by_source(found, [""]) == {}


def test_the_scores_of_the_sources_add_up_to_that_of_all(folder, tmp_path, shared_cache):
    few = write_chats(tmp_path / "few", 40)
    mix = {"few": {"source": str(few / "chats.jsonl")}, "many": {"source": str(folder / "chats.jsonl"), "weight": 3}}
    recipe = recipe_of(folder, shared_cache, {"source": None, "mix": mix, "sequence": 160})

    def predict(batch):
        return batch["targets"] / 7.0, batch["targets"] % 2 == 0

    found = answer_scores.sums(recipe.data("test"), predict, 3, lambda *_: None)
    for row, source in zip(found["conversation"], found["source"], strict=True):
        piece = int(np.flatnonzero(recipe.store.conversation == row)[0])
        assert recipe.store.place(piece).partition(" of ")[2] == ("few", "many")[source] + "/chats.jsonl"
    assert set(answer_scores.by_source(found, ["few", "many"])) == {
        f"{what}_{name}" for what in ("answer_loss", "bits_per_byte") for name in mix
    }


@pytest.mark.parametrize("content,said", [
    (b"{# \xe9 #}", "cannot read"), (b" \n", "is empty"), (b"{% for %}", "not a valid template"), (None, "cannot read"),
])  # fmt: skip
def test_a_template_that_is_none_is_refused_by_its_file(folder, tmp_path, content, said):
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        recipe_of(folder, tmp_path, {"template": str(file)})
    assert str(file) in str(refused.value) and "chat_template.jinja" not in (refused.value.where or "")


def test_a_conversation_that_the_template_refuses_may_be_left_out(folder, tmp_path, shared_cache):
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no ' ~ messages[0].content) }}{% endif %}" + TEMPLATE
    )
    rows = [chat(number) for number in range(20)]
    rows[3].insert(0, {"role": "system", "content": "three"})
    rows[5].insert(0, {"role": "system", "content": "five"})
    rows[7][1]["content"] = "a <|endoftext|> b"
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    settings = {"source": str(source), "template": str(tmp_path / "strict.jinja")}
    with pytest.raises(UserError, match="line 4 of rows.jsonl, .*refuses this conversation: no three") as refused:
        recipe_of(folder, shared_cache, settings)
    assert "data.damaged=leave_out" in refused.value.hint
    counts = recipe_of(folder, shared_cache, settings | {"damaged": "leave_out"}).store.manifest["sources"][""]
    assert counts["kept"] == 17 and counts["left_out"] == {
        "the template refuses this conversation": 2, "the message holds the control token": 1,
    }  # fmt: skip


def test_what_would_steer_a_terminal_is_written_out(folder, tmp_path, shared_cache, monkeypatch, capsys, caplog):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    config, rows = tmp_path / "tune.yaml", [{"messages": chat(number)} for number in range(12)]
    for row in rows:
        row["messages"][0]["content"] += "\x1b]0;owned\x07\x9b2J\u202e\tend\n"
    (tmp_path / "\x1b[31mred.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.write_text(TUNE.format(folder=folder))
    (tmp_path / "\x1b[5mnote.txt").write_text("no table")
    more = [f"data.source={tmp_path}", "data.sequence=300"]
    assert in_process("inspect", config, "--example", 0, *more) == 0
    shown, said = capsys.readouterr()
    assert "are not read: \\x1b[5mnote.txt" in caplog.text + said and "\x1b" not in caplog.text + said
    assert "\\x1b]0;owned\\x07\\x9b2J\\u202e" in shown and "\\x1b[31mred.jsonl" in shown
    assert not set(shown) & set("\x1b\x07\x9b\u202e")
    (tmp_path / "\x1b[31mred.jsonl").write_text(json.dumps({"messages": [{"role": "\x1b[2J", "content": "a"}]}))
    assert in_process("check", config, *more) == 2
    assert "`\\x1b[2J` is not a role" in (said := capsys.readouterr().err) and "\x1b" not in said


def test_a_model_without_a_template_is_refused_with_the_row_that_needs_one(folder, shared_cache):
    with pytest.raises(UserError, match="no chat template") as refused:
        recipe_of(folder, shared_cache, {"template": None})
    assert "line 1 of chats.jsonl" in refused.value.where and "data.template=FILE" in refused.value.hint
