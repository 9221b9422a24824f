"""`language/prefer`: rows of two answers, the reference beside the data, training from log 2 on, and the score."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from kit import in_process, losses, records
from preferring import assistant, judged, pairs, prepared, source_of, user, write_config, write_start

from aurora_train.config import load as load_config
from aurora_train.errors import UserError
from aurora_train.interop.gguf.write import write_gguf
from aurora_train.loading import load
from aurora_train.nn.tracing import tracing
from aurora_train.origin.parents import parents_of
from language import pair_scores, reference
from language.answers import learn
from language.chat import Dialogue
from language.conversations import Conversation
from language.preferences import Judgement

BASE = ["model.lora.rank=4", "model.lora.targets=['*']", "objective.reference=base"]  # with a reference for nothing


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefer")
    write_start(folder)
    return folder


@pytest.fixture(autouse=True)
def one_cache(here, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(here / "cache"))


@pytest.fixture(scope="module")
def config(here):
    return write_config(here, here / "tiny.gguf", pairs())


@pytest.fixture(scope="module")
def trained(here, config):
    """A run with adapters that is compared with the base under them, scored before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AURORA_CACHE", str(here / "cache"))
        assert in_process("train", config, *BASE, "evaluate.before=true", "--run", here / "run", "--quiet") == 0
    return here / "run"


# ---- rows


def test_rows_are_a_prompt_and_its_two_answers_of_which_only_the_answers_are_learned(config):
    recipe = prepared(config)
    source = recipe.data("train")
    batch = source.take(np.array([5, 0]))
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        **dict.fromkeys(("tokens", "targets", "segments", "positions"), ((2, 2, 48), "int32")),
        "weights": ((2, 2, 48), "float32"), "reference": ((2, 2), "float32"),
    }  # fmt: skip
    for row, name in ((0, "yes"), (1, "no")):
        learned, real = batch["weights"][0, row] > 0, batch["segments"][0, row] > 0
        answer = source.pieces.tokenizer.decode(batch["targets"][0, row][learned])
        assert answer.startswith(name) and answer.endswith("<|im_end|>")
        first = int(learned.argmax())
        assert learned[first:].sum() == learned.sum() == real.sum() - first, "an answer ends its row"
        assert (batch["positions"][0, row][real] == np.arange(real.sum())).all()
    prompts = [batch["tokens"][0, row][: int((batch["weights"][0, row] > 0).argmax()) + 1] for row in range(2)]
    assert np.array_equal(*prompts)


def test_pairs_of_one_prompt_are_in_one_split(here):
    rows = [{**row, "prompt": user(f"number {i % 20}")} for i, row in enumerate(pairs(80))]
    recipe = prepared(write_config(here, here / "tiny.gguf", rows, name="shared"), *BASE)
    prompts = {}
    for split in ("train", "validation", "test"):
        batch = (source := recipe._source(split)).take(np.arange(len(source)))
        starts = (batch["weights"][:, 0] > 0).argmax(-1) + 1
        prompts[split] = {tuple(row[:start]) for row, start in zip(batch["tokens"][:, 0], starts, strict=True)}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 20


def test_answers_that_differ_beyond_the_end_of_a_row_alone_are_no_pair(here):
    long = [{**pairs(1)[0], "prompt": user("long"), "chosen": assistant("the same " * 30 + end), "rejected": assistant(
        "the same " * 30 + other)} for end, other in (("a", "b"), ("c", "d"))]  # fmt: skip
    config = write_config(here, here / "tiny.gguf", [*pairs(20), *long], name="long")
    counts = prepared(config, *BASE, "data.overlong=cut").store.manifest["sources"][""]
    assert (counts["rows"], counts["kept"], counts["nothing_learned"]) == (22, 20, 2)


