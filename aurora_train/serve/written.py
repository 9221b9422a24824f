"""One answer while it is written: ids become text, which ends before a stop, and of which nothing is shown that might
still turn out to begin one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from aurora_train.serve.speaker import Speaker

CALL = "<tool_call>"


class Said(NamedTuple):
    """A drawn token, a `generate.engine.Token`, and where its text begins in the answer, in characters."""

    token: Any
    start: int


class Piece(NamedTuple):
    """What can be shown of an answer: more of its text, and the tokens whose text begins in what is shown so far."""

    text: str
    tokens: list[Said]


class Written:
    """The answer to one prompt.

    Args:
        speaker, prompt: the model's texts, and the ids that are answered.
        stops: texts before which the answer ends.
        with_calls: whether calls of tools are kept apart from the text.

    Attributes:
        stopped: whether a stop has ended the answer.
        count: the tokens drawn.
        calls: the text from the first call on.
    """

    def __init__(self, speaker: Speaker, prompt: Sequence[int], stops: Sequence[str] = (), with_calls: bool = False):
        self._writing, self._stops = speaker.writing(prompt), tuple(stops)
        self._marks = (*self._stops, CALL) if with_calls else self._stops
        self._with_calls, self.stopped, self.count, self.calls = with_calls, False, 0, ""
        self._held, self._length, self._pending = "", 0, []  # length: of all text that has come, shown or held

    def add(self, token) -> Piece:
        """The piece that a token completes."""
        self.count += 1
        self._pending.append(Said(token, self._length))
        return self._shown(self._writing.add([token.id]))

    def close(self) -> Piece:
        """What was held back, at the end of an answer that no stop has ended."""
        if self.stopped:
            return Piece("", [])
        piece = self._shown(self._writing.rest)
        rest, self._held = self._held, ""
        tokens, self._pending = self._pending, []
        return piece if self.stopped else Piece(piece.text + rest, piece.tokens + tokens)

    def _shown(self, text: str) -> Piece:
        self._length += len(text)
        if self.calls:
            self.calls += text
            self._end_calls()
            return Piece("", [])
        self._held += text
        cut, mark = min(((at, mark) for mark in self._marks if (at := self._held.find(mark)) >= 0), default=(None, ""))
        if cut is None:
            cut = len(self._held) - _begun(self._held, self._marks)
        elif mark in self._stops:
            self.stopped = True
        else:
            self.calls = self._held[cut:]
        piece, after = self._held[:cut], self._held[cut:]
        shown = self._length - len(after)
        self._held = "" if self.calls or self.stopped else after
        tokens = [one for one in self._pending if one.start < shown]
        self._pending = [one for one in self._pending if one.start >= shown]
        if self.calls:
            self._end_calls()
        return Piece(piece, tokens)

    def _end_calls(self) -> None:
        found = [at for stop in self._stops if (at := self.calls.find(stop)) >= 0]
        if found:
            self.calls, self.stopped = self.calls[: min(found)], True


def _begun(text: str, marks: Sequence[str]) -> int:
    """The length of the longest end of a text with which one of the marks begins."""
    longest = max(map(len, marks), default=0) - 1
    return next((size for size in range(min(longest, len(text)), 0, -1)
                 if any(mark.startswith(text[-size:]) for mark in marks)), 0)  # fmt: skip
