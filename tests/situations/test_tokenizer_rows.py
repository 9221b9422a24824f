"""Tokenizers that users bring: rows R12, R13 and R17 of the reports, M5 of what a new user tried."""

import json
from pathlib import Path

import numpy as np
import pytest
from texts import WORDS, T, config, document, kept, write_lines
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import aurora_train
from aurora_train.config import load
from aurora_train.errors import UserError
from language.corpus import check_data
from language.prepare import prepare
from language.settings import TokenizerConfig
from language.tokenizers import Continuation, open_file

# ---- R12, R13, R17, M5: tokenizers of the user's


def llama_like(path) -> Path:
    """A tokenizer.json with Metaspace and the decoder of Llama 2, which strips the first space of a text."""
    known = ["<unk>", "<s>", "</s>", *(f"\u2581{word}" for word in WORDS)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    ends = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    backend.enable_truncation(5)
    backend.enable_padding(length=99)
    backend.save(str(path))
    return path


@pytest.mark.parametrize("prompt", ["the and of to", "", "what"])
def test_R12_a_space_after_the_prompt_is_kept(tmp_path, prompt):
    tokenizer = open_file(TokenizerConfig(path=str(llama_like(tmp_path / "t.json"))), None)
    after = " what all that" if prompt else "what all that"
    written = Continuation(tokenizer, prompt)
    shown = [written.add([token]) for token in tokenizer.encode(after)]
    assert "".join(shown) == written.text == after and len(shown) == 3
    assert written.start == [tokenizer.eos_id, *tokenizer.encode(prompt)]


@pytest.mark.slow
def test_R10_R12_one_file_trains_unscored_and_writes_after_a_prompt(tmp_path, monkeypatch, shared_cache, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    (tmp_path / "one.txt").write_text(document(0, 2000))
    llama_like(tmp_path / "t.json")
    (tmp_path / "tiny.yaml").write_text(
        "{recipe: language_model, model: {width: 16, layers: 1, heads: 1}, train: {steps: 4, batch: 2},\n"
        " data: {source: one.txt, sequence: 16, holdout_test: 0, holdout_validation: 0, tokenizer: {path: t.json}},\n"
        " evaluate: {final: false, every: 2}, checkpoint: {every: 2}, samples: {count: 0}}\n"
    )
    trained = aurora_train.train(tmp_path / "tiny.yaml", run=tmp_path / "run")
    assert "nothing is held out for validation: its loss is not measured" in capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4] and not any("evaluation" in r for r in records)
    pieces = []
    text = trained.generate("the and", max_tokens=5, temperature=0, on_text=pieces.append)
    assert text == "".join(pieces) and text[0] in " <" and " " in text  # "<": a special token has no space


def test_R12_half_a_character_waits_for_its_other_half():
    from language.tokenizers import Tokenizer as Bytes

    written = Continuation(Bytes(), "caf")
    assert [written.add([byte]) for byte in "\u00e9!".encode()] == ["", "\u00e9", "!"] and written.text == "\u00e9!"


def test_M5_what_a_tokenizer_json_says_of_truncation_padding_and_bos_does_not_matter(tmp_path):
    tokenizer = open_file(TokenizerConfig(path=str(llama_like(tmp_path / "t.json"))), None)
    ids = tokenizer.encode(T[0])
    assert tokenizer.decode(ids) == T[0] and len(ids) == 60 and not {1, 2} & set(ids.tolist())


def plain_bpe(separator_special: bool):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(T, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    backend.add_tokens([AddedToken("</s>", special=separator_special)])
    return backend


@pytest.mark.parametrize("special", [True, False])
def test_R13_text_does_not_make_the_separator(tmp_path, special):
    plain_bpe(special).save(str(tmp_path / "t.json"))
    write_lines(tmp_path / "a.jsonl", [{"text": f"a </s> b{t}</s>"} for t in T])
    store = prepare(config(tmp_path / "a.jsonl", tokenizer={"path": str(tmp_path / "t.json")}), tmp_path / "cache")
    eos = store.tokenizer.eos_id
    assert np.sum(store.tokens("train") == eos) == store.num_documents("train") + 1
    assert set(kept(store).values()) == {f"a </s> b{t}</s>" for t in T}


def words(known, unk):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=unk))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def test_R13_a_separator_that_only_the_model_makes_is_refused_at_its_first_document(tmp_path):
    words(["[UNK]", "</s>", *WORDS], "[UNK]").save(str(tmp_path / "t.json"))
    tokenizer = {"path": str(tmp_path / "t.json")}
    write_lines(tmp_path / "a.jsonl", [{"text": t} for t in T])
    prepare(config(tmp_path / "a.jsonl", tokenizer=tokenizer), tmp_path / "cache")
    write_lines(tmp_path / "a.jsonl", [{"text": t + (" </s> x" if i == 30 else "")} for i, t in enumerate(T)])
    with pytest.raises(UserError, match=r"a\.jsonl#30 holds `</s>`") as caught:
        prepare(config(tmp_path / "a.jsonl", tokenizer=tokenizer), tmp_path / "cache")
    assert caught.value.where == "data.tokenizer.separator"


