"""Exact match: what a model writes in answer to held-out conversations, compared with their own answers.

The model continues each conversation up to its last answer, taking the likeliest token each time. A match is the same
text, once both are in Unicode's composed form (NFC) with every run of white space as one space and none at the ends;
upper and lower case differ. An answer that does not end where it should is no match.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection

import numpy as np

from language.pieces import Pieces

LONGER = 4  # tokens beyond the reference's: the same text may be other tokens, and a match has to end


def normalised(text: str) -> str:
    """A text as it is compared."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def whole(store: Pieces, pieces: np.ndarray, room: int, ends: Collection[int]) -> np.ndarray:
    """Of some pieces, those whose last answer was not cut off where a row of `room` tokens ends, before its own end."""
    end = store.offsets[pieces + 1]
    is_short = end - store.offsets[pieces] <= room
    return pieces[is_short | np.isin(store.array("tokens.bin")[end - 1], list(ends))]


def answers(store: Pieces, pieces: np.ndarray, generator, batch: int, progress: Callable) -> dict[str, np.ndarray]:
    """What is written in answer to each piece's conversation up to its last answer.

    Args:
        pieces: int64[N], numbers in the store.
        generator: a `Generator`, whose ends are those of an answer.
        batch: conversations at a time, those of about the same length together. A batch that is not full is filled up
            with its last one, so that few shapes are compiled.

    Returns arrays [N]: `piece`, `exact` float64 (1 or 0), and the texts `reference` and `written`.
    """
    starts = np.array([_last_answer(store.learned(piece)) for piece in pieces])
    order = np.argsort(starts, kind="stable")
    reference = [_text(store, store.ids(piece)[start:]) for piece, start in zip(pieces, starts, strict=True)]
    lengths = np.diff(store.offsets)[pieces] - starts
    written, ended = [""] * len(pieces), np.zeros(len(pieces), bool)
    for first in range(0, len(pieces), batch):
        progress(first, len(pieces), "writing answers")
        rows = order[np.minimum(np.arange(first, first + batch), len(pieces) - 1)]
        prompts = [store.ids(pieces[row])[: starts[row]].tolist() for row in rows]
        prompts, most = generator.fitted(prompts, int(lengths[rows].max()) + LONGER)
        for row, ids in zip(rows, generator.generate_batch(prompts, most, temperature=0), strict=True):
            written[row], ended[row] = _text(store, ids), len(ids) < most
    progress(len(pieces), len(pieces), "writing answers")
    same = [normalised(a) == normalised(b) for a, b in zip(reference, written, strict=True)]
    return {
        "piece": np.asarray(pieces), "exact": (ended & np.array(same, bool)).astype(np.float64),
        "reference": np.array(reference, np.str_), "written": np.array(written, np.str_),
    }  # fmt: skip


def _last_answer(learned: np.ndarray) -> int:
    """Where the last stretch of learned tokens begins; a piece ends with it."""
    return int(np.flatnonzero(np.diff(learned, prepend=False))[-1])


def _text(store: Pieces, ids) -> str:
    """The text of an answer's ids without control tokens."""
    controls = set(store.tokenizer.controls.values())
    return store.tokenizer.decode([int(i) for i in ids if int(i) not in controls])
