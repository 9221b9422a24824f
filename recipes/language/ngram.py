"""A byte n-gram model as baseline for a neural one: interpolated modified Kneser-Ney, in numpy.

Every byte is predicted from the `order - 1` bytes before it; NUL bytes precede a document's first byte as context and
are never predicted. A table is a sorted array of integer keys, 48 bits of hashed context above 8 bits of predicted
byte, so that everything that follows one context is one slice, located by `searchsorted`. Contexts whose hashes collide
are counted as one (among 10 million contexts, less than one pair is expected), and probabilities still add up to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

ORDER = 12
MAX_TRAINING_BYTES = 32 << 20
_LOWEST_BYTE, _TWO_LOWEST_BYTES = np.uint64(0xFF), np.uint64(0xFFFF)
# Used if a corpus is too small or too uniform to estimate them: lmplz's fallback (Heafield et al. 2013, KenLM).
_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class _Table:
    """The n-grams of one order: sorted uint64 keys, their counts, and the discounts of counts 1, 2 and 3 or more."""

    keys: np.ndarray
    counts: np.ndarray
    discounts: np.ndarray

    @classmethod
    def count(cls, stream: _Stream, contexts: np.ndarray, length: int, longest: bool) -> _Table:
        """Count the n-grams of `length` bytes; `contexts` are the hashes of their first `length - 1`.

        Only the longest are counted as often as they occur. A shorter one is used when the longer was not seen, so its
        count is the number of different bytes that precede it (Kneser and Ney 1995).
        """
        keys = contexts & ~_TWO_LOWEST_BYTES
        keys += stream.bytes.astype(np.uint16) << 8
        if not longest:
            keys[length:] |= stream.bytes[:-length]
        keys[~stream.predicted] = np.iinfo(np.uint64).max
        keys.sort()
        keys = keys[: stream.num_predicted]
        if not longest:
            keys = keys[_run_starts(keys)]
        keys = keys >> np.uint64(8)
        starts = np.flatnonzero(_run_starts(keys))
        counts = np.diff(starts, append=len(keys))
        counts = counts.astype(np.min_scalar_type(counts.max(initial=0)))
        return cls(keys[starts], counts, _discounts(counts))

    def interpolation(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(discounted share of the byte, weight left to the shorter context), float64 each, of sorted uint64 `keys`.

        Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", equation 26:
        p(w | h) = (c(hw) - D(c(hw))) / c(h) + (D1 N1(h) + D2 N2(h) + D3 N3+(h)) / c(h) * p(w | shorter h).
        """
        first = np.searchsorted(self.keys, keys & ~_LOWEST_BYTE)
        after = np.searchsorted(self.keys, keys | _LOWEST_BYTE, side="right")
        count = _sums(self.counts, np.searchsorted(self.keys, keys), np.searchsorted(self.keys, keys, side="right"))
        total = _sums(self.counts, first, after)
        discount_of = np.concatenate([[0.0], self.discounts])
        left = sum(discount_of[n] * _sums(np.minimum(self.counts, 3) == n, first, after) for n in (1, 2, 3))
        seen = np.maximum(total, 1)
        share = (count - discount_of[np.minimum(count, 3)]) / seen
        return share, np.where(total > 0, left / seen, 1.0)


