"""Whole documents as sliding windows, packed into batches of one shape, so that a score counts every token once.

A document's first token (the separator) is given; each later one is a target exactly once. The first window scores all
of its targets; a later one scores only those after the `overlap` that it shares with the previous window as context.
Note that several windows are packed into a row, longest first, each as its own segment.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_NO_DOCUMENT = -1


def windows(
    documents: Sequence[np.ndarray], sequence: int, overlap: int, batch: int,
    beside: dict[str, Sequence[np.ndarray]] | None = None,
) -> Windows:  # fmt: skip
    """Batches that score `documents`: an iterable that may be iterated repeatedly; its `len` is the number of batches.

    Args:
        documents: integer arrays of tokens, each beginning with a token that is given and not scored.
        sequence: T, tokens per row. A window holds at most T inputs.
        overlap: inputs at the start of a later window whose targets the previous one scores, 0 <= overlap < T.
        batch: B, rows per batch. The last batch is padded with rows of weight 0.
        beside: further int32 arrays of each document by name, [its tokens less one, ...]: one entry for each input.

    Yields dicts of [B, T] arrays: int32 `tokens`, `targets`, `segments` (from 1; 0 is padding), `positions` (from 0
    in each window), float32 `weights` (1 for a target scored here, else 0), and int32 `document`, the index of the
    document whose target is scored here, else -1: that one is for `bits_per_document`, not for the model. Arrays of
    `beside` are 0 at padding.
    """
    return Windows(documents, sequence, overlap, batch, beside or {})


class Windows:
    """The batches of `windows`. `num_targets` is the number of scored tokens."""

    def __init__(self, documents: Sequence[np.ndarray], sequence: int, overlap: int, batch: int, beside: dict):
        assert 0 <= overlap < sequence, f"windows of {sequence} tokens cannot overlap by {overlap}"
        self._documents, self._sequence, self._overlap, self._batch = documents, sequence, overlap, batch
        self._beside = beside
        num_targets = np.array([max(len(document) - 1, 0) for document in documents], np.int64)
        self.num_targets = int(num_targets.sum())
        self._cut(num_targets)
        self._row, self._column, num_rows = pack(self._length, sequence)
        self._by_row = np.lexsort((self._column, self._row))
        self._num_batches = -(-num_rows // batch)

    def _cut(self, num_targets: np.ndarray) -> None:
        """The windows of all documents: int64 arrays of the document, its first input there, length, already scored."""
        stride = self._sequence - self._overlap
        more = -(-np.maximum(num_targets - self._sequence, 0) // stride)
        per_document = np.where(num_targets > 0, 1 + more, 0)
        self._document = np.repeat(np.arange(len(num_targets)), per_document)
        number = np.arange(len(self._document)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
        self._first = number * stride
        self._length = np.minimum(num_targets[self._document] - self._first, self._sequence)
        self._context = np.where(number > 0, self._overlap, 0)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        rows = self._row[self._by_row]
        for i in range(self._num_batches):
            start, end = np.searchsorted(rows, [i * self._batch, (i + 1) * self._batch])
            yield self._fill(self._by_row[start:end], i * self._batch)

    def _fill(self, chosen: np.ndarray, first_row: int) -> dict[str, np.ndarray]:
        """One batch of the windows `chosen`, ordered by row and column."""
        length, row = self._length[chosen], self._row[chosen] - first_row
        spans = [(self._document[w], self._first[w], self._first[w] + self._length[w]) for w in chosen]
        pieces = [np.asarray(self._documents[document][first : last + 1]) for document, first, last in spans]
        scored = _places_within(length) >= np.repeat(self._context[chosen], length)
        document = np.where(scored, np.repeat(self._document[chosen], length), _NO_DOCUMENT)
        shape = (self._batch, self._sequence)
        batch = laid_out(pieces, row, self._column[chosen], scored, shape)
        real = batch["segments"] > 0
        for name, arrays in self._beside.items():
            values = [arrays[document][first:last] for document, first, last in spans]
            batch[name] = _spread(np.concatenate(values), real, np.int32)
        return batch | {"document": _spread(document, real, np.int32, _NO_DOCUMENT)}


def laid_out(
    pieces: Sequence[np.ndarray], row: np.ndarray, column: np.ndarray, counted: np.ndarray, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The arrays [B, T] of `shape` of pieces in their rows.

    Args:
        pieces: integer arrays, ordered by row and column. One of n + 1 tokens has n inputs and n targets.
        row, column: int64[pieces], where each one's first input stands; they do not overlap.
        counted: bool over all targets, piece after piece: those whose weight is 1.

    Returns int32 `tokens`, `targets`, `segments` (a row's pieces from 1; 0 is padding), `positions` (from 0 in each
    piece) and float32 `weights`.
    """
    length = np.array([len(piece) - 1 for piece in pieces], np.int64)
    position = _places_within(length)
    real = np.zeros(shape[0] * shape[1], bool)
    real[np.repeat(row * shape[1] + column, length) + position] = True
    real = real.reshape(shape)
    segment = np.arange(len(pieces)) - np.searchsorted(row, row) + 1
    values = {
        "tokens": np.concatenate([piece[:-1] for piece in pieces]),
        "targets": np.concatenate([piece[1:] for piece in pieces]),
        "segments": np.repeat(segment, length),
        "positions": position,
    }
    arrays = {name: _spread(flat, real, np.int32) for name, flat in values.items()}
    return arrays | {"weights": _spread(counted, real, np.float32)}


def _places_within(length: np.ndarray) -> np.ndarray:
    """0, 1, ... in each piece of the given lengths, one piece after the other."""
    return np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)


def _spread(values: np.ndarray, real: np.ndarray, dtype, filler=0) -> np.ndarray:
    """The values, ordered by row and column, at the `real` places; `filler` elsewhere."""
    whole = np.full((*real.shape, *values.shape[1:]), filler, dtype)
    whole[real] = values
    return whole


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Place pieces of 1..`capacity` tokens in rows: (int64 row, int64 first column of each, number of rows).

    Best fit, longest first: each piece goes to the row with the least room that still holds it, and among equals to the
    oldest. Uses at most 11/9 of the fewest rows possible, plus one (Johnson 1974), and is the same on every machine.
    """
    row, column = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    rows_with: list[deque[int]] = [deque() for _ in range(capacity + 1)]  # open rows by their remaining room
    rooms: list[int] = []  # ascending: those r for which rows_with[r] is not empty
    num_rows = 0
    for piece in np.argsort(-lengths, kind="stable"):
        length = int(lengths[piece])
        smallest = bisect_left(rooms, length)
        if smallest < len(rooms):
            room = rooms[smallest]
            row[piece] = rows_with[room].popleft()
            if not rows_with[room]:
                rooms.pop(smallest)
        else:
            room, row[piece] = capacity, num_rows
            num_rows += 1
        column[piece] = capacity - room
        left = room - length
        if left and not rows_with[left]:
            insort(rooms, left)
        rows_with[left].append(int(row[piece]))
    return row, column, num_rows


def bits_per_document(scored: Iterable[tuple[dict, np.ndarray]], num_documents: int) -> np.ndarray:
    """float64[num_documents] bits from (batch, nll) pairs: nll is float[B, T], -log p(target) in nats.

    Only entries whose `document` is not -1 count, so padding and context may hold anything, even nan.
    """
    nats = np.zeros(num_documents)
    for batch, nll in scored:
        here = batch["document"] != _NO_DOCUMENT
        values = np.asarray(nll, np.float64)[here]
        nats += np.bincount(batch["document"][here], weights=values, minlength=num_documents)
    return nats / np.log(2)
