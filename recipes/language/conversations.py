"""Conversations, preferences and judged answers, read from tables in the formats in which they are usually kept.

Free of jax and numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from aurora_train.data.readers import LeftOut
from language.corpus import Corpus
from language.settings_tune import ConversationDataConfig


class Conversation(NamedTuple):
    """One row of the data. Exactly one of `messages` and `parts` is set.

    Messages are normalised: `role` is system, developer, user, assistant or tool; `content` is a str (absent beside
    tool calls alone); thinking is `reasoning_content`; a call's `arguments` are a dict.
    """

    place: str  # "line 12 of chats.jsonl" or "row 12 of chats.parquet", for messages to the user
    messages: list[dict] | None = None  # role, content, and what a template reads: tool_calls, name ...
    tools: list | None = None  # JSON schemas, or None
    parts: list[tuple[str, bool]] | None = None  # without template: (text, is it learned)
    context: int = 0  # of the messages, so many at the beginning are not learned, not even their answers


class Pair(NamedTuple):
    """Two answers to one prompt. Each answer is one assistant message, or several with a tool's between them."""

    place: str
    prompt: list[dict]
    chosen: list[dict]
    rejected: list[dict]
    tools: list | None = None

    def conversations(self) -> tuple[Conversation, Conversation]:
        """(prompt and chosen, prompt and rejected), of which only the answer is learned."""
        return tuple(
            Conversation(self.place, self.prompt + answer, self.tools, context=len(self.prompt))
            for answer in (self.chosen, self.rejected)
        )


class Judged(NamedTuple):
    """An answer to a prompt, and whether it is a good one."""

    place: str
    prompt: list[dict]
    answer: list[dict]
    label: bool
    tools: list | None = None

    @property
    def messages(self) -> list[dict]:
        """The prompt and the answer."""
        return self.prompt + self.answer

    def conversation(self) -> Conversation:
        """Prompt and answer, of which only the answer is learned."""
        return Conversation(self.place, self.messages, self.tools, context=len(self.prompt))


def sources(data: ConversationDataConfig, base: Path | None = None) -> dict[str, Corpus]:
    """The listed files of each source by its name in `data.mix`, sorted; of a single source by "".

    `Corpus.listing(cache, progress)` gives their hashes. Relative paths start at `base`, the config file's folder.
    Raises UserError for a source that is not there or holds no table.
    """
    raise NotImplementedError


def read(source: Corpus, data: ConversationDataConfig) -> Iterator[Conversation | LeftOut]:
    """The rows of one of the `sources`, in order; LeftOut is the reason why one is left out, to be counted.

    Raises UserError for a row that cannot be read or is no conversation, unless `data.damaged` is leave_out; for rows
    of several formats; and for a source without any conversation.
    """
    raise NotImplementedError


def read_pairs(source: Corpus, data: ConversationDataConfig) -> Iterator[Pair | LeftOut]:
    """As `read`, for rows of prompt, chosen and rejected."""
    raise NotImplementedError


def read_judged(source: Corpus, data: ConversationDataConfig) -> Iterator[Judged | LeftOut]:
    """As `read`, for rows of prompt, completion and label."""
    raise NotImplementedError


def check(data: ConversationDataConfig, base: Path | None = None, reader=read) -> None:
    """Raise the UserError that reading the first rows of each source would raise. `reader`: one of the three above."""
    raise NotImplementedError
