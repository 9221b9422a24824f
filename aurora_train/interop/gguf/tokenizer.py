"""The vocabulary of a GGUF file as a tokenizer.json, and back. Ids are equal to those of the model's own file.

Two kinds are read: byte-level BPE (`gpt2`, with merges and the name of a pre-tokenizer) and SentencePiece's BPE
(`llama`, with a score for each token, from which the merges follow). The others (WordPiece, Unigram, RWKV) are refused
by name, and so is a pre-tokenizer that is not in `SPLITS`: it would cut texts differently without anybody noticing.
"""

from __future__ import annotations

import json
from enum import IntEnum
from typing import Any

from aurora_train.errors import UserError


class Kind(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_OTHERS = {"bert": "WordPiece", "t5": "Unigram", "rwkv": "RWKV", "plamo2": "PLaMo 2"}

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%(end)s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%(end)s|"
    r"\p{N}%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> list[dict]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            _byte_level(False)]  # fmt: skip


_GPT2 = [_byte_level(True)]
_LLAMA3 = _split(f"{_ENDINGS}|{_WORDS % '{1,3}'}")
# `tokenizer.ggml.pre` -> (pre-tokenizers, normaliser, whether a word of the vocabulary is taken without merging).
SPLITS: dict[str, tuple[list[dict], str | None, bool]] = {
    "gpt-2": (_GPT2, None, False),
    "olmo": (_GPT2, None, False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, *_GPT2], None, False),
    "llama-bpe": (_LLAMA3, None, True),
    "dbrx": (_LLAMA3, None, False),
    "qwen2": (_split(f"{_ENDINGS}|{_WORDS % ''}"), "NFC", False),
    "gpt-4o": (_split(_CASED % {"end": f"{_ENDINGS}?", "digits": "{1,3}"}), None, False),
    "tekken": (_split(_CASED % {"end": "", "digits": ""}), None, True),
}
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "phi-2": "gpt-2",
         "smaug-bpe": "dbrx"}  # fmt: skip
_BOS_BY_DEFAULT = ("llama-bpe", "tekken")  # llama.cpp begins a text with <bos> unless the file says otherwise


