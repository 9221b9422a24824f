"""The texts of a language model for `aurora serve`: `aurora_train.serve.speaker.Speaker` by tokenizer and template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aurora_train.errors import UserError
from aurora_train.interop.kept import ORIGIN, TEMPLATE
from language.chat import Dialogue
from language.tokenizers import Continuation, Tokenizer

_CALL = "<tool_call>"  # how Qwen, Hermes and those after them begin a call


class TextSpeaker:
    """See `Speaker`.

    Args:
        tokenizer, facts: those of the run or source.
        template: the text of a chat template that replaces the model's own, if any.
    """

    def __init__(self, tokenizer: Tokenizer, facts: Mapping[str, Any], template: str | None = None):
        self._tokenizer, origin = tokenizer, facts.get(ORIGIN) or {}
        self.vocabulary, self.longest = facts["vocabulary"], origin.get("max_length")
        self.about = {"licence": origin.get("licence"), "base": origin.get("name")}
        source = template or facts.get(TEMPLATE, b"").decode()
        self.converses = bool(source)
        self._dialogue = Dialogue(tokenizer, facts, template) if self.converses else None
        self.calls_tools = _CALL in source and self._dialogue.presents_tools
        self.controls = frozenset(tokenizer.controls.values())
        self._ends = frozenset({tokenizer.eos_id, *origin.get("eos_ids", ())})

    def begun(self, text: str) -> list[int]:
        return Continuation(self._tokenizer, text).start

    def asked(self, messages: Sequence[Mapping[str, Any]], tools: list | None = None) -> list[int]:
        if self._dialogue is None:
            raise UserError("this model has no chat template", where="messages", why="it was trained to continue texts",
                            hint="POST /v1/completions, or --template FILE")  # fmt: skip
        return self._dialogue.ids(list(messages), tools)

    def ends(self, *, conversation: bool) -> frozenset[int]:
        return frozenset(self._dialogue.ends()) if conversation and self._dialogue else self._ends

    def writing(self, prompt: Sequence[int]) -> Continuation:
        return Continuation(self._tokenizer, prompt)

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def encoded(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).tolist()

    def spelled(self, number: int) -> bytes:
        return self._tokenizer.spelled(number)

