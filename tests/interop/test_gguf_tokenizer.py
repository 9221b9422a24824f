"""Tokenizers through GGUF's metadata: the ids of a text stay what they are, and what would change them is refused."""

import dataclasses
import json

import pytest
import tokenizers
from tiny_sources import ROWS, bpe, source_of

from aurora_train.errors import UserError
from aurora_train.interop.gguf.tokenizer import SPLITS, Kind, tokenizer_of
from aurora_train.interop.gguf.vocabulary import vocabulary_of

TEXTS = (
    "def mean(values):\n    return sum(values) / len(values)  # 12345.678\n", "It's DON'T we'll  x   y\n\n\n  z",
    "naïve café Ångström \u0041\u030a 日本語 🙂", "", " ", "   lead", "trail   ",
    "<|im_start|>user\nHello<|im_end|>", "\t\ta\r\nb",
)  # fmt: skip


def ids(definition: str, text: str) -> list[int]:
    return tokenizers.Tokenizer.from_str(definition).encode(text, add_special_tokens=False).ids


def with_tokenizer(definition: str, **config):
    source = source_of("qwen3")
    marks = {**source.tokenizer_config, **config}
    return dataclasses.replace(source, tokenizer=definition, tokenizer_config=marks)


@pytest.mark.parametrize("pre", SPLITS)
def test_a_byte_level_bpe_keeps_its_ids_and_the_name_of_its_rule(pre):
    metadata = vocabulary_of(with_tokenizer(bpe(pre)), ROWS)
    expected = {"olmo": "gpt-2"}.get(pre, pre)  # the same rule under two names
    assert metadata["tokenizer.ggml.pre"] == expected
    back, marks, ends = tokenizer_of(metadata, "m.gguf")
    for text in TEXTS:
        assert ids(back, text) == ids(bpe(pre), text)
        assert tokenizers.Tokenizer.from_str(back).decode(ids(back, text), skip_special_tokens=False) == \
            tokenizers.Tokenizer.from_str(bpe(pre)).decode(ids(bpe(pre), text), skip_special_tokens=False)  # fmt: skip
    assert marks["bos_token"] == "<|im_start|>" and not marks["add_bos_token"] and ends == [2, 0]


def test_the_rules_cut_a_text_differently_so_that_a_wrong_one_would_be_seen():
    cuts = {}
    for name, (splits, _, _) in SPLITS.items():
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        definition = json.loads(backend.to_str())
        definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splits}
        cut = tokenizers.Tokenizer.from_str(json.dumps(definition)).pre_tokenizer
        cuts[name] = str(cut.pre_tokenize_str("It's WeLL-KNOWN: 12345 DON'T\n\n  x/\n"))
    same = {"olmo": "gpt-2", "dbrx": "llama-bpe"}  # which differ in more than how they cut
    assert len(set(cuts.values())) == len(SPLITS) - len(same)


def sentencepiece(prefixed: bool) -> dict:
    """Metadata of a small SentencePiece BPE: bytes, letters, and the pieces of a few words by falling score."""
    words = "▁the ▁them ▁me the em ▁▁ ▁▁▁▁ ▁a an ▁an ing ▁thing th ▁th in hi".split()
    letters = sorted(set("".join(words)) | set("bcdfjklopqrsuvwxyz.,'"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters, "<turn>"]
    types = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, *[Kind.BYTE] * 256, *[Kind.NORMAL] * (len(words) + len(letters)),
             Kind.USER_DEFINED]  # fmt: skip
    first = tokens.index(words[0])
    scores = [0.0] * first + [-float(number) for number in range(len(tokens) - first)]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": list(map(int, types)),
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": prefixed, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


