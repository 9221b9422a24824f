"""Whether an export turns text into the same numbers as its run: ids, chat template, and the ids that end a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from aurora_train.errors import UserError
from aurora_train.facts import Facts
from aurora_train.interop.kept import TEMPLATE, TOKENIZER
from aurora_train.interop.source import OpenModel
from aurora_train.interop.templates import ChatTemplate
from aurora_train.interop.tokenizer_files import special_tokens

_CONVERSATIONS = tuple(
    [{"role": role, "content": f"Some words {number}."} for number, role in enumerate(roles)]
    for roles in (("user",), ("system", "user"), ("user", "assistant", "user"))
)


def _encoder(tokenizer: str) -> Callable[[str], list[int]]:
    """The ids of a text by a tokenizer.json, or by the byte tokenizer of a run."""
    import tokenizers

    if json.loads(tokenizer).get("kind") == "byte":
        return lambda text: list(text.encode())
    backend = tokenizers.Tokenizer.from_str(tokenizer)
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _ids(named) -> set[int]:
    """The ids of an `eos_token_id`, which may be one, a list or None."""
    return set(named if isinstance(named, list) else [named]) - {None}


def refuse_other_text(facts: Facts, source: OpenModel, texts: Sequence[str]) -> None:
    """UserError if an export cuts a text otherwise than its run, has another chat template or ends texts elsewhere."""
    where, ours, theirs = str(source.path), _encoder(facts[TOKENIZER].decode()), _encoder(source.tokenizer)
    other = next((text for text in texts if ours(text) != theirs(text)), None)
    if other is not None:
        raise UserError(f"the export cuts {other[:40]!r} into {theirs(other)[:8]}, the run into {ours(other)[:8]}",
                        where=where)  # fmt: skip
    template = facts[TEMPLATE].decode() if TEMPLATE in facts else None
    if template != source.chat_template:
        raise UserError("the chat template does not read back as it was written", where=where)
    ends = _ids(special_tokens(facts).ids["eos_token_id"])
    if ends != set(source.eos_ids):
        raise UserError(f"texts of the export end at the ids {sorted(source.eos_ids)}, those of the run at "
                        f"{sorted(ends)}", where=where)  # fmt: skip


def refuse_other_text_in_transformers(folder: Path, source: OpenModel, texts: Sequence[str], ends) -> None:
    """UserError if transformers' tokenizer, chat template or ends of texts in a folder are not those of our reader.

    `ends`: the `eos_token_id` of the model's generation config as transformers loaded it.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever its own code and the Rust library raise
        raise UserError(f"transformers cannot load the tokenizer: {error}", where=str(folder)) from error
    ours = _encoder(source.tokenizer)
    for text in texts:
        wanted, found = ours(text), tokenizer.encode(text, add_special_tokens=False)
        if wanted != found:
            raise UserError(f"transformers cuts {text[:40]!r} into {found[:8]}, we into {wanted[:8]}",
                            where=str(folder))  # fmt: skip
    if _ids(ends) != set(source.eos_ids):
        raise UserError(f"transformers ends texts at the ids {ends}, we at {list(source.eos_ids)}", where=str(folder))
    if source.chat_template is not None:
        _refuse_other_chat(folder, source, tokenizer)


def _refuse_other_chat(folder: Path, source: OpenModel, tokenizer) -> None:
    template = ChatTemplate(source.chat_template, source.tokenizer_config, datetime.now())
    for messages in _CONVERSATIONS:
        try:
            wanted = template.render(messages, add_generation_prompt=True).text
        except UserError:  # the template refuses such a conversation, as of a system's prompt
            continue
        found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if wanted != found:
            raise UserError(f"transformers writes a conversation as {found[:80]!r}, we as {wanted[:80]!r}",
                            where=str(folder))  # fmt: skip
