"""A conversation as text and ids, and the model's answer to it: the chat template, and which tokens end a turn."""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from aurora_train.errors import UserError
from aurora_train.facts import DATE
from aurora_train.interop.kept import ORIGIN, TEMPLATE, beginning
from aurora_train.interop.templates import ChatTemplate
from language.tokenizers import Continuation, Tokenizer


def end_of_text(tokenizer: Tokenizer, facts: dict) -> int:
    """The id that a model of these facts writes when it has said all: the first that its source names."""
    named = (facts.get(ORIGIN) or {}).get("eos_ids")
    return int(named[0]) if named else tokenizer.eos_id


def read_template(path: Path) -> bytes:
    """The template in a user's file. UserError if it cannot be read, is empty, or is not Jinja."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}", where="data.template", why=str(error),
                        hint="a chat_template.jinja in UTF-8; that of a run is kept as RUN/facts/chat_template.jinja"
                        ) from error  # fmt: skip
    if not text.strip():
        raise UserError(f"{path} is empty", where="data.template", hint="a chat_template.jinja in UTF-8")
    ChatTemplate(text, {}, datetime.now(), str(path))
    return text.encode()


def decisive(facts: dict) -> dict:
    """What decides how a conversation is encoded, besides the tokenizer: its template, with the date if that tells it,
    and the tokens that begin and end a text."""
    template = facts.get(TEMPLATE, b"").decode()
    origin = facts.get(ORIGIN) or {}
    return {
        "template": template, "date": facts.get(DATE) if "strftime_now" in template else None,
        **{name: origin.get(name) for name in ("tokens", "eos_ids", "bos_id", "tokenizer")},
    }  # fmt: skip


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
        self.tokenizer, self._facts, self._origin = tokenizer, facts, facts.get(ORIGIN) or {}
        now = datetime.fromisoformat(facts[DATE]) if DATE in facts else datetime.now()
        marks = self._origin.get("tokens") or {"eos_token": tokenizer.separator}
        self._template = ChatTemplate(text, marks, now, "--template" if template else TEMPLATE)
        adds = (self._origin.get("tokenizer") or {}).get("add_bos_token")
        self._begins = beginning(tokenizer.backend, marks.get("bos_token"), adds) or ""

    def text(self, messages: Sequence[Mapping], tools: list | None = None, *, asking: bool = False) -> str:
        """The text of a conversation; `asking` ends it where the model's answer begins.

        If the base's tokenizer begins every text with a token and the template does not write it, it is put there.
        Raises UserError if the template refuses the conversation.
        """
        text = self._template.render(messages, add_generation_prompt=asking, tools=tools).text
        return text if text.lstrip().startswith(self._begins) else self._begins + text

    @property
    def presents_tools(self) -> bool:
        """Whether the template tells the model of tools."""
        return self._template.reads("tools")

    def ids(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """The ids of a conversation up to where the model's answer begins.

        Raises UserError as `text` and `refuse_controls` do.
        """
        self.refuse_controls(messages, tools)
        return self.encoded(self.text(messages, tools, asking=True))

    def encoded(self, text: str) -> list[int]:
        """The ids of a rendered text."""
        return self.tokenizer.encode_marked(text).tolist()

    def refuse_controls(self, messages: Sequence[Mapping], tools: list | None = None) -> None:
        """Raise UserError if a message or a tool writes out a control token: it would end the turn in which it stands.

        Looked at are all texts of a message: its content, what it thought, and its calls.
        """
        named = [(f"messages[{number}]", "message", message) for number, message in enumerate(messages)]
        for where, what, holder in [*named, ("tools", "description", tools)]:
            for text in _texts(holder):
                if any(begun in text for begun in self._begun):
                    written = next((token for token in self._controls if token in text), None)
                    if written is not None:
                        raise UserError(f"the {what} holds the control token `{written}`", where=where,
                                        why="a template alone writes control tokens", hint="take it out")  # fmt: skip

    @functools.cached_property
    def _controls(self) -> list[str]:
        """Control tokens, and those that end an answer even if the tokenizer does not call them so."""
        return [*self.tokenizer.controls, *self.stops]

    @functools.cached_property
    def _begun(self) -> set[str]:
        """How control tokens begin: a text without any of these few holds none."""
        return {token[:2] for token in self._controls}

    def ends(self) -> set[int]:
        """The ids that end an answer: those that the model names, and what the template writes after an answer."""
        return {self.tokenizer.eos_id, *self._origin.get("eos_ids", ()), *self._after_an_answer()}

    def end(self, answer: Mapping) -> int:
        """The id that ends an answer after which the template writes none: its own before a later turn, a tool's if the
        answer calls one and else the user's, if it is one that ends answers; else the model's."""
        return self._ends_before["tool" if answer.get("tool_calls") else "user"]

    @functools.cached_property
    def _ends_before(self) -> dict[str, int]:
        """`end` by the role of the later turn."""
        found, ends = {}, end_of_text(self.tokenizer, self._facts)
        for role in ("user", "tool"):
            between = [i for i in self._after_an_answer({"role": role, "content": "a"}) if i in self.ends()]
            found[role] = ends = between[0] if between else ends
        return found

    def _after_an_answer(self, *later: dict) -> list[int]:
        """The control token that follows an answer in the template's text, as a list; [] if none does."""
        mark = secrets.token_hex(8)
        try:
            said = self.text([{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}, *later])
        except UserError:  # a template may refuse so short a conversation; the model's own ends remain
            return []
        after = self.encoded(said.rpartition(mark)[2])
        return [i for i in after[:1] if i in self.tokenizer.controls.values()]

    @functools.cached_property
    def stops(self) -> dict[str, int]:
        """The tokens of `ends` by their text."""
        texts = {self.tokenizer.token(number): number for number in self.ends()}
        return {text: number for text, number in texts.items() if text and self.encoded(text) == [number]}

    @functools.cached_property
    def stop(self) -> re.Pattern:
        """Finds the first token of `ends` in a rendered text."""
        return re.compile("|".join(map(re.escape, sorted(self.stops, key=len, reverse=True))) or r"(?!)")

    def answer(self, model, messages: list[dict], options: dict, on_text: Callable[[str], None]) -> str:
        """The model's answer; `on_text` is called with each new piece of it.

        Raises UserError if the conversation does not fit into the length that the model was made for.
        """
        from aurora_train.generate.sampler import Generator

        written = Continuation(self.tokenizer, self.ids(messages))
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


def _texts(value) -> Iterator[str]:
    """Every text within a plain JSON value, names of keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
