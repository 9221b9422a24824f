"""The order of examples: a pure function of (seed, data_step), never a stored permutation or an iterator.

The stream of examples is one epoch after another, each in its own order; position p is epoch p // n, place p % n.
Nothing is dropped: a batch may hold the end of one epoch and the start of the next. Within an epoch the order is a
keyed bijection of [0, n), a Feistel network over the next power of two with cycle walking (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains"): O(batch) work for any n, and only 64-bit integer arithmetic, hence equal on
every machine and version. Grain's own shuffle is index-based as well, but costs 15 us per item in Python, and its
order is not guaranteed across versions; a golden test pins this one.
"""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

import numpy as np

_ROUNDS = 8
_BLOCK = 4096  # places permuted at a time
_SLOTS = 1 << 16  # examples of a mixture's stream in which every part has exactly its share
_MINIMUM_BITS = 4  # smaller networks are poor shuffles; cycle walking skips the surplus


def indices(seed: int, data_step: int, batch: int, num_examples: int) -> np.ndarray:
    """int64[batch] example indices in [0, num_examples) of the global batch at `data_step` (0-based)."""
    position, end, parts = data_step * batch, (data_step + 1) * batch, []
    while position < end:
        epoch, place = divmod(position, num_examples)
        block = _block(seed, epoch, num_examples, place // _BLOCK)[place % _BLOCK :]
        parts.append(block[: end - position])
        position += len(parts[-1])
    return np.concatenate(parts)


class Part(NamedTuple):
    """One source of a mixture: its weight and its examples, `first` to `first + count`."""

    weight: float
    first: int
    count: int


def examples_at(source, seed: int, data_step: int, batch: int) -> np.ndarray:
    """int64[batch] indices into a source: by `indices`, or by the shares of its `mixture` if it has one."""
    parts = getattr(source, "mixture", None)
    return indices(seed, data_step, batch, len(source)) if parts is None else mixed(seed, data_step, batch, parts)


def mixed(seed: int, data_step: int, batch: int, parts: tuple[Part, ...]) -> np.ndarray:
    """int64[batch] example indices of the global batch at `data_step`, drawn from `parts` by their weights.

    In every stretch of 65,536 examples each part has the same number, its rounded share, in an order determined by
    (seed, stretch). Each part's examples come in its own epochs: every example once before any is repeated, however
    much sooner a part is exhausted than the others.
    """
    position, end, chosen = data_step * batch, (data_step + 1) * batch, []
    while position < end:
        block = _mixed_block(seed, parts, position // _BLOCK)[position % _BLOCK :]
        chosen.append(block[: end - position])
        position += len(chosen[-1])
    return np.concatenate(chosen)


def slots(parts: tuple[Part, ...]) -> np.ndarray:
    """int64[parts], the shares of 65,536 by largest remainder; at least one each."""
    exact = _SLOTS * np.array([part.weight for part in parts]) / sum(part.weight for part in parts)
    counts = np.maximum(exact.astype(np.int64), 1)
    while (short := _SLOTS - int(counts.sum())) != 0:
        step = 1 if short > 0 else -1
        spare = (counts > 1) | (step > 0)  # no part loses its last
        counts[np.argmax(np.where(spare, step * (exact - counts), -np.inf))] += step
    return counts


@functools.lru_cache(maxsize=8)
def _mixed_block(seed: int, parts: tuple[Part, ...], number: int) -> np.ndarray:
    """The examples at one block of positions in a mixture's stream."""
    stretch, place = divmod(number * _BLOCK, _SLOTS)
    places = np.arange(place, place + _BLOCK, dtype=np.int64)
    slot, counts = permute(places, f"{seed} mixture", stretch, _SLOTS), slots(parts)
    starts = np.cumsum(counts) - counts
    of = np.searchsorted(starts, slot, side="right") - 1
    turn = stretch * counts[of] + slot - starts[of]  # the place in its part's own stream
    chosen = np.empty(_BLOCK, np.int64)
    for number_of, part in enumerate(parts):
        for epoch in np.unique(turn[of == number_of] // part.count):
            here = (of == number_of) & (turn // part.count == epoch)
            name = f"{seed} part {number_of}"
            chosen[here] = part.first + permute(turn[here] % part.count, name, int(epoch), part.count)
    return chosen


@functools.lru_cache(maxsize=8)
def _block(seed: int, epoch: int, n: int, number: int) -> np.ndarray:
    """One block of an epoch's order: for a small batch, numpy's calls would cost more than the arithmetic."""
    return permute(np.arange(number * _BLOCK, min((number + 1) * _BLOCK, n), dtype=np.int64), seed, epoch, n)


def permute(places: np.ndarray, seed: int | str, epoch: int, n: int) -> np.ndarray:
    """Image of int64 `places` in [0, n) under the permutation of [0, n) determined by (seed, epoch)."""
    digest = hashlib.sha256(f"aurora order {seed} {epoch}".encode()).digest()
    digest += hashlib.sha256(digest).digest()
    keys = np.frombuffer(digest, "<u8", _ROUNDS).astype(np.uint64)
    bits = max(_MINIMUM_BITS, (n - 1).bit_length())
    values = _feistel(places.astype(np.uint64), keys, bits)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], keys, bits)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A bijection of uint64 values in [0, 2**bits); the halves may be unequal and swap widths every round."""
    low_bits, high_bits = bits // 2, bits - bits // 2
    for key in keys:
        low_mask = np.uint64((1 << low_bits) - 1)
        high, low = values >> np.uint64(low_bits), values & low_mask
        mixed = high ^ (_mix(low + key) >> np.uint64(64 - high_bits))
        values = (low << np.uint64(high_bits)) | mixed
        low_bits, high_bits = high_bits, low_bits
    return values


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