def by_score(metadata: dict, text: str) -> list[int]:
    """SentencePiece's BPE: join the neighbours that make the piece of the best score, until none do."""
    tokens = metadata["tokenizer.ggml.tokens"]
    known = {token: number for number, token in enumerate(tokens) if not token.startswith("<")}
    text = ("▁" if metadata["tokenizer.ggml.add_space_prefix"] else "") + text.replace(" ", "▁")
    pieces = list(text)
    while True:
        joined = [(metadata["tokenizer.ggml.scores"][known[a + b]], -at)
                  for at, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in known]  # fmt: skip
        if not joined:
            break
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    found = []
    for piece in pieces:
        found += [known[piece]] if piece in known else [tokens.index(f"<0x{byte:02X}>") for byte in piece.encode()]
    return found


@pytest.mark.parametrize("prefixed", [True, False])
def test_merges_that_follow_from_scores_cut_as_sentencepiece_does(prefixed):
    metadata = sentencepiece(prefixed)
    definition, marks, _ = tokenizer_of(metadata, "m.gguf")
    texts = ["the thing", "them  the", "a    thing in an    inn", "hi, me. é 🙂", "x", "thing"]
    for text in texts:
        assert ids(definition, text) == by_score(metadata, text)
        backend = tokenizers.Tokenizer.from_str(definition)
        assert backend.decode(ids(definition, text), skip_special_tokens=False) == text
        assert backend.encode(text).ids[0] == 1  # it begins with <s>, as the file's default says
    assert marks["add_bos_token"] and len(set(map(tuple, (by_score(metadata, text) for text in texts)))) == len(texts)


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_sentencepiece_bpe_goes_out_with_scores_and_comes_back_as_it_was(prefixed):
    definition, marks, _ = tokenizer_of(sentencepiece(prefixed), "m.gguf")
    source = with_tokenizer(definition, **marks)
    written = vocabulary_of(source, 310)
    assert written["tokenizer.ggml.model"] == "llama" and written["tokenizer.ggml.add_bos_token"]
    back = json.loads(tokenizer_of(written, "m.gguf")[0])
    assert back["model"]["vocab"] == json.loads(definition)["model"]["vocab"]
    assert back["model"]["merges"] == json.loads(definition)["model"]["merges"]


def changed(**values) -> dict:
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    "change,says",
    [
        (changed(model="t5"), "Unigram"),
        (changed(model="bert"), "WordPiece"),
        (changed(model="rwkv"), "RWKV"),
        (changed(model=None), "None"),
        (changed(pre=None), "the metadata lacks tokenizer.ggml.pre"),
        (changed(pre="poro-chat"), "'poro-chat' is unknown"),
        (changed(tokens=None), "the metadata lacks tokenizer.ggml.tokens"),
        (changed(token_type=[1, 1]), "has 2 entries"),
        (changed(merges=["a b c"]), "the merge 'a b c' does not make a token"),
        (changed(merges=["a ☃"]), "does not make a token"),
        (changed(bos_token_id=5000), "bos_token_id is 5000"),
        (changed(tokens=["a"] * ROWS), "is in the vocabulary twice"),
    ],
)
def test_a_vocabulary_that_cannot_be_right_is_refused_by_name(change, says):
    metadata = vocabulary_of(source_of("qwen3"), ROWS)
    with pytest.raises(UserError) as caught:
        tokenizer_of(metadata | change, "m.gguf")
    assert says in str(caught.value) and str(caught.value).startswith("m.gguf: ")


def test_a_rule_that_llama_cpp_does_not_have_is_refused_on_the_way_out():
    definition = json.loads(bpe())
    definition["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(UserError, match="by a rule that llama.cpp does not have"):
        vocabulary_of(with_tokenizer(json.dumps(definition)), ROWS)


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(UserError, match="the embedding has 100 rows"):
        vocabulary_of(source_of("qwen3"), 100)


def test_an_added_token_that_takes_spaces_with_it_is_refused_because_ids_would_differ():
    definition = json.loads(bpe())
    definition["added_tokens"][2] |= {"lstrip": True}
    with pytest.raises(UserError, match="into other tokens"):
        vocabulary_of(with_tokenizer(json.dumps(definition)), ROWS)
