"""The facts of a run that starts from a source: its tokenizer, chat template, special ids, licence and origin.

The names are those under which the language recipe keeps its own, so a run inherits them like those of any parent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aurora_train.errors import UserError
from aurora_train.facts import Facts
from aurora_train.interop import families, hub
from aurora_train.interop.placing import text_tensors
from aurora_train.interop.source import OpenModel

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, ORIGIN = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "origin",
)  # fmt: skip
# Of generation_config.json, what an export writes itself: the ids, and what says who wrote the file.
_OWN_GENERATION = ("eos_token_id", "bos_token_id", "pad_token_id", "_from_model_config", "transformers_version")
# Of tokenizer_config.json, what is no special token of its own but decides how a text begins, ends or is handed on.
_TOKENIZER_KEYS = ("add_bos_token", "add_eos_token", "add_prefix_space", "additional_special_tokens",
                   "extra_special_tokens", "model_input_names")  # fmt: skip
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")  # in vocabularies whose `eos_token` ends a turn of a chat


def facts_of(source: OpenModel, family: str, beside: Sequence[str] = ()) -> Facts:
    """The facts of a run with this source's weights. UserError for no tokenizer, or one that does not fit them.

    `beside`: the names of the source's tensors that the text model does not have.
    """
    config = families.text_config(source.config)
    vocabulary = families.vocabulary(source.config, str(source.path))
    facts: Facts = {"vocabulary": vocabulary}
    if source.tokenizer is None:
        raise _without_tokenizer(source)
    if not source.eos_ids:  # of the text part of a vision model, else none
        source = replace(source, config=config)
    _refuse_other_ids(config, source)
    facts |= _tokenizer_files(source, vocabulary)
    if source.chat_template is not None:
        facts[TEMPLATE] = source.chat_template.encode()
    facts[ORIGIN] = {
        "family": family, "name": hub.public_name(source.path), "licence": source.licence,
        "eos_ids": [int(i) for i in source.eos_ids], "bos_id": config.get("bos_token_id"),
        "pad_id": config.get("pad_token_id"), "dtype": (most := _dtype(source)),
        "dtypes": _other_dtypes(source, most),
        "max_length": config.get("max_position_embeddings") or config.get("n_positions"),
        "generation": {name: value for name, value in source.generation.items() if name not in _OWN_GENERATION},
        "tokenizer": {name: value for name, value in source.tokenizer_config.items() if name in _TOKENIZER_KEYS},
        "tokens": {name: _content(value) for name, value in source.tokenizer_config.items()
                   if name.endswith("_token") and _content(value) is not None},
    }  # fmt: skip
    if beside:
        facts[ORIGIN]["beside"] = [len(beside), beside[0]]
    return facts


def _without_tokenizer(source: OpenModel) -> UserError:
    """A run without its base's tokenizer would cut texts into bytes, whose ids mean nothing to the weights."""
    others = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
    lies = next((name for name in others if source.path.is_dir() and (source.path / name).is_file()), None)
    if source.kind == "gguf":
        return UserError("this file holds no tokenizer", where=str(source.path), hint="convert the model again with it")
    return UserError(
        f"there is no {TOKENIZER}", where=str(source.path),
        why=f"{lies} is here, which is not read" if lies else "the weights belong to the ids of one tokenizer",
        hint=f"write {TOKENIZER} beside it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )  # fmt: skip


def _refuse_other_ids(config: dict, source: OpenModel) -> None:
    for name in ("bos_token_id", "pad_token_id"):
        if config.get(name) is not None and not isinstance(config[name], int):
            raise UserError(f"`{name}` is {config[name]!r}, which is no id", where=str(source.path))


def _dtype(source: OpenModel) -> str | None:
    """The dtype that most tensors are stored in."""
    counts = Counter(tensor.dtype for tensor in source.tensors.values())
    return counts.most_common(1)[0][0] if counts else None


def _other_dtypes(source: OpenModel, most: str | None) -> dict[str, str]:
    """The dtype of each tensor that is stored otherwise than most, by its family's name for it."""
    tensors, _ = text_tensors(source, families.of(source.config, str(source.path)))
    return {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype not in (most, "float64")}


def _content(value: Any) -> str | None:
    """The text of a special token, which may be written as a mapping."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _tokenizer_files(source: OpenModel, vocabulary: int) -> Facts:
    """The tokenizer in the form in which the language recipe keeps one: as the library writes it, and its separator."""
    import tokenizers

    where = str(source.path / TOKENIZER if source.path.is_dir() else source.path)
    try:
        backend = tokenizers.Tokenizer.from_str(source.tokenizer)
    except Exception as error:  # the Rust library raises plain Exception
        raise UserError("not a readable tokenizer.json", where=where, why=str(error)) from error
    backend.no_truncation()
    backend.no_padding()
    added = json.loads(source.tokenizer).get("added_tokens") or []
    for token in added:
        given, meant = backend.token_to_id(token["content"]), token.get("id")
        if given != meant:
            raise UserError(
                f"the added token {token['content']!r} has the id {meant} in the file and {given} once loaded",
                where=where, why="the ids of added tokens have a gap, or one is taken twice",
            )  # fmt: skip
    size = max(backend.get_vocab().values(), default=-1) + 1
    if size > vocabulary:
        raise UserError(
            f"the tokenizer has {size:,} ids, and the embedding {vocabulary:,} rows", where=where,
            why="the tokenizer belongs to another model, or tokens were added without rows for them",
        )  # fmt: skip
    separator = _separator(source, backend, where)
    return {TOKENIZER: backend.to_str().encode(), TOKENIZER_CONFIG: json.dumps({"eos_token": separator}).encode()}


def _separator(source: OpenModel, backend, where: str) -> str:
    """The token between documents: the one that begins a text if the tokenizer adds one, else the one that ends it.

    `add_bos_token` of tokenizer_config.json, if it is there, wins over tokenizer.json, as in transformers.
    """
    named = {name: _content(value) for name, value in source.tokenizer_config.items() if name.endswith("_token")}
    adds = source.tokenizer_config.get("add_bos_token")
    begins = backend.encode("", add_special_tokens=True).tokens[:1]
    if adds is not None:
        begins = [named.get("bos_token") or next(iter(begins), None)] if adds else []
    wanted = [*begins, *_DOCUMENT_ENDS, named.get("eos_token"), named.get("bos_token")]
    wanted += [backend.id_to_token(i) for i in source.eos_ids]
    found = next((token for token in wanted if token and backend.token_to_id(token) is not None), None)
    if found is None:
        raise UserError("the tokenizer names no token that begins or ends a text", where=where,
                        hint="set `eos_token` in tokenizer_config.json")  # fmt: skip
    return found
