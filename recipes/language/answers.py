"""What a conversation teaches: its ids, and which of them are the model's own words (bodies follow)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from language.chat import Dialogue
from language.conversations import Conversation
from language.tokenizers import Tokenizer


class Learned(NamedTuple):
    """One row: `ids` int32[n] up to the end of its last answer, `learned` bool[n], and the text in pieces with whether
    each is learned."""

    ids: np.ndarray
    learned: np.ndarray
    text: list[tuple[str, bool]]


def learn(conversation: Conversation, tokenizer: Tokenizer, facts: dict, dialogue: Dialogue | None) -> list[Learned]:
    """The rows of one conversation; [] if nothing of it is learned. More than one if the template renders an earlier
    answer otherwise than when it was last. `dialogue`: None for a run without a template, which takes `parts` alone.

    Raises UserError, placed at the conversation, if the template refuses it or a text holds a control token.
    """
    raise NotImplementedError
