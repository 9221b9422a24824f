"""A run's tokenizer in the form in which other programs read it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from aurora_train.errors import UserError
from aurora_train.facts import Facts
from aurora_train.interop.kept import ORIGIN, TOKENIZER, TOKENIZER_CONFIG


class SpecialTokens(NamedTuple):
    """`ids`: `eos_token_id` (one or a list), `bos_token_id`, `pad_token_id`; `texts`: `eos_token`, `bos_token`, ..."""

    ids: dict[str, Any]
    texts: dict[str, str]


def tokenizer_json(facts: Facts) -> str:
    """The content of tokenizer.json. The byte tokenizer becomes a BPE of 256 bytes without merges: the same ids."""
    if TOKENIZER not in facts:
        raise UserError("this run keeps no tokenizer", where="facts")
    text = facts[TOKENIZER].decode()
    return text if json.loads(text).get("kind") != "byte" else _bytes(_separator(facts))


def _separator(facts: Facts) -> str:
    return json.loads(facts[TOKENIZER_CONFIG])["eos_token"]


def _bytes(separator: str) -> str:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    # The printable stand-ins of GPT-2: bytes that are printable stand for themselves, the others from U+0100 on.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + at) for at, byte in enumerate(hidden)}
    backend = tokenizers.Tokenizer(models.BPE({letter: byte for byte, letter in letters.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(separator, special=True, normalized=False)])
    return backend.to_str()


def special_tokens(facts: Facts) -> SpecialTokens:
    """The special tokens of a run: those of the model it started from, else its separator, which ends a text."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer_json(facts))
    separator, origin = _separator(facts), facts.get(ORIGIN) or {}
    texts = dict(origin.get("tokens") or {"eos_token": separator})
    ends = origin.get("eos_ids") or [backend.token_to_id(texts.get("eos_token", separator))]
    ids = {
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "bos_token_id": origin["bos_id"] if origin else backend.token_to_id(separator),
        "pad_token_id": origin.get("pad_id"),
    }
    return SpecialTokens(ids, texts)
