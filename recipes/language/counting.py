"""Counting tokens as a baseline of a language model: what remains for a network to know.

Interpolated absolute discounting (Ney, Essen and Kneser 1994) over tokens, twice. First with counts of the training
text, of contexts of 0 to 3 tokens. Then, on top of that, with counts of the document so far, of contexts of 1, 2, 3, 4
and 6 tokens (a cache, Kuhn and De Mori 1990). Everything is exact: contexts are numbered by sorting, as in `matches`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from language.matches import numbered, place_in_group, sorted_pairs
from language.ngram import spread

TRAINED, OWN = 4, (1, 2, 3, 4, 6)  # number of contexts of the training text, from 0 tokens; those of the document
DISCOUNT = 0.75  # of 0.5 and 0.75, the better on the validation split of the quickstart (1.285 and 1.182 bits per byte)
MOST_TRAINED = 1 << 24  # tokens


def bits_per_document(trained: Sequence[np.ndarray], documents: Sequence[np.ndarray], vocabulary: int) -> np.ndarray:
    """-log2 of the probability of all tokens of each document but its first: float64[documents].

    Args:
        trained, documents: int[tokens] arrays that begin and end with the separator, as in `store.Document`.
        vocabulary: the number of tokens that there are.
    """
    known, scored = _Stream(spread(trained, MOST_TRAINED)), _Stream(documents)
    probability = np.full(len(scored.tokens), 1 / vocabulary)
    _add_trained(probability, known, scored)
    _add_own(probability, scored)
    return np.bincount(scored.document, -np.log2(probability), len(documents))


class _Stream:
    """Documents in a row: for each token but the last of each, its document, its place there and the next token."""

    def __init__(self, documents: Sequence[np.ndarray]):
        lengths = np.array([len(one) - 1 for one in documents], np.int64)
        self.tokens, self.following = (
            np.concatenate([np.zeros(0, np.int64), *(np.asarray(one[part], np.int64) for one in documents)])
            for part in (slice(-1), slice(1, None))
        )
        self.document = np.repeat(np.arange(len(documents)), lengths)
        self.within = np.arange(len(self.tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _add_trained(probability: np.ndarray, known: _Stream, scored: _Stream) -> None:
    tokens, following, within = (
        np.concatenate([getattr(one, name) for one in (known, scored)]) for name in ("tokens", "following", "within")
    )
    counts = np.arange(len(tokens)) < len(known.tokens)  # else it is scored
    number = np.zeros(len(tokens), np.int64)
    for length in range(TRAINED):
        whole = within >= length - 1
        if length:
            number, *_ = numbered(number, min(length - 1, 1), tokens, whole)
        here = np.flatnonzero(whole)
        order, fresh = sorted_pairs(number[here], following[here])
        place = here[order]
        pairs, contexts = np.flatnonzero(fresh), np.flatnonzero(np.diff(number[place], prepend=-1))
        of_pair = np.add.reduceat(counts[place], pairs, dtype=np.int64)
        of_context = np.add.reduceat(counts[place], contexts, dtype=np.int64)
        distinct = np.add.reduceat(of_pair > 0, np.searchsorted(pairs, contexts), dtype=np.int64)
        asked = ~counts[place]
        pair = (np.cumsum(fresh) - 1)[asked]
        context = np.searchsorted(contexts, np.flatnonzero(asked), side="right") - 1
        _mix(probability, place[asked] - len(known.tokens), of_pair[pair], of_context[context], distinct[context])


def _add_own(probability: np.ndarray, scored: _Stream) -> None:
    number, known = scored.document, 0
    for length in OWN:
        whole, apart = scored.within >= length - 1, length - known if known else 0
        number, places, fresh = numbered(number, apart, number if known else scored.tokens, whole)
        known, here = length, np.flatnonzero(whole)
        order, other = sorted_pairs(number[here], scored.following[here])
        earlier, first = np.zeros(len(number), np.int64), np.zeros(len(number), bool)
        earlier[here[order]], first[here[order]] = place_in_group(other), other
        before = np.cumsum(first[places]) - first[places]
        distinct = before - before[np.flatnonzero(fresh)][np.cumsum(fresh) - 1]
        _mix(probability, places, earlier[places], place_in_group(fresh), distinct)


def _mix(probability, places, of_pair, of_context, distinct) -> None:
    """Lay counts over the probabilities of `places`; where a context was not seen, they stay."""
    seen = np.maximum(of_context, 1)
    share, left = np.maximum(of_pair - DISCOUNT, 0) / seen, DISCOUNT * distinct / seen
    mixed = share + left * probability[places]
    probability[places] = np.where(of_context > 0, mixed, probability[places])