def test_a_judged_answer_stands_beside_one_to_another_prompt(here):
    rows = [{**row, "prompt": user(f"number {i // 2}")} for i, row in enumerate(judged())]
    config = write_config(here, here / "tiny.gguf", rows, name="judged")
    source = prepared(config, "objective.loss=kto", *BASE).data("train")
    batch = source.take(np.arange(len(source)))
    assert set(batch["desirable"]) == {0.0, 1.0} and "reference" not in batch
    for tokens, weights, label in zip(batch["targets"], batch["weights"], batch["desirable"], strict=True):
        own, other = (source.pieces.tokenizer.decode(t[w > 0]) for t, w in zip(tokens, weights, strict=True))
        assert own.startswith("yes" if label else "no")
        number, another = (int(text.split()[1].removesuffix("<|im_end|>")) // 2 for text in (own, other))
        assert number != another, "the answer beside it belongs to another prompt"
        starts = [int((w > 0).argmax()) for w in weights]
        assert np.array_equal(tokens[0][: starts[0]], tokens[1][: starts[1]]), "after the example's own prompt"


# ---- the reference


def test_the_reference_is_the_start_by_an_independent_sum_of_its_logits_and_the_first_loss_is_log_2(here, config):
    recipe = prepared(config)
    batch, start = recipe.data("train").take(np.arange(4)), load(here / "tiny.gguf")
    for row in range(2):
        logits = np.asarray(start.logits(batch["tokens"][2, row]), np.float64)
        logits -= logits.max(-1, keepdims=True)
        logs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(48), batch["targets"][2, row]]
        weights = batch["weights"][2, row].astype(np.float64)
        assert batch["reference"][2, row] == pytest.approx(float(logs @ weights), abs=1e-4)
    total, weight, metrics = jax.jit(lambda batch: recipe.loss(start.model, batch, None))(batch)
    assert float(total / weight) == pytest.approx(np.log(2), abs=1e-6)
    assert float(metrics["margin"][0]) == pytest.approx(0, abs=1e-5)


