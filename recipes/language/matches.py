"""Where the last tokens stood before in their document: what `model.copying` reads beside the tokens.

For each token and each context length n: the last earlier place, in the same document, where the same n tokens end, and
how often they did. It depends on the document so far alone, however rows are cut or packed, so it is found once for a
prepared text, exactly, and kept beside it under a hash of both. `language.copying` finds the same in a text that grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from aurora_train.data.prepared import Prepared, key_of, made, writing
from language.store import SPLITS, Store

FARTHEST = 65_535  # tokens back; what stood before that is not found
MOST_SEEN = 255  # as often or more
_FORMAT = 1
_BLOCK = 1 << 22  # tokens, or one document: what is sorted at a time


class Matches(Prepared):
    """The matches of a store's splits: `distance` uint16[tokens, contexts], 0 where there is none, and `seen` uint8."""

    store: Store

    def at(self, split: str, places: np.ndarray) -> np.ndarray:
        """int64[...] places in a split's stream -> int32[..., contexts, 3]: what followed the earlier occurrence, how
        often there was one, and how many tokens ago; zeros where there was none."""
        contexts = len(self.manifest["contexts"])
        distance, seen = (
            self.array(f"{name}-{split}.bin", kind).reshape(-1, contexts)[places]
            for name, kind in (("distance", "uint16"), ("seen", "uint8"))
        )
        followed = self.store.tokens(split)[places[..., None] - distance + (distance > 0)]
        return np.stack([np.where(distance > 0, followed, 0), seen, distance], -1).astype(np.int32)

    def documents(self, split: str) -> list[np.ndarray]:
        """`at` of every token of each document, but for the separator that ends it."""
        offsets = self.store.offsets(split)
        return [self.at(split, np.arange(first, last)) for first, last in zip(offsets[:-1], offsets[1:], strict=True)]


def prepare_matches(store: Store, contexts: tuple[int, ...], cache: Path, progress: Callable) -> Matches:
    """Find the matches of a store for these lengths of contexts, or open those that were found before.

    `contexts`: as `starting.CopyingConfig` has them. Raises UserError for a cache that cannot be written.
    """
    key = key_of({"format": _FORMAT, "store": store.fingerprint, "contexts": list(contexts)})

    def write(folder: Path) -> dict:
        for split in SPLITS:
            tokens, offsets = store.tokens(split), store.offsets(split)
            paths = [folder / f"{name}-{split}.bin" for name in ("distance", "seen")]
            with writing(folder.parent), paths[0].open("wb") as distances, paths[1].open("wb") as counts:
                for first, last in _blocks(offsets):
                    progress(int(offsets[first]), int(offsets[-1]), "finding earlier occurrences")
                    starts = offsets[first : last + 1] - offsets[first]
                    distance, seen = find(tokens[offsets[first] : offsets[last]], starts, contexts)
                    distances.write(distance.tobytes())
                    counts.write(seen.tobytes())
        return {"format": _FORMAT, "key": key, "contexts": list(contexts)}

    found = made(Matches, cache / f"matches-{key[:16]}", write, progress)
    found.store = store
    return found


def _blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of documents that have `_BLOCK` tokens together, or are one."""
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + _BLOCK, side="right")) - 1
        yield first, max(last, first + 1)
        first = max(last, first + 1)


def find(tokens: np.ndarray, offsets: np.ndarray, contexts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(distance uint16, seen uint8)[tokens, contexts] of documents in a row; `offsets` int64[documents + 1].

    Equal contexts get equal numbers: those of n tokens by sorting pairs of numbers of shorter ones. Nothing is hashed.
    """
    document = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    within = np.arange(len(tokens)) - offsets[document]
    distance = np.zeros((len(tokens), len(contexts)), np.uint16)
    seen = np.zeros((len(tokens), len(contexts)), np.uint8)
    number, known = document, 0  # a context of no tokens is the document
    for column, length in enumerate(contexts):
        whole, apart = within >= length - 1, length - known if known else 0
        number, places, fresh = numbered(number, apart, number if known else tokens, whole)
        known = length
        back = np.where(fresh, 0, np.diff(places, prepend=0))
        back[back > FARTHEST] = 0
        distance[places, column] = back
        seen[places, column] = np.where(back > 0, np.minimum(place_in_group(fresh), MOST_SEEN), 0)
    return distance, seen


def numbered(number: np.ndarray, apart: int, last: np.ndarray, whole: np.ndarray):
    """Numbers of contexts that are one of `number`, `apart` tokens before, and `last` here, where `whole` is True.

    Returns (numbers int64[tokens], their places by number, then by place, and where in these each number begins).
    """
    here = np.flatnonzero(whole)
    order, fresh = sorted_pairs(number[here - apart], last[here])
    made, places = np.zeros(len(number), np.int64), here[order]
    made[places] = np.cumsum(fresh) - 1
    return made, places, fresh


def sorted_pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the stable order of pairs of numbers from 0, where in it another pair begins)."""
    pairs = first * (int(second.max(initial=0)) + 1) + second
    order = np.argsort(pairs, kind="stable")
    return order, np.diff(pairs[order], prepend=-1) != 0


def place_in_group(fresh: np.ndarray) -> np.ndarray:
    """0, 1, ... from each True on."""
    return np.arange(len(fresh)) - np.flatnonzero(fresh)[np.cumsum(fresh) - 1]
