"""Tokenizers: any text comes back, no text can produce the separator, training twice gives the same file."""

import json
import subprocess
import sys

import numpy as np
import pytest
from corpora import text
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_train.errors import UserError
from language.settings import TokenizerConfig
from language.tokenizers import SEPARATOR, Tokenizer, expected_vocabulary, known_tokenizer, open_file, train_bpe


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([[text(i) for i in range(20)]], 320)


@settings(max_examples=50, deadline=None)
@given(written=st.text(max_size=60))
def test_any_text_comes_back_from_bytes_and_from_bpe(bpe, written):
    for tokenizer in (Tokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode(written)) == written


ODD = ["", "\n\n    \t\n", "a\r\nb", "\ufeffimport os", "日本語 🙂", "\x00\x7f", " " * 100]


@pytest.mark.parametrize("written", ODD)
def test_odd_texts_come_back(bpe, written):
    for tokenizer in (Tokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode(written)) == written


def test_a_document_that_spells_the_separator_does_not_produce_it(bpe):
    for tokenizer in (Tokenizer(), bpe):
        ids = tokenizer.encode(f"before {SEPARATOR} after")
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == f"before {SEPARATOR} after"
        assert tokenizer.decode([tokenizer.eos_id]) == SEPARATOR


def test_bytes_decode_around_separators_and_half_characters():
    tokenizer = Tokenizer()
    ids = [256, *b"ab", 256, 256, *"é".encode()[:1]]
    assert tokenizer.decode(ids) == f"{SEPARATOR}ab{SEPARATOR}{SEPARATOR}\ufffd"


def test_bpe_holds_every_byte_and_the_size_asked_for(bpe):
    assert bpe.vocab_size == 320 and bpe.eos_id == 0 and bpe.dtype == np.uint16
    assert len(bpe.encode(text(50))) < len(text(50).encode()) / 2


def test_a_saved_tokenizer_is_the_same_tokenizer(bpe, tmp_path):
    for tokenizer in (Tokenizer(), bpe):
        tokenizer.save(tmp_path)
        loaded = Tokenizer.load(tmp_path)
        assert loaded.sha256 == tokenizer.sha256 and loaded.eos_id == tokenizer.eos_id
        assert np.array_equal(loaded.encode(text(3) + SEPARATOR), tokenizer.encode(text(3) + SEPARATOR))


def test_training_in_another_process_gives_the_same_file(bpe):
    code = (
        "from corpora import text;"
        "from language.tokenizers import train_bpe;"
        "print(train_bpe([[text(i) for i in range(20)]], 320).sha256)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == bpe.sha256


def test_the_byte_tokenizer_does_not_import_the_tokenizers_package(tmp_path):
    Tokenizer().save(tmp_path)
    code = (
        "import sys; from pathlib import Path; from language.tokenizers import Tokenizer;"
        "Tokenizer.load(Path(sys.argv[1])).encode('x'); assert 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_users_tokenizer_json_keeps_its_own_separator(bpe, tmp_path):
    definition = json.loads(bpe.backend.to_str().replace(SEPARATOR, "</s>"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    tokenizer = open_file(TokenizerConfig(kind="file", path="tokenizer.json"), tmp_path)
    assert (tokenizer.separator, tokenizer.eos_id) == ("</s>", 0)
    assert tokenizer.decode(tokenizer.encode("x </s> y")) == "x </s> y"


@pytest.mark.parametrize(
    "content, settings, message",
    [
        ("{", {}, "cannot read .* as a tokenizer.json"),
        (None, {"separator": "<stop>"}, "has no token `<stop>`"),
    ],
)
def test_a_tokenizer_json_that_will_not_do_is_one_message(bpe, tmp_path, content, settings, message):
    (tmp_path / "t.json").write_text(content or bpe.backend.to_str())
    with pytest.raises(UserError, match=message):
        open_file(TokenizerConfig(kind="file", path="t.json", **settings), tmp_path)


def test_an_inherited_tokenizer_is_the_sources_and_a_plan_expects_its_entries():
    config, source = TokenizerConfig(kind="inherited", vocab=151_936), Tokenizer(separator="<end>")
    assert known_tokenizer(config, None, source) is source and expected_vocabulary(config) == 151_936
    with pytest.raises(UserError, match="does not name the model") as caught:
        known_tokenizer(config, None)
    assert caught.value.where == "model.from"
