"""A run with a tokenizer that was trained here, as GGUF: the ids are those of the file's own lists by GPT-2's rule."""

import numpy as np
import pytest
from corpora import text
from kit import in_process as aurora

from aurora_train.errors import UserError
from aurora_train.interop.gguf.export import write_gguf_folder
from aurora_train.interop.placing import our_shapes
from aurora_train.interop.result import Result
from aurora_train.nn.decoder_config import DecoderConfig
from language.settings import TokenizerConfig
from language.tokenizers import Tokenizer, train_bpe

# The rule as llama.cpp documents it for `gpt-2` (src/unicode.cpp).
RULE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = (
    text(3), "It's 1234567 o'clock; DON'T we'll  x   y\n\n\n  z", "naïve café e\u0301 日本語 עברית 🙂👩‍👧 ½",
    "def f(x):\n\n\treturn x  # a\r\n", "   ", "a\u00a0b", "<|endoftext|> is text",
)  # fmt: skip
WIDTH = 32


def result_with(tokenizer: Tokenizer) -> Result:
    """A tiny random model whose run keeps a tokenizer, and knows no other origin."""
    config = DecoderConfig(width=WIDTH, layers=1, heads=2, tied=True)
    shapes = our_shapes(config, tokenizer.vocab_size)
    arrays = {name: np.random.default_rng(0).normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    record = {"run": "m", "step": 1, "recipe": "language_model", "sequence": 64, "precision": "float32", "data": {},
              "parent": None, "base": None, "licence": None}  # fmt: skip
    return Result(config, tokenizer.vocab_size, shapes, lambda name: arrays[name], tokenizer.facts(), record)


def by_hand(fields: dict, written: str) -> list[int]:
    """The ids of a text by the lists of a GGUF file alone: cut by the rule, then join by the rank of the merges."""
    regex = pytest.importorskip("regex")
    ids = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"])}
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + at) for at, byte in enumerate(sorted(set(range(256)) - set(shown)))}
    found = []
    for piece in regex.findall(RULE, written):
        parts = [letters[byte] for byte in piece.encode()]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            joined, at = [], 0
            while at < len(parts):
                both = tuple(parts[at : at + 2]) == best
                joined.append("".join(parts[at : at + 1 + both]))
                at += 1 + both
            parts = joined
        found += [ids[part] for part in parts]
    return found


def fields_of(path) -> dict:
    """The metadata of a file as the package `gguf` reads it."""
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_a_bpe_that_is_cut_as_gpt2_cuts_goes_out_with_its_ids(tmp_path):
    tokenizer = train_bpe([[text(i) for i in range(20)]], 340, "gpt2")
    write_gguf_folder(result_with(tokenizer), tmp_path, "f16")
    fields = fields_of(tmp_path / "m-f16.gguf")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id and not fields["tokenizer.ggml.add_bos_token"]
    assert len(fields["tokenizer.ggml.tokens"]) == tokenizer.vocab_size == 340
    for written in TEXTS:
        assert by_hand(fields, written) == tokenizer.encode(written).tolist(), written
    assert len(tokenizer.encode(text(50))) < len(text(50).encode()) / 2


@pytest.mark.parametrize("tokenizer, said", [
    (Tokenizer(), "the tokenizer has no merges"),
    (train_bpe([[text(0)]], 300), "the tokenizer cuts texts by a rule that llama.cpp does not have"),
])  # fmt: skip
def test_another_tokenizer_is_refused_and_the_setting_is_named(tokenizer, said, tmp_path):
    with pytest.raises(UserError, match=f"{said}[\\s\\S]*data.tokenizer.kind=bpe and data.tokenizer.split=gpt2"):
        write_gguf_folder(result_with(tokenizer), tmp_path, "f16")


@pytest.mark.parametrize("kind", ["auto", "byte", "file"])
def test_a_split_without_a_bpe_that_is_trained_here_is_refused(kind):
    with pytest.raises(ValueError, match="split: gpt2 is for a tokenizer that is trained here: kind: bpe"):
        TokenizerConfig(kind=kind, split="gpt2")


@pytest.mark.slow
def test_a_run_of_ours_goes_out_as_gguf_and_the_store_of_another_split_is_not_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(text(number))
    (tmp_path / "tiny.yaml").write_text(
        "recipe: language_model\nmodel: {width: 32, layers: 1, heads: 2}\ndata: {source: texts, sequence: 32, "
        "tokenizer: {kind: bpe, vocab: 300}}\ntrain: {steps: 1, batch: 2}\nevaluate: {final: false}\n")  # fmt: skip
    assert aurora("train", "tiny.yaml", "--run", "code", "--quiet") == 0
    assert aurora("train", "tiny.yaml", "data.tokenizer.split=gpt2", "--run", "gpt2", "--quiet") == 0
    assert aurora("export", "code", "--to", "no", "--format", "gguf") == 2 and not (tmp_path / "no").exists()
    assert "data.tokenizer.split=gpt2" in capsys.readouterr().err
    assert aurora("export", "gpt2", "--to", "out", "--format", "gguf") == 0 and aurora("verify", "out") == 0
    fields = fields_of(next((tmp_path / "out").glob("*.gguf")))
    from aurora_train import load

    assert all(by_hand(fields, one) == load("gpt2").tokenizer.encode(one).tolist() for one in TEXTS)