class NGram:
    """A fitted model. `order` is the length of its longest n-grams, `trained_bytes` the size of its training text."""

    def __init__(self, order: int, trained_bytes: int, tables: list[_Table]):
        self.order, self.trained_bytes, self._tables = order, trained_bytes, tables

    @classmethod
    def fit(
        cls,
        texts: Sequence[bytes],
        order: int = ORDER,
        max_bytes: int = MAX_TRAINING_BYTES,
        progress: Callable = lambda done, total, what: None,
    ) -> NGram:
        """Count the n-grams of `texts`, of length 1 to `order`.

        If there are more than `max_bytes` of text, it uses whole documents of about that total size, evenly spread over
        the list. Counting takes about 20 bytes per byte of text, and the tables about 10 per distinct n-gram.
        """
        stream = _Stream(spread(texts, max_bytes), order)
        tables = []
        for length, contexts in enumerate(stream.contexts(), start=1):
            progress(length - 1, order, "counting n-grams")
            tables.append(_Table.count(stream, contexts, length, longest=length == order))
        return cls(order, stream.num_predicted, tables)

    def bits_per_document(self, texts: Sequence[bytes]) -> np.ndarray:
        """-log2 of the probability of all bytes of each document: float64[documents]. Lengths are not encoded."""
        bits = -np.log2(self._probabilities(texts))
        ends = np.cumsum([0, *map(len, texts)])
        return np.diff(np.concatenate([[0.0], np.cumsum(bits)])[ends])

    def distribution(self, context: bytes) -> np.ndarray:
        """float64[256]: probability of each next byte of a document that begins with `context`."""
        continuations = [context + bytes([byte]) for byte in range(256)]
        return self._probabilities(continuations).reshape(256, -1)[:, -1]

    def _probabilities(self, texts: Sequence[bytes]) -> np.ndarray:
        """Probability of every byte of `texts`, end to end."""
        stream = _Stream(texts, self.order)
        probability = np.full(stream.num_predicted, 1 / 256)
        for table, contexts in zip(self._tables, stream.contexts(), strict=True):
            keys = (((contexts & ~_TWO_LOWEST_BYTES) >> 8) | stream.bytes)[stream.predicted]
            in_order = np.argsort(keys)
            share, left = table.interpolation(keys[in_order])
            probability[in_order] = share + left * probability[in_order]
        return probability


class _Stream:
    """Concatenated documents, each after `order` NUL bytes. All arrays are uint8, bool or uint64 over `bytes`.

    `predicted` is True at the documents' own bytes. Values computed at padding are never used.
    """

    def __init__(self, texts: Sequence[bytes], order: int):
        padding = bytes(order)
        self.order = order
        self.bytes = np.frombuffer(b"".join(part for text in texts for part in (padding, text)), np.uint8)
        lengths = np.array([n for text in texts for n in (order, len(text))], np.int64)
        self.predicted = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        self.num_predicted = int(lengths[1::2].sum())

    def contexts(self) -> Iterator[np.ndarray]:
        """For each length from 1 to `order`: a hash of the `length - 1` bytes before every byte. One array, reused."""
        hashed = np.zeros(len(self.bytes), np.uint64)
        yield hashed
        for back in range(1, self.order):
            hashed[back:] += self.bytes[:-back]
            # Multiply and shift as in SplitMix64's finaliser (Steele, Lea and Flood 2014); one-to-one, so that
            # different contexts remain different in 64 bits.
            hashed += np.uint64(0x9E3779B97F4A7C15)
            hashed *= np.uint64(0xBF58476D1CE4E5B9)
            hashed ^= hashed >> np.uint64(31)
            yield hashed


def _discounts(counts: np.ndarray) -> np.ndarray:
    """float64[3]: D1, D2 and D3+ from the numbers of n-grams with counts one to four (Chen and Goodman, eq. 26)."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == n)) for n in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        estimated = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if np.all(estimated > 0) and np.all(estimated < (1, 2, 3)):
            return estimated
    return np.array(_FALLBACK_DISCOUNTS)


def _run_starts(ordered: np.ndarray) -> np.ndarray:
    """bool of the same length: True where a value differs from the previous one."""
    return np.concatenate([np.ones(min(len(ordered), 1), bool), ordered[1:] != ordered[:-1]])


def _sums(values: np.ndarray, first: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Sum of values[first:after] for each pair: int64."""
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return running[after] - running[first]


def spread(texts: Sequence[bytes], max_bytes: int) -> list[bytes]:
    total = sum(map(len, texts))
    share = min(1.0, max_bytes / max(total, 1))
    return [text for i, text in enumerate(texts) if int((i + 1) * share) > int(i * share)]
