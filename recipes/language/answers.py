"""What a conversation teaches: its ids, and which of them are the model's own words and the ends of its answers.

An answer is learned as the model has to write it: after the text that the template gives a model which is asked for
this answer (`Dialogue.text(..., asking=True)`), up to and with the first token that ends answers. So it holds what the
template renders of thoughts (an empty `<think></think>` too) and of tool calls. Where a text begins otherwise than with
that prompt, or the template has no words to ask with, the answer is replaced by a sentinel and found by it, and the
template's own words before it are not learned. Where the template writes no end, the row gets one and ends there.

Ids: the prompt is encoded alone, as it is for an answer to be generated, even where a token would join its last
character and the answer's first. Where a tokenizer cannot be cut there (it would add a blank), the whole is encoded,
and a token that holds any learned character is learned.

A row ends with an answer: nothing that follows is learned, or seen by what is. It serves earlier answers too if it
begins with exactly the ids that they have when they are the last. Otherwise (thoughts stripped from earlier turns,
tools moved to the last question) there are several rows, in each of which an answer is learned as it is asked for.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from aurora_train.errors import UserError
from language.chat import Dialogue, end_of_text
from language.conversations import Conversation
from language.tokenizers import Tokenizer
from language.turns import LEAVE_OUT

Text = list[tuple[str, bool]]  # pieces, each with whether it is learned
_BESIDE_CONTENT = ("tool_calls", "reasoning_content", "thinking")  # of an answer


class RefusedRow(UserError):
    """A conversation that its template refuses, or that holds what only a template may write.

    `reason`: the fault without the conversation's content, for counting.
    """

    def __init__(self, error: UserError, place: str):
        where = f"{place}, {error.where}" if error.where else place
        hint = "; ".join(filter(None, [error.hint, LEAVE_OUT]))
        super().__init__(error.what, where=where, why=error.why, hint=hint)
        self.reason = re.split(":| `", error.what)[0]


class Learned(NamedTuple):
    """One row: `ids` int32[n], the first of which no model predicts, `learned` bool[n], and the same as text.

    `unwritten`: what of the conversation the template leaves out, in words.
    """

    ids: np.ndarray
    learned: np.ndarray
    text: Text
    unwritten: frozenset[str] = frozenset()


def learn(conversation: Conversation, tokenizer: Tokenizer, facts: dict, dialogue: Dialogue | None) -> list[Learned]:
    """The rows of one conversation; [] if nothing of it is learned.

    Not learned are answers within `conversation.context`, and one marked `prefix: true`, which somebody else began.

    Args:
        tokenizer, facts: those of the run.
        dialogue: its template; None for a run without one, which takes conversations of `parts` alone.

    Raises RefusedRow if the template refuses the conversation, or a text of it holds a control token.
    """
    if conversation.messages is None:
        return _of_parts(conversation.parts, tokenizer, end_of_text(tokenizer, facts))
    if dialogue is None:
        raise UserError("the model has no chat template for messages", where=conversation.place,
                        hint="data.template=FILE names one")  # fmt: skip
    rows: list[_Row] = []
    try:
        dialogue.refuse_controls(conversation.messages, conversation.tools)
        for number, message in enumerate(conversation.messages):
            if message.get("role") == "assistant" and number >= conversation.context and not message.get("prefix"):
                row = _answer(dialogue, conversation.messages[: number + 1], conversation.tools, rows)
                rows = [earlier for earlier in rows if not row.takes(earlier)] + [row]
        if rows and conversation.tools and not _reads_tools(dialogue, conversation.messages, conversation.tools):
            rows[-1].unwritten |= {"the tools"}
    except UserError as error:
        raise RefusedRow(error, conversation.place) from error
    return [row.learned() for row in rows]


@dataclass(eq=False)
class _Row:
    """A conversation up to the end of its last answer.

    Attributes:
        end: the text of the token with which `text` ends, if `ids` are those of `text` encoded whole; else "". With
            it, the ids of every text that begins with this one begin with these.
        tokens, characters: the ranges [start, stop) of `ids` and `text` that are learned.
    """

    text: str
    ids: list[int]
    end: str
    tokens: list[tuple[int, int]] = field(default_factory=list)
    characters: list[tuple[int, int]] = field(default_factory=list)
    unwritten: frozenset[str] = frozenset()

    def takes(self, earlier: _Row) -> bool:
        """Learn the answers of an earlier row here, if this row begins with it."""
        begins = self.text.startswith(earlier.text) and self.ids[: len(earlier.ids)] == earlier.ids
        if begins:
            self.tokens, self.characters = earlier.tokens + self.tokens, earlier.characters + self.characters
            self.unwritten |= earlier.unwritten
        return begins

    def learned(self) -> Learned:
        learned, text, shown = np.zeros(len(self.ids), bool), [], 0
        for start, stop in self.tokens:
            learned[start:stop] = True
        for start, stop in self.characters:
            text += [(self.text[shown:start], False), (self.text[start:stop], True)]
            shown = stop
        return Learned(np.array(self.ids, np.int32), learned, [piece for piece in text if piece[0]], self.unwritten)


def _answer(dialogue: Dialogue, messages: Sequence[dict], tools: list | None, rows: list[_Row]) -> _Row:
    """The row in which the last of the messages is learned. `rows`: those of earlier answers."""
    tokenizer, (prompt, said, ended) = dialogue.tokenizer, _rendered(dialogue, messages, tools)
    _refuse_forgotten(messages, said.removesuffix(ended))
    text, written = prompt + said, [] if ended else [dialogue.end(messages[-1])]
    encoded, before = _encoded(dialogue, text, rows), _encoded(dialogue, prompt, rows)
    mark = ended or next(iter(dialogue.stops), "")
    rest = (lambda: dialogue.encoded(mark + said)[1:]) if mark else None
    ids, first = _joined(tokenizer, (before, encoded), (text, len(prompt)), rest, marked=True)
    row = _Row(text + "".join(map(tokenizer.token, written)), ids + written, ended if ids == encoded else "")
    row.tokens, row.characters = [(first, len(row.ids))], [(len(prompt), len(row.text))]
    row.unwritten = frozenset(_unwritten(messages, text))
    return row


def _rendered(dialogue: Dialogue, messages: Sequence[dict], tools: list | None) -> tuple[str, str, str]:
    """(the text before the last message's answer, the answer with its end, the end alone or "" if there is none)."""
    whole = dialogue.text(messages, tools)
    try:
        asked, plain = (dialogue.text(messages[:-1], tools, asking=asking) for asking in (True, False))
    except UserError:  # the template cannot ask, as for an answer that begins a conversation
        asked = plain = None
    around = functools.cache(lambda: _around(dialogue, messages, tools))
    if asked is not None and whole.startswith(asked) and not plain.startswith(asked):
        start = len(asked)
    else:
        start = _first_character(whole, asked, around()[0])
    found = dialogue.stop.search(whole, start)
    if found:
        said, end = whole[start : found.end()], found[0]
    else:
        stop = len(whole) - len(around()[1]) if whole.endswith(around()[1]) else len(whole)
        said, end = whole[start : max(start, stop)], ""
    # Some templates write a system prompt into the last question only, and only while it has no answer.
    lost = asked is not None and not whole.startswith(asked) and not whole.startswith(plain)
    return asked if lost else whole[:start], said, end


def _refuse_forgotten(messages: Sequence[dict], said: str) -> None:
    """Raise UserError if the template left out a call, or all, of the last message."""
    message, where = messages[-1], f"messages[{len(messages) - 1}]"
    for call in message.get("tool_calls") or ():
        name = (call.get("function") or call).get("name", "")
        if name not in said:
            raise UserError(f"the template does not write a call: {name}", where=where,
                            hint="use a template with tools")  # fmt: skip
    if message.get("content") and not said.strip():
        raise UserError("the template does not write this answer", where=where)


def _reads_tools(dialogue: Dialogue, messages: Sequence[dict], tools: list) -> bool:
    """Whether the template writes the conversation otherwise without the tools."""
    try:
        return dialogue.text(messages, tools) != dialogue.text(messages)
    except UserError:  # without tools it refuses a call
        return True


def _unwritten(messages: Sequence[dict], text: str) -> Iterator[str]:
    """What the template left out of the text, of the last message and of those since the answer before it.

    A message counts as written if its longest word is: templates trim, join, cut thoughts off and write JSON.
    """
    *before, last = messages
    new = itertools.takewhile(lambda message: message["role"] != "assistant", reversed(before))
    yield from (f"a {one['role']}'s message" for one in new if not _is_written(one.get("content"), text))
    if not _is_written(last.get("reasoning_content"), text):
        yield "an answer's thoughts"
    if last.get("tool_calls") and not _is_written(last.get("content"), text):
        yield "what an answer says beside a call"


def _is_written(value: object, text: str) -> bool:
    word = max(re.findall(r"\w+", value), key=len, default="") if isinstance(value, str) else ""
    return word in text or json.dumps(word)[1:-1] in text


def _around(dialogue: Dialogue, messages: Sequence[dict], tools: list | None) -> tuple[str, str]:
    """The text before and after the last message, which is replaced by a sentinel.

    Raises UserError if the template does not write the sentinel exactly once.
    """
    sentinel = secrets.token_hex(8)
    other = {name: value for name, value in messages[-1].items() if name not in _BESIDE_CONTENT}
    pieces = dialogue.text([*messages[:-1], {**other, "content": sentinel}], tools).split(sentinel)
    if len(pieces) != 2:
        raise UserError(
            "cannot tell which part of the text is the answer", where=f"messages[{len(messages) - 1}]",
            why=f"the template writes the content of an answer {len(pieces) - 1} times, not once",
        )  # fmt: skip
    return pieces[0], pieces[1]


def _first_character(whole: str, asked: str | None, before: str) -> int:
    """Where an answer begins in a text that does not begin with a prompt for it. `before`: the text before a sentinel.

    A blank before the answer is the answer's: the first token of a word begins with it.
    """
    other = before if asked is None or whole.startswith(before) else asked
    start = len(os.path.commonprefix([whole, other]))
    return len(whole[:start].rstrip(" "))


def _encoded(dialogue: Dialogue, text: str, rows: list[_Row]) -> list[int]:
    """The ids of a text. Where it begins with a row, only the rest is encoded: a control token cuts every text."""
    known = max((row for row in rows if row.end and text.startswith(row.text)), default=None, key=lambda r: len(r.ids))
    if known is None:
        return dialogue.encoded(text)
    return known.ids + dialogue.encoded(known.end + text[len(known.text) :])[1:]


def _joined(tokenizer: Tokenizer, encoded, cut, rest, marked: bool) -> tuple[list[int], int]:
    """The ids of a text that was cut in two, and the number of the first that belongs to its second part.

    Args:
        encoded: (ids of the first part, ids of the whole).
        cut: (the text, the character at which its second part begins).
        rest: makes the ids of the second part; None to take those of the whole.
        marked: whether control tokens are written out in the text.
    """
    (before, whole), (text, start) = encoded, cut
    if whole[: len(before)] == before:
        return whole, len(before)
    joined = before + rest() if rest else []
    if rest and tokenizer.decode(joined) == tokenizer.decode(whole):
        return joined, len(before)
    return whole, int(np.argmax(tokenizer.ends_in_text(text, marked) > start))


def _of_parts(parts: Text, tokenizer: Tokenizer, end: int) -> list[Learned]:
    """A text that begins as a generated one does, with a separator, and ends with `end` if its last part is learned."""
    if not any(taught for _, taught in parts):
        return []
    said, ids, learned = "", [], []
    for text, taught in parts:
        whole = tokenizer.encode(said + text).tolist()
        rest = lambda text=text: tokenizer.encode(text).tolist()  # noqa: E731
        ids, first = _joined(tokenizer, (ids, whole), (said + text, len(said)), rest, marked=False)
        learned, said = learned[:first] + [taught] * (len(ids) - first), said + text
    shown = [(tokenizer.token(tokenizer.eos_id), False), *parts]
    if parts[-1][1]:
        ids, learned, shown = [*ids, end], [*learned, True], [*shown, (tokenizer.token(end), True)]
    row = np.array([tokenizer.eos_id, *ids], np.int32), np.array([False, *learned], bool)
    return [Learned(*row, [piece for piece in shown if piece[0]])]
