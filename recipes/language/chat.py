"""A conversation as ids, and the model's answer to it: the chat template, and which tokens end a turn."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import datetime

from aurora_train.errors import UserError
from aurora_train.facts import DATE
from aurora_train.generate.sampler import Generator
from aurora_train.interop.kept import ORIGIN, TEMPLATE
from aurora_train.interop.templates import ChatTemplate
from language.tokenizers import Continuation, Tokenizer


class Dialogue:
    """Conversations by one template.

    Args:
        tokenizer, facts: those of the run.
        template: the text of a template that replaces the run's own.

    Raises UserError if there is no template.
    """

    def __init__(self, tokenizer: Tokenizer, facts: dict, template: str | None = None):
        text = template or facts.get(TEMPLATE, b"").decode()
        if not text:
            raise UserError(
                "this model has no chat template", where="facts", why="it was trained to continue texts",
                hint="`aurora generate` continues a text; --template FILE names a template",
            )  # fmt: skip
        self._tokenizer, self._origin = tokenizer, facts.get(ORIGIN) or {}
        now = datetime.fromisoformat(facts[DATE]) if DATE in facts else datetime.now()
        marks = self._origin.get("tokens") or {"eos_token": tokenizer.separator}
        self._template = ChatTemplate(text, marks, now, "--template" if template else TEMPLATE)

    def ids(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation up to where the model's answer begins.

        Raises UserError for a message that writes out a control token: it would end the turn in which it stands.
        """
        for number, message in enumerate(messages):
            content = message.get("content")
            written = [token for token in self._tokenizer.controls if isinstance(content, str) and token in content]
            if written:
                raise UserError(f"the message holds the control token {written[0]}", where=f"messages[{number}]",
                                why="a template alone writes control tokens", hint="take it out")  # fmt: skip
        text = self._template.render(messages, add_generation_prompt=True).text
        return [int(i) for i in self._tokenizer.encode_marked(text)]

    def ends(self) -> set[int]:
        """The ids that end an answer: those that the model names, and what the template writes after an answer."""
        ends = {self._tokenizer.eos_id, *self._origin.get("eos_ids", ())}
        mark = secrets.token_hex(8)
        try:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
            said = self._template.render(turns).text
        except UserError:  # a template may refuse so short a conversation; the model's own ends remain
            return ends
        after = self._tokenizer.encode_marked(said.rpartition(mark)[2])
        return ends | {int(i) for i in after[:1] if int(i) in self._tokenizer.controls.values()}

    def answer(self, model, messages: list[dict], options: dict, on_text: Callable[[str], None]) -> str:
        """The model's answer; `on_text` is called with each new piece of it.

        Raises UserError if the conversation does not fit into the length that the model was made for.
        """
        written = Continuation(self._tokenizer, self.ids(messages))
        room = (self._origin.get("max_length") or len(written.start) + options["max_tokens"]) - len(written.start)
        if room < 1:
            raise UserError(
                f"the conversation has {len(written.start)} tokens, and the model holds {self._origin['max_length']}",
                where="messages", hint="begin a new one (/reset), or shorten it",
            )  # fmt: skip
        Generator(model, self.ends()).generate(
            written.start, min(options["max_tokens"], room), options["temperature"], options["top_k"],
            options["top_p"], options["seed"], lambda token: on_text(written.add([token])),
        )
        return written.text
