"""Text to numbers and back. Every document begins with one separator, `<|endoftext|>`, which text cannot produce.

Both the byte tokenizer and the BPE trained here are lossless: `decode(encode(text)) == text` for any text. A user's own
tokenizer.json may not be; preparation measures that and reports it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from aurora_train.errors import UserError
from language.settings import TokenizerConfig, resolve

SEPARATOR = "<|endoftext|>"
BYTE_SEPARATOR_ID = 256
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"

# BPE does not merge across these pieces. GPT-4's pattern, except that a line break takes the indentation after it and
# the punctuation before it ("):\n        " can be one token), which suits code: 6 % more bytes per token on Python at
# 4096 entries.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|\s*[\r\n]+[ \t]*|[ \t]+(?!\S)|\s+"
)
_ANY_TEXT = "Aa zq 09 ,;\n\t\x00 \u00e9\u0142 \u4e2d\u6587 \U0001f642"  # characters that a vocabulary may lack
_KNOWN_SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<｜end▁of▁sentence｜>", "[SEP]")


def expected_vocabulary(config) -> int:
    """Entries of the vocabulary that `data.tokenizer` asks for, without reading any text. bpe may result in fewer."""
    known = None if config.kind == "inherited" else known_tokenizer(config, None)
    return config.vocab if known is None else known.vocab_size


def known_tokenizer(config, base: Path | None, inherited: Tokenizer | None = None) -> Tokenizer | None:
    """The tokenizer that `data.tokenizer` asks for; None if it must still be trained.

    `inherited`: that of the run from which a new one starts, for kind: auto and inherited. UserError if kind: inherited
    asks for it and there is none: a config may have the shape of a model that the user has yet to name.
    """
    if config.kind == "bpe":
        return None
    if config.kind == "inherited" and inherited is None:
        raise UserError(
            "the config has the shape of an open model, and does not name the model", where="model.from",
            why="its tokenizer is to be the model's, and adapters need its weights (data.tokenizer.kind: inherited)",
            hint="model.from=FOLDER, a GGUF file or a run, or model.from=hub:owner/name data.online=true",
        )  # fmt: skip
    if config.kind == "file":
        return open_file(config, base)
    return inherited if config.kind in ("auto", "inherited") and inherited is not None else Tokenizer()


class Tokenizer:
    """`backend` is a `tokenizers.Tokenizer`, or None for plain bytes.

    Attributes:
        vocab_size: one more than the largest id.
        eos_id: id of the separator between documents.
        sha256: hash of what decides the ids; part of a store's key.
    """

    def __init__(self, backend=None, separator: str = SEPARATOR):
        self.backend, self.separator = backend, separator
        if backend is None:
            self.kind, self.vocab_size, self.eos_id = "byte", 257, BYTE_SEPARATOR_ID
            self._definition = json.dumps({"kind": "byte", "separator": separator})
        else:
            # Without this, the characters "<|endoftext|>" inside a document would become the separator.
            backend.encode_special_tokens = True
            self.kind, self.eos_id = "tokenizers", backend.token_to_id(separator)
            self.vocab_size = max(backend.get_vocab().values()) + 1
            self._definition = backend.to_str()
        self.sha256 = hashlib.sha256(f"{self._definition}\n{separator}".encode()).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, without separators: `dtype`[n]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, on all cores. UserError if a user's tokenizer cannot encode one of them."""
        if self.backend is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        try:
            encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(
                "the tokenizer cannot encode every text", where="data.tokenizer.path", why=str(error),
                hint="give its model an unknown token that is in its vocabulary, or train a tokenizer here: kind: bpe",
            ) from error  # fmt: skip
        return [np.array(each.ids, self.dtype) for each in encoded]

    def encode_marked(self, text: str) -> np.ndarray:
        """Ids of a text in which control tokens are written out, as a chat template does: `dtype`[n].

        Elsewhere such text is encoded like any other, because a document must not produce a control token.
        """
        if self.backend is None:
            parts = [self.encode(part) for part in text.split(self.separator)]
            end = np.array([self.eos_id], self.dtype)
            return np.concatenate([part for each in parts for part in (end, each)][1:])
        return np.array(self._encoding(text, marked=True).ids, self.dtype)

    def ends_in_text(self, text: str, marked: bool) -> np.ndarray:
        """int64[n]: where each token of `encode_marked(text)`, else of `encode(text)`, ends, in characters of `text`.

        Not for plain bytes, of which none is shared by two characters.
        """
        return np.array([stop for _, stop in self._encoding(text, marked).offsets], np.int64)

    def token(self, number: int) -> str | None:
        """The text of a token as the vocabulary has it; None if there is no such id, or it is a byte."""
        if self.backend is None:
            return self.separator if number == self.eos_id else None
        return self.backend.id_to_token(number)

    def _encoding(self, text: str, marked: bool):
        """The library's encoding of a text in which control tokens are written out (`marked`), or of any text."""
        return (self._marking if marked else self.backend).encode(text, add_special_tokens=False)

    @functools.cached_property
    def _marking(self):
        """A copy of the backend that finds control tokens in a text: threads share a tokenizer, and a flag with it."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self._definition)

    def spelled(self, number: int) -> bytes:
        """The bytes that a token adds to a text, also where they are a part of a character; b"" for no such id."""
        if self.backend is None:
            return bytes([number]) if number < BYTE_SEPARATOR_ID else self.separator.encode()
        token = self.backend.id_to_token(number)
        if token is None or number in self.controls.values():
            return (token or "").encode()
        if '"ByteLevel"' in self._decoder:
            letters = _byte_letters()
            return bytes(letters[letter] for letter in token) if letters.keys() >= set(token) else token.encode()
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()

    @functools.cached_property
    def _decoder(self) -> str:
        return json.dumps(json.loads(self._definition)["decoder"])

    @functools.cached_property
    def controls(self) -> dict[str, int]:
        """Every control token with its id."""
        if self.backend is None:
            return {self.separator: self.eos_id}
        added = self.backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; the separator shows as `<|endoftext|>`, bytes that are not UTF-8 as U+FFFD."""
        ids = np.asarray(ids, np.int64)
        if self.backend is not None:
            return self.backend.decode(ids.tolist(), skip_special_tokens=False)
        parts = np.split(ids, np.flatnonzero(ids == self.eos_id))
        texts = (part[part != self.eos_id].astype(np.uint8).tobytes().decode(errors="replace") for part in parts)
        return self.separator.join(texts)

    def files(self) -> dict[str, bytes]:
        """Its complete definition by file name: `tokenizer.json` and `tokenizer_config.json` (the separator)."""
        return {FILE: self._definition.encode(), CONFIG: json.dumps({"eos_token": self.separator}).encode()}

    def facts(self) -> dict:
        """The facts of a recipe that uses it: its `files`, and `vocabulary`, the number of ids of a model."""
        return {**self.files(), "vocabulary": self.vocab_size}

    def save(self, folder: Path) -> None:
        """Write its `files` into `folder`."""
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read what `save` wrote."""
        return cls.of_files({name: (folder / name).read_bytes() for name in (FILE, CONFIG)})

    @classmethod
    def of_files(cls, files: dict[str, bytes]) -> Tokenizer:
        """The inverse of `files`. Needs the package `tokenizers` unless it is the byte tokenizer."""
        definition, separator = files[FILE].decode(), json.loads(files[CONFIG])["eos_token"]
        if json.loads(definition).get("kind") == "byte":
            return cls(separator=separator)
        import tokenizers

        return cls(tokenizers.Tokenizer.from_str(definition), separator)


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a vocabulary of bytes: GPT-2's, whose printable bytes are their own."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


def train_bpe(texts: Iterable[list[str]], vocab: int, split: str = "code") -> Tokenizer:
    """Train a byte-level BPE of `vocab` entries on batches of texts. The same texts give the same file.

    Id 0 is the separator and 1..256 are the bytes, so that any text can be encoded. A small corpus may give fewer
    entries than requested. `split`: the pieces between which it does not merge: those of `SPLIT` for "code", those of
    GPT-2 for "gpt2".
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == "gpt2")  # its regex is GPT-2's
    ours = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    backend.pre_tokenizer = by_bytes if split == "gpt2" else pre_tokenizers.Sequence([ours, by_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def open_file(config: TokenizerConfig, base: Path | None) -> Tokenizer:
    """The user's own tokenizer.json. UserError if it cannot be read or has no token to separate documents."""
    import tokenizers

    path = resolve(config.path, base)
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust library raises plain Exception
        what = f"cannot read {path} as a tokenizer.json"
        raise UserError(what, where="data.tokenizer.path", why=str(error)) from error
    wanted = (config.separator,) if config.separator else _KNOWN_SEPARATORS
    separator = next((token for token in wanted if backend.token_to_id(token) is not None), None)
    if separator is None:
        raise UserError(
            f"{path.name} has no token `{config.separator}`" if config.separator
            else f"{path.name} has no known token that ends a document",
            where="data.tokenizer.separator",
            why=f"looked for {', '.join(wanted)}",
            hint="name one of its special tokens as data.tokenizer.separator",
        )
    backend.no_truncation()
    backend.no_padding()
    return _without_separators(Tokenizer(backend, separator))


def _without_separators(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, or a copy in which text that spells the separator is not encoded as the separator.

    This corrects added tokens that are not special, which are matched in text. If the model itself makes the separator
    of text, `prepare` looks for it in every document. UserError for a tokenizer that cannot encode every text.
    """
    tokenizer.encode(_ANY_TEXT)
    if tokenizer.eos_id not in tokenizer.encode(f"a {tokenizer.separator} b"):
        return tokenizer
    import tokenizers

    tokenizer.backend.add_special_tokens([tokenizers.AddedToken(tokenizer.separator, special=True, normalized=False)])
    return Tokenizer(tokenizer.backend, tokenizer.separator)


_OVERLAP, _DECODED = 8, 64  # tokens that are decoded with those that follow, and the most that are decoded at once


class Continuation:
    """A model's continuation of a prompt as text: `start` holds the ids of the prompt, `add` takes the new ids.

    The prompt is a text, which begins a document, or the ids of what was said so far. The end of the prompt and new ids
    are decoded together, and the text after the prompt is returned, because a decoder may treat the first token of a
    text differently (Llama's strips its space).
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str | Sequence[int]):
        is_text = isinstance(prompt, str)
        ids = [int(i) for i in (tokenizer.encode(prompt) if is_text else prompt)]
        self.start = [tokenizer.eos_id, *ids] if is_text else ids
        self._tokenizer, self._ids = tokenizer, ids if is_text else ids[-_OVERLAP:]
        self._before, self._shown, self._done = tokenizer.decode(self._ids), 0, ""

    @property
    def text(self) -> str:
        """The whole continuation."""
        return self._done + self._fresh()

    @property
    def rest(self) -> str:
        """What `add` has not returned: an incomplete character."""
        return self._fresh()[self._shown :]

    def add(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; "" while the last character is incomplete."""
        self._ids += [int(i) for i in ids]
        fresh = self._fresh()
        if fresh.endswith("\ufffd"):
            return ""
        new, self._shown = fresh[self._shown :], len(fresh)
        if len(self._ids) > _DECODED:  # else a long text would be decoded again for each of its tokens
            self._done, self._shown, self._ids = self._done + fresh, 0, self._ids[-_OVERLAP:]
            self._before = self._tokenizer.decode(self._ids)
        return new

    def _fresh(self) -> str:
        whole = self._tokenizer.decode(self._ids)
        return whole[len(os.path.commonprefix([self._before, whole])) :]