def tokenizer_of(metadata: dict[str, Any], where: str) -> tuple[str, dict, list[int]]:
    """(tokenizer.json, tokenizer_config.json, ids that end a text) of a file's metadata.

    Raises UserError, placed at `where`, for a kind of tokenizer that cannot be read, a vocabulary whose lists differ in
    length, and a special token outside the vocabulary.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        named = f"{kind!r} ({_OTHERS[kind]})" if kind in _OTHERS else repr(kind)
        raise UserError(f"a tokenizer of the kind {named} cannot be read", where=where,
                        why="gpt2 (byte-level BPE) and llama (SentencePiece BPE) can",
                        hint="use the Hugging Face folder of the model, with its tokenizer.json")  # fmt: skip
    vocabulary = _Vocabulary(metadata, where)
    begins = bool(metadata.get("tokenizer.ggml.add_bos_token", _begins_by_default(metadata)))
    definition = vocabulary.byte_level() if kind == "gpt2" else vocabulary.sentencepiece()
    marks = vocabulary.marks()
    if begins and "bos_token" in marks:
        definition["post_processor"] = _begin_with(marks["bos_token"], metadata["tokenizer.ggml.bos_token_id"])
    text = json.dumps(definition, ensure_ascii=False)
    _refuse_other_ids(text, definition["added_tokens"], where)
    return text, {**marks, "add_bos_token": begins}, vocabulary.ends()


def pre_tokenizer_named(name: str | None, where: str) -> str:
    """The key of `SPLITS` for `tokenizer.ggml.pre`. UserError for one that is missing or unknown."""
    name = _SAME.get(name, name)
    if name not in SPLITS:
        raise UserError(
            f"the pre-tokenizer {name!r} is unknown" if name else "the metadata lacks tokenizer.ggml.pre", where=where,
            why="texts would be cut differently; known are " + ", ".join([*SPLITS, *_SAME]),
            hint="use the Hugging Face folder of the model, with its tokenizer.json",
        )  # fmt: skip
    return name


def _begins_by_default(metadata: dict) -> bool:
    pre = metadata.get("tokenizer.ggml.pre")
    return metadata["tokenizer.ggml.model"] == "llama" or _SAME.get(pre, pre) in _BOS_BY_DEFAULT


class _Vocabulary:
    """The lists of a file's metadata that make its tokenizer."""

    def __init__(self, metadata: dict, where: str):
        self.metadata, self.where = metadata, where
        self.tokens: list[str] = self._list("tokens")
        self.types: list[int] = self._list("token_type", [Kind.NORMAL] * len(self.tokens))
        for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind == Kind.UNUSED and token == f"[PAD{number}]":  # a row of the embedding that stands for no token
                self.types[number] = 0
        self.ids = {token: number for number, token in enumerate(self.tokens) if self.types[number]}
        if len(self.ids) != sum(map(bool, self.types)):
            twice = next(token for number, token in enumerate(self.tokens) if self.ids.get(token, number) != number)
            raise UserError(f"the token {twice!r} is in the vocabulary twice", where=where)

    def byte_level(self) -> dict:
        """tokenizer.json of a byte-level BPE."""
        splits, normalizer, whole = SPLITS[pre_tokenizer_named(self.metadata.get("tokenizer.ggml.pre"), self.where)]
        merges = [merge.split(" ") for merge in self._list("merges", length=None)]
        for merge in merges:
            if len(merge) != 2 or "".join(merge) not in self.ids:
                raise UserError(f"the merge {' '.join(merge)!r} does not make a token", where=self.where)
        model = {"type": "BPE", "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole}
        return {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": self._added(),
            "normalizer": normalizer and {"type": normalizer},
            "pre_tokenizer": splits[0] if len(splits) == 1 else {"type": "Sequence", "pretokenizers": splits},
            "post_processor": None, "decoder": _byte_level(True),
            "model": {**model, "vocab": self.ids, "merges": merges},
        }  # fmt: skip

    def sentencepiece(self) -> dict:
        """tokenizer.json of SentencePiece's BPE, whose merges follow from the scores."""
        if self.metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
            raise UserError("a tokenizer that removes white space cannot be read", where=self.where,
                            why="tokenizer.ggml.remove_extra_whitespaces is set")  # fmt: skip
        prefixed = self.metadata.get("tokenizer.ggml.add_space_prefix", True)
        unknown = self.tokens[self.types.index(Kind.UNKNOWN)] if Kind.UNKNOWN in self.types else None
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}]  # fmt: skip
        prepend, strip = {"type": "Prepend", "prepend": "▁"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        return {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": self._added(),
            "normalizer": {"type": "Sequence", "normalizers": [prepend, spaces]} if prefixed else spaces,
            "pre_tokenizer": None if prefixed else cut, "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [*back, strip] if prefixed else back},
            "model": {"type": "BPE", "unk_token": unknown, "fuse_unk": True, "byte_fallback": Kind.BYTE in self.types,
                      "ignore_merges": False, "vocab": self.ids, "merges": self._merges_by_score(prefixed)},
        }  # fmt: skip

    def _merges_by_score(self, prefixed: bool) -> list[list[str]]:
        """Every way to make a token of two others, the best score first.

        The order of the ways to make one token decides how runs of one character (spaces) are cut. In the published
        files of Llama 2 it is that of the ids, in those of Gemma, which has no prefix, the longest left half comes
        first.
        """
        scores, ids, merges = self._list("scores"), self.ids, []
        for token, number in ids.items():
            if self.types[number] in (Kind.CONTROL, Kind.UNKNOWN, Kind.BYTE):
                continue
            halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            known = sorted((ids[left], ids[right]) for left, right in halves if left in ids and right in ids)
            merges += [(scores[number], self.tokens[left], self.tokens[right]) for left, right in known]
        order = (lambda one: one[0]) if prefixed else (lambda one: (one[0], len(one[1]), len(one[2])))
        merges.sort(key=order, reverse=True)
        return [[left, right] for _, left, right in merges]

    def _added(self) -> list[dict]:
        """The tokens that are found in a text before it is cut: control tokens (special) and user-defined ones."""
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": number, "content": token, **plain, "special": kind != Kind.USER_DEFINED}
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN)
        ]  # fmt: skip

    def marks(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and others of tokenizer_config.json."""
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        found = {ours: self._special(theirs) for ours, theirs in names.items()}
        return {ours: self.tokens[number] for ours, number in found.items() if number is not None}

    def ends(self) -> list[int]:
        """The ids that end a text: the end of the text, of a turn, of a message."""
        ids = [self._special(name) for name in ("eos", "eot", "eom")]
        return list(dict.fromkeys(number for number in ids if number is not None))

    def _special(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        number = self.metadata.get(key)
        if number is not None and not 0 <= number < len(self.tokens):
            raise UserError(f"{key} is {number}, but there are {len(self.tokens)} tokens", where=self.where)
        return number

    def _list(self, name: str, default: list | None = None, length: int | None = -1) -> list:
        """A list of the metadata; as long as `tokens`, unless `length` is None."""
        key = f"tokenizer.ggml.{name}"
        found = self.metadata.get(key, default)
        if found is None:
            raise UserError(f"the metadata lacks {key}", where=self.where, why="there is no tokenizer without it")
        if name != "tokens" and length is not None and len(found) != len(self.tokens):
            raise UserError(f"{key} has {len(found)} entries, but there are {len(self.tokens)} tokens",
                            where=self.where)  # fmt: skip
        return list(found)


def _begin_with(token: str, number: int) -> dict:
    """A post-processor that begins every text with a token, for readers who ask for special tokens."""
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair,
            "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}}}  # fmt: skip


def _refuse_other_ids(definition: str, added: list[dict], where: str) -> None:
    """UserError if the library `tokenizers` cannot read the definition or numbers an added token differently."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the Rust library raises plain Exception
        raise UserError("the tokenizer cannot be built", where=where, why=str(error)) from error
    for token in added:
        if backend.token_to_id(token["content"]) != token["id"]:
            raise UserError(f"the token {token['content']!r} would get another id than {token['id']}", where=where)