@pytest.mark.parametrize("unk", [None, "[MISSING]"])
@pytest.mark.parametrize("model", [models.WordLevel, models.WordPiece])
def test_R17_a_tokenizer_without_an_unknown_token_is_refused_before_the_work(tmp_path, model, unk):
    backend = Tokenizer(model({"</s>": 0, "the": 1}, **({"unk_token": unk} if unk else {})))
    backend.save(str(tmp_path / "t.json"))
    (tmp_path / "one.txt").write_text(document(0, 600))
    settings = config(tmp_path / "one.txt", tokenizer={"kind": "file", "path": str(tmp_path / "t.json")})
    for look in (check_data, lambda settings: prepare(settings, tmp_path / "cache")):
        with pytest.raises(UserError, match="cannot encode every text") as caught:
            look(settings)
        assert caught.value.where == "data.tokenizer.path"
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("text-*/"))


@pytest.fixture
def yaml(tmp_path):
    plain_bpe(True).save(str(tmp_path / "t.json"))
    (tmp_path / "one.txt").write_text(document(0, 600))

    def write(tokenizer: str = ""):
        path = tmp_path / "c.yaml"
        path.write_text(f"recipe: language_model\ndata:\n  source: one.txt\n{tokenizer}")
        return path

    return write


def test_M5_a_path_without_a_kind_is_a_file(yaml, tmp_path):
    assert load(yaml("  tokenizer: {path: t.json}\n")).data.tokenizer.kind == "file"
    assert load(yaml(), [f"data.tokenizer.path={tmp_path}/t.json"]).data.tokenizer.kind == "file"
    assert load(yaml("  tokenizer: {kind: auto, path: t.json}\n")).data.tokenizer.kind == "file"


WRONG = {
    "a path beside kind: bpe": ("{kind: bpe, vocab: 4096, path: t.json}", "goes with a tokenizer.json(?s:.*)kind=file"),
    "a path beside kind: byte": ("{kind: byte, path: t.json}", "goes with a tokenizer.json"),
    "a separator without a file": ("{kind: bpe, separator: x}", "goes with a tokenizer.json"),
    "a file that is not there": ("{path: nope.json}", r"c\.yaml:4(?s:.*)there is no file .*nope\.json"),
    "a folder": ("{path: .}", r"is a folder(?s:.*)data\.tokenizer\.path="),
    "a vocab beside a path": ("{path: t.json, vocab: 8000}", "has its own vocabulary"),
    "no tokenizer.json": ("{path: one.txt}", "cannot read .*one.txt as a tokenizer.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_M5_what_contradicts_a_path_is_refused(yaml, tmp_path, case):
    written, message = WRONG[case]
    if case == "a folder":
        (tmp_path / "t.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=message):
        load(yaml(f"  tokenizer: {written}\n"))


def test_M5_a_vocab_that_is_not_used_is_said(yaml, tmp_path, caplog):
    settings = load(yaml("  tokenizer: {kind: file, path: t.json, vocab: 8000}\n")).data
    prepare(settings, tmp_path / "cache")
    assert any("data.tokenizer.vocab=8000 is not used" in message for message in caplog.messages)