class Examples:
    """A source of numbered examples."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def take(self, indices):
        return {"number": indices}


def numbers(batch):
    return np.stack([batch["number"], -0.5 * batch["number"]], 1).astype(np.float32)


def test_a_pass_that_is_killed_continues_where_it_was_and_gives_the_same_bytes(tmp_path, monkeypatch):
    sources = [Examples(43), Examples(0), Examples(9)]
    whole = reference.measured(tmp_path / "whole.f32", sources, lambda: numbers, lambda *_: None)
    assert [part.shape for part in whole] == [(43, 2), (0, 2), (9, 2)]
    assert np.array_equal(whole[2], numbers({"number": np.arange(9)}))
    monkeypatch.setattr(reference, "_KEEP_EVERY_SECONDS", 0.0)
    asked: list[int] = []

    def killed_after(batches: int):
        def predict(batch):
            if len(asked) == batches:
                raise KeyboardInterrupt
            asked.append(int(batch["number"][0]))
            return numbers(batch)

        return lambda: predict

    for batches in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            reference.measured(tmp_path / "killed.f32", sources, killed_after(batches), lambda *_: None)
    reference.measured(tmp_path / "killed.f32", sources, killed_after(99), lambda *_: None)
    assert asked == [0, 8, 16, 24, 32, 40, 0, 8], "no batch twice"
    assert (tmp_path / "killed.f32").read_bytes() == (tmp_path / "whole.f32").read_bytes()


def test_a_damaged_file_is_said_and_made_again_and_numbers_that_are_none_are_refused(tmp_path, caplog):
    file, source = tmp_path / "some.f32", [Examples(10)]
    reference.measured(file, source, lambda: numbers, lambda *_: None)
    sound = file.read_bytes()
    file.write_bytes(sound[:40] + b"\x01" + sound[41:])
    reference.measured(file, source, lambda: numbers, lambda *_: None)
    assert file.read_bytes() == sound and "is damaged" in caplog.text
    with pytest.raises(UserError, match="example 9 of the prepared data"):
        reference.measured(tmp_path / "nan.f32", source,
                           lambda: lambda b: np.where(b["number"][:, None] == 9, np.nan, [[0, 0]]), print)  # fmt: skip


@pytest.mark.slow
def test_another_reference_is_other_data_and_adapters_that_are_new_add_nothing(here, config):
    one = prepared(config)
    other = prepared(config, "model.lora.rank=2")
    assert np.array_equal(one.references["train"], other.references["train"])
    assert one.data("train").fingerprint == other.data("train").fingerprint
    against = one._source("train").against(one.references["train"] + np.float32(1e-6))
    assert against.fingerprint != one.data("train").fingerprint


@pytest.mark.slow
def test_what_decides_the_start_s_numbers_names_their_file(here, tmp_path, monkeypatch):
    """Start, precision and the format of the masters: none takes the numbers of another."""
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))
    other = here / "other.gguf"
    draws, weights = np.random.default_rng(9), source_of("llama").tensors
    arrays = {name: one.whole() + draws.normal(0, 0.01, one.shape).astype(np.float32) for name, one in weights.items()}
    write_gguf(source_of("llama", arrays), other, "f16", "other")
    config = write_config(here, other, pairs(20), name="decides")
    overrides = [[], ["optimizer.master=bfloat16"], ["train.precision=bfloat16"], [f"model.from={here / 'tiny.gguf'}"]]
    found = [prepared(config, *each).references["train"] for each in overrides]
    assert len(list((tmp_path / "data").glob("reference-*.f32"))) == len(overrides)
    assert len({each.tobytes() for each in found}) == len(overrides)
    again = prepared(config, "optimizer.lr=1e-5", "objective.beta=0.2", "train.batch=4")
    assert np.array_equal(again.references["train"], found[0]), "what decides nothing is in no key"
    assert len(list((tmp_path / "data").glob("reference-*.f32"))) == len(overrides)


@pytest.mark.slow
def test_a_resume_without_the_numbers_asks_the_start_again_and_refuses_another(here, tmp_path, monkeypatch, capsys):
    start = write_start(tmp_path)
    config = write_config(tmp_path, start, pairs(30), steps=2)
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "first"))
    assert in_process("train", config, "--run", tmp_path / "run", "--quiet") == 0
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "second"))
    assert in_process("resume", tmp_path / "run", "train.steps=3", "--quiet") == 0
    numbers = [next((tmp_path / name / "data").glob("reference-*.f32")).read_bytes() for name in ("first", "second")]
    assert numbers[0] == numbers[1]
    start.write_bytes(start.read_bytes()[:-1] + b"\x01")
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "third"))
    capsys.readouterr()
    assert in_process("resume", tmp_path / "run", "train.steps=4", "--quiet") == 2
    assert "is not what this run began with" in capsys.readouterr().err


def test_a_start_that_changes_before_the_first_step_is_refused(here, tmp_path):
    start = tmp_path / "tiny.gguf"
    shutil.copy(here / "tiny.gguf", start)
    config = load_config(write_config(tmp_path, start, pairs(5)))
    (parent,) = parents_of(config, {})
    begun = {"": parent.record()}
    assert parents_of(config, begun) == (parent,)
    start.write_bytes(start.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="tiny.gguf is not what this run began with"):
        parents_of(config, begun)


# ---- training


@pytest.mark.slow
def test_training_begins_at_log_2_and_learns_what_is_preferred(here, trained, capsys):
    first = records(trained)[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["accuracy"] == 0.5
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert losses(trained)[-1][1] < 0.3
    scores = json.loads((trained / "scores.json").read_text())
    assert scores["headline"] == "pair_accuracy" and scores["score"]["pair_accuracy"] == 1.0
    before = {row[0]: row for row in scores["before"]["table"]["rows"]}
    assert before["pair_accuracy"][1] == 0.5 and before["loss"][1] == pytest.approx(np.log(2), abs=1e-6)
    assert "no prompt of which was trained on" in scores["notes"][0]
    (here / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(9)))
    capsys.readouterr()
    assert in_process("evaluate", trained, "--on", here / "other.jsonl", "--json") == 0
    other = json.loads(capsys.readouterr().out)
    assert other["score"]["examples"] == 9 and "trained on" not in other["notes"][0], "here, most of them were"


@pytest.mark.slow
def test_the_base_alone_is_the_start_also_under_trained_adapters(here, trained):
    after, start, tokens = load(trained), load(here / "tiny.gguf"), np.arange(10)
    with tracing(adapters=False):
        base = after.logits(tokens)
    assert np.array_equal(base, start.logits(tokens))
    assert np.abs(np.asarray(after.logits(tokens)) - base).max() > 1e-2


@pytest.mark.release  # in the slow tier TRL's steps are those of both (tests/parity/test_trl.py)
def test_the_stored_reference_and_that_by_the_base_train_alike(here, config, trained):
    both = ["model.lora.rank=4", "model.lora.targets=['*']", "--quiet"]
    assert in_process("train", config, *both, "--run", here / "stored") == 0
    np.testing.assert_allclose([loss for _, loss in losses(here / "stored")], [loss for _, loss in losses(trained)],
                               rtol=1e-4)  # fmt: skip


@pytest.mark.slow
def test_kto_begins_at_one_half_and_its_microbatches_are_part_of_its_maths(here, capsys):
    config = write_config(here, here / "tiny.gguf", judged(), name="kto")
    kto = ["objective.loss=kto", "objective.desirable=1.5", "--quiet"]
    for parts in (1, 2):
        assert in_process("train", config, *kto, f"memory.accumulation={parts}", "--run", here / f"kto-{parts}") == 0
    one, two = ([loss for _, loss in losses(here / f"kto-{parts}")] for parts in (1, 2))
    assert one[0] == pytest.approx(two[0], abs=1e-6) and one[0] == pytest.approx(0.5 * 1.25, abs=0.13)
    assert one[-1] < 0.5 * one[0] and one != two
    scores = json.loads((here / "kto-1" / "scores.json").read_text())["score"]
    assert scores["pair_accuracy"] > 0.9
    capsys.readouterr()
    assert in_process("train", config, *kto, "memory.accumulation=4", "train.steps=14", "--run", here / "kto-1") == 2
    assert "memory.accumulation" in capsys.readouterr().err


# ---- the score


def test_outcomes_are_counted_over_all_pairs_with_ties_as_halves(tmp_path):
    rewards = np.array([[1.0, 0], [2, 2], [0, 3], [2, 0]], np.float32)
    found = pair_scores.outcomes(Judgement(np.ones(4), rewards), rewards, None)
    assert found["won"].tolist() == [1, 0.5, 0, 1]
    draws = np.random.default_rng(1)
    desirable, given = draws.integers(0, 2, 30), draws.integers(0, 5, (30, 2)).astype(np.float64)
    found = pair_scores.outcomes(Judgement(np.ones(30), given), given, desirable)
    better, worse = given[desirable == 1, 0], given[desirable == 0, 0]
    every = [1.0 if a > b else 0.5 if a == b else 0.0 for a in better for b in worse]
    assert found["won"].mean() == pytest.approx(np.mean(every))
    assert found["margin"].mean() == pytest.approx(better.mean() - worse.mean())
    np.savez(tmp_path / pair_scores.FILE, **found)
    assert pair_scores.measures(tmp_path)["pair_accuracy"].value == pytest.approx(np.mean(every))


@pytest.mark.slow
def test_an_open_model_is_scored_on_conversations_by_the_loss_of_their_answers(here, capsys):
    """Beside a sum over the logits of one conversation."""
    said = [user("is 3 a number")[0], assistant("yes 3")[0]]
    (here / "chats.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    capsys.readouterr()
    assert in_process("evaluate", here / "tiny.gguf", "--on", here / "chats.jsonl", "--json") == 0
    written = capsys.readouterr()
    found = json.loads(written.out)
    assert "packed rows of 256 tokens to score" in written.err
    model = load(here / "tiny.gguf")
    dialogue = Dialogue(model.tokenizer, model.recipe.known)
    (row,) = learn(Conversation("", said), model.tokenizer, model.recipe.known, dialogue)
    logs = jax.nn.log_softmax(np.asarray(model.logits(row.ids[:-1]), np.float32))
    wanted = -np.asarray(logs)[np.arange(len(row.ids) - 1), row.ids[1:]][row.learned[1:]].mean()
    assert found["headline"] == "answer_loss" and found["score"]["learned_tokens"] == row.learned.sum()
    assert found["score"]["answer_loss"] == pytest.approx(float(wanted), abs=1e-3)


# ---- mistakes


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["objective.reference=base"], "no frozen base without adapters"),
        (["objective.loss=kto", "objective.smoothing=0.1"], "it is for objective.loss=dpo only"),
        (["objective.desirable=2.0"], "it is for objective.loss=kto only"),
        (["objective.smoothing=0.5"], "less than 0.5"),
        (["train.precision=fp8"], "the reference is asked in bfloat16"),
        (["objective.loss=kto"], "objective.loss=dpo learns from such rows"),
    ],
)
def test_a_setting_without_effect_is_refused(config, overrides, says):
    with pytest.raises(UserError) as refused:
        load_config(config, overrides)
    assert says in str(refused.value)


def test_a_run_without_a_start_is_refused(config):
    config_alone = config.with_stem("alone")
    config_alone.write_text("\n".join(line for line in config.read_text().splitlines() if "model:" not in line))
    with pytest.raises(UserError, match="by a model that answers already"):
        load_config(config_alone)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i, row: {**row, "prompt": user("always the same")}, "holds 1 different prompts"),
        (lambda i, row: {**row, "prompt": user(f"one of three: {i % 3}")}, "answers to one prompt only"),
        (lambda i, row: {**row, "label": True}, "no undesirable answer is in the"),
    ],
)
def test_judged_answers_with_nothing_to_compare_are_refused(here, change, says):
    rows = [change(i, row) for i, row in enumerate(judged(30))]
    with pytest.raises(UserError) as refused:
        prepared(write_config(here, here / "tiny.gguf", rows, name="alike"), "objective.loss=kto",
                 "data.holdout_validation=0.2")  # fmt: skip
    assert says in str(refused.value)


def test_one_prompt_held_out_for_validation_is_refused_by_its_key(here):
    with pytest.raises(UserError, match="the validation split has answers to one prompt only") as refused:
        prepared(write_config(here, here / "tiny.gguf", judged(), name="one"), "objective.loss=kto",
                 "data.holdout_validation=0.001")  # fmt: skip
    assert refused.value.where == "data.holdout_validation" and "data.holdout_validation=0 " in refused.value.hint
