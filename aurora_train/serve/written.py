"""One answer while it is written: ids become text, which ends before a stop, and of which nothing is shown that might
still turn out to begin one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aurora_train.generate.requests import Token
from aurora_train.generate.stops import Stops
from aurora_train.serve.speaker import Speaker

CALL = "<tool_call>"


class Said(NamedTuple):
    """A drawn token, and where its text begins in the answer, in characters."""

    token: Token
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
        count: the tokens drawn.
        calls: the text from the first call on.
    """

    def __init__(self, speaker: Speaker, prompt: Sequence[int], stops: Sequence[str] = (), with_calls: bool = False):
        self._writing, self._stops = speaker.writing(prompt), Stops(stops)
        self._before_calls = Stops((CALL,) if with_calls else ())
        self.count, self.calls = 0, ""
        self._length, self._passed, self._shown = 0, "", 0  # length: of all text; passed: what no stop has held back
        self._pending: list[Said] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop has ended the answer."""
        return self._stops.found is not None

    def add(self, token: Token) -> Piece:
        """The piece that a token completes."""
        self.count += 1
        self._pending.append(Said(token, self._length))
        text = self._writing.add([token.id])
        self._length += len(text)
        return self._piece(self._stops.add(text))

    def close(self) -> Piece:
        """What was held back, at the end of an answer that no stop has ended."""
        if self.stopped:
            return Piece("", [])
        text = self._stops.add(self._writing.rest)
        piece = self._piece(text if self.stopped else text + self._stops.rest())
        if self.stopped or self.calls:
            return piece
        tokens, self._pending = self._pending, []
        return Piece(piece.text + self._before_calls.rest(), piece.tokens + tokens)

    def _piece(self, text: str) -> Piece:
        if self.calls:
            self.calls += text
            return Piece("", [])
        self._passed += text
        shown = self._before_calls.add(text)
        if self.stopped and self._before_calls.found is None:
            shown += self._before_calls.rest()
        self._shown += len(shown)
        if self._before_calls.found is not None:
            self.calls = self._passed[self._shown :]
        tokens = [one for one in self._pending if one.start < self._shown]
        self._pending = [one for one in self._pending if one.start >= self._shown]
        return Piece(shown, tokens)
