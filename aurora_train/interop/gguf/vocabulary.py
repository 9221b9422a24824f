"""A tokenizer.json as the metadata of a GGUF file: the inverse of `tokenizer`, and held to it on real texts."""

from __future__ import annotations

import json
import re
from typing import Any

from aurora_train.errors import UserError
from aurora_train.interop.gguf.tokenizer import SPLITS, Kind, tokenizer_of
from aurora_train.interop.source import OpenModel

_OTHER_ENDS = ("eot_token_id", "eom_token_id")  # where a file names ends of texts beside `eos_token_id`
_OTHER_TOKENIZER = "--format hf; or train a model with data.tokenizer.kind=bpe and data.tokenizer.split=gpt2"
_NEVER_MERGED = -1e9  # the score of a token that no merge makes
# Texts that tokenizers cut in different ways: numbers, runs of spaces, endings, scripts, marks.
_PROBES = (
    "Hello world, it's 1234567 o'clock; DON'T we'll", "def f(x):\n\n    return x  # café\t\r\n", "    lead, trail   ",
    "日本語 中文 한국어 Ελληνικά עברית", "e\u0301 \u00e9 ½ ① 🙂👩‍👧",
    "https://a.b/c?d=e&f=%20 <b>x</b>", "a\u00a0b\u200bc", "x" * 40,
)  # fmt: skip


def vocabulary_of(source: OpenModel, rows: int) -> dict[str, Any]:
    """The `tokenizer.` part of the metadata for an embedding of `rows` rows; rows without a token become `[PADn]`.

    Raises UserError for a source without a tokenizer, for one that llama.cpp has no form of, for more tokens than rows,
    and if the ids of a text would be others.
    """
    where = str(source.path)
    if source.tokenizer is None:
        raise UserError("there is no tokenizer, and llama.cpp refuses a model without one", where=where)
    definition = json.loads(source.tokenizer)
    model = definition.get("model") or {}
    if model.get("type") != "BPE":
        raise UserError(f"a tokenizer of the kind {model.get('type', 'byte')} cannot be written as GGUF", where=where,
                        why="BPE can", hint="--format hf")  # fmt: skip
    tokens, types = _tokens(definition, rows, where)
    form = _sentencepiece(definition, tokens) if model.get("byte_fallback") else _byte_level(definition, where)
    metadata = {"tokens": tokens, "token_type": types, **form, **_special(source, tokens)}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    if source.chat_template is not None:
        metadata["tokenizer.chat_template"] = source.chat_template
    _refuse_other_ids(source, metadata, [token["content"] for token in definition.get("added_tokens", [])])
    return metadata


def _tokens(definition: dict, rows: int, where: str) -> tuple[list[str], list[int]]:
    """(the token of each row of the embedding, its type)."""
    model, tokens = definition["model"], [f"[PAD{row}]" for row in range(rows)]
    types, added = [Kind.UNUSED] * rows, {token["id"]: token for token in definition.get("added_tokens", [])}
    known = {**model["vocab"], **{token["content"]: number for number, token in added.items()}}
    if len(known) > rows or max(known.values()) >= rows:
        raise UserError(f"the tokenizer has ids up to {max(known.values())}, but the embedding has {rows} rows",
                        where=where)  # fmt: skip
    for token, number in known.items():
        tokens[number], types[number] = token, Kind.NORMAL
        if number in added:
            types[number] = Kind.CONTROL if added[number]["special"] else Kind.USER_DEFINED
        elif model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[number] = Kind.BYTE
        if model.get("byte_fallback") and token == model.get("unk_token"):
            types[number] = Kind.UNKNOWN
    return tokens, types


def _byte_level(definition: dict, where: str) -> dict[str, Any]:
    cut = definition.get("pre_tokenizer") or {}
    steps = [_essence(step) for step in cut.get("pretokenizers", [cut])]
    normalizer = (definition.get("normalizer") or {}).get("type")
    whole = bool(definition["model"].get("ignore_merges"))
    if not definition["model"]["merges"]:
        raise UserError("the tokenizer has no merges, and llama.cpp refuses it", where=where, hint=_OTHER_TOKENIZER)
    for name, (splits, normalizer_there, whole_there) in SPLITS.items():
        if (steps, normalizer, whole) == ([_essence(step) for step in splits], normalizer_there, whole_there):
            merges = [one if isinstance(one, str) else " ".join(one) for one in definition["model"]["merges"]]
            return {"model": "gpt2", "pre": name, "merges": merges}
    raise UserError(
        "the tokenizer cuts texts by a rule that llama.cpp does not have", where=where,
        why=f"it has those named {', '.join(SPLITS)}; with another, the same text would get other ids",
        hint=_OTHER_TOKENIZER,
    )  # fmt: skip


def _essence(step: dict) -> dict:
    """A pre-tokenizer without what does not alter ids."""
    return {key: value for key, value in step.items() if key != "trim_offsets" and value is not False}


def _sentencepiece(definition: dict, tokens: list[str]) -> dict[str, Any]:
    """Scores under which the merges have the order that they have in the file."""
    made: dict[str, int] = {}
    for rank, merge in enumerate(definition["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made.setdefault(left + right, rank)
    scores = [float(-made[token]) if token in made else _NEVER_MERGED for token in tokens]
    normalizer = json.dumps(definition.get("normalizer"))
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": '"Prepend"' in normalizer}


def _special(source: OpenModel, tokens: list[str]) -> dict[str, Any]:
    """The ids of the tokens that begin and end texts, and whether a text begins with one of itself."""
    ids, found = {token: number for number, token in enumerate(tokens)}, {}
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        named = source.tokenizer_config.get(f"{ours}_token")
        named = named.get("content") if isinstance(named, dict) else named
        number = ids.get(named, source.config.get(f"{ours}_token_id"))
        if isinstance(number, int):
            found[f"{theirs}_token_id"] = number
    ends = list(source.eos_ids)
    found.setdefault("eos_token_id", ends[0] if ends else ids.get("<|endoftext|>", 0))
    others = [number for number in ends if number != found["eos_token_id"]]
    if len(others) > len(_OTHER_ENDS):
        raise UserError(f"texts end at {1 + len(others)} ids, and a GGUF file names at most {1 + len(_OTHER_ENDS)}",
                        where=f"{source.path}: eos_token_id", hint="--format hf")  # fmt: skip
    found |= dict(zip(_OTHER_ENDS, others, strict=False))
    return found | {"add_bos_token": begins_by_itself(source)}


def begins_by_itself(source: OpenModel) -> bool:
    """Whether the tokenizer begins every text with a token, so that a reader of the GGUF file must do so, too."""
    import tokenizers

    empty = tokenizers.Tokenizer.from_str(source.tokenizer).encode("").ids
    return bool(empty) or bool(source.tokenizer_config.get("add_bos_token"))


def _refuse_other_ids(source: OpenModel, metadata: dict, added: list[str]) -> None:
    """UserError if the tokenizer that a reader builds of the metadata cuts a text differently."""
    import tokenizers

    ours = tokenizers.Tokenizer.from_str(source.tokenizer)
    theirs = tokenizers.Tokenizer.from_str(tokenizer_of(metadata, str(source.path))[0])
    for text in [*_PROBES, *(f"a {token} b" for token in added)]:
        wanted, found = (one.encode(text, add_special_tokens=False).ids for one in (ours, theirs))
        if wanted != found:
            raise UserError(f"llama.cpp would cut {text[:30]!r} into other tokens", where=str(source.path),
                            why=f"{found[:12]} instead of {wanted[:12]}", hint="--format hf")  # fmt: skip
