"""What the server needs to know of a language model besides its weights: how texts and conversations become ids, and
ids a text again. `Recipe.speaker` returns it; recipes/language/speaking.py has the one of our own recipes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol


class Writing(Protocol):
    """The text of one answer while it is written."""

    @property
    def rest(self) -> str:
        """What `add` has not returned: an incomplete character."""

    def add(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; "" while the last character is incomplete."""


class Speaker(Protocol):
    """The texts of a model. Its methods may be called from any thread.

    Attributes:
        vocabulary: the number of ids.
        longest: the most tokens of prompt and answer for which the model was made; None if it names none.
        about: plain JSON on the model's origin for `/v1/models`: its licence and its base.
        converses: whether it has a chat template.
        calls_tools: whether the template presents tools, and has calls written as `<tool_call>{...}</tool_call>`.
        controls: the ids of control tokens, which no text spells.
    """

    vocabulary: int
    longest: int | None
    about: Mapping[str, Any]
    converses: bool
    calls_tools: bool
    controls: frozenset[int]

    def begun(self, text: str) -> list[int]:
        """The ids of a text to be continued."""

    def asked(self, messages: Sequence[Mapping[str, Any]], tools: list | None = None) -> list[int]:
        """The ids of a conversation up to where the next answer begins. UserError if the template refuses it."""

    def ends(self, *, conversation: bool) -> frozenset[int]:
        """The ids that end an answer, or a text."""

    def writing(self, prompt: Sequence[int]) -> Writing:
        """The text that follows a prompt."""

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids that were given as ids."""

    def encoded(self, text: str) -> list[int]:
        """The ids of a text without anything that begins it."""

    def spelled(self, number: int) -> bytes:
        """The bytes that a token adds to a text."""
