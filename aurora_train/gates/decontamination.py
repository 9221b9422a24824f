"""Whether items of evaluation sets are in the training texts, by shared runs of words (Brown et al. 2020, appendix C).

An item is a row of a table, all its texts together, or a whole text file. Words are lower case letters and digits,
without punctuation; of Chinese, Japanese and Korean, each character is one. An item of fewer words than the setting is
searched for whole, if it has at least `SHORTEST` of them; shorter ones say nothing and are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aurora_train.errors import UserError
from aurora_train.sources import find, readers

SHORTEST = 5  # words: every text holds shorter phrases of others
KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
         ".arrow": "arrow"}  # fmt: skip
_ALONE = "぀-ヿ㐀-䶿一-鿿가-힯"
_WORD = re.compile(f"[{_ALONE}]|[^\\W_{_ALONE}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Outcome:
    """Of one set: items that could be searched for, those found with the training text that holds them, and others."""

    searched: int = 0
    found: dict[str, str] = field(default_factory=dict)  # place of the item -> name of the training text
    too_short: int = 0


def items(path: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every item of an evaluation set. UserError if nothing can be read."""
    where = Path(path)
    _, files = find.find(where, "**/*", [])
    if not files:
        raise UserError("there is no such file or folder", where=path, hint="gates.decontamination.sets.NAME=FILE")
    for name, file in files:
        kind = KINDS.get(Path(name.removesuffix(".gz")).suffix.lower())
        try:
            if kind is None:
                yield name, readers.opened(file).read().decode(errors="replace")
                continue
            for number, (line, row) in enumerate(readers.objects(file, kind, ()), 1):
                yield f"{name}:{line or number}", " ".join(_texts(row))
        except readers.faults() as error:
            raise UserError("this evaluation set cannot be read", where=str(file), why=str(error)[:200]) from error


def _texts(value) -> Iterator[str]:
    if isinstance(value, readers.LeftOut):
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def search(sets: dict[str, str], ngram: int, texts: Iterable[tuple[str, str]]) -> dict[str, Outcome]:
    """What of each evaluation set (its path by name) is in the training texts, (name, text) each."""
    outcomes = {name: Outcome() for name in sets}
    wanted: dict[int, dict[int, list[tuple[str, str]]]] = {}  # length -> hash of so many words -> (set, item)
    for name, path in sets.items():
        for place, text in items(path):
            words = _hashes(text)
            length = min(ngram, len(words))
            if length < min(SHORTEST, ngram):
                outcomes[name].too_short += 1
                continue
            outcomes[name].searched += 1
            of_length = wanted.setdefault(length, {})
            for one in set(_runs(words, length).tolist()):
                of_length.setdefault(one, []).append((name, place))
    sought = {length: np.fromiter(table, np.uint64, len(table)) for length, table in wanted.items()}
    for source, text in texts:
        words = _hashes(text)
        for length, hashes in sought.items():
            for hit in np.intersect1d(_runs(words, length), hashes).tolist():
                for name, place in wanted[length][hit]:
                    outcomes[name].found.setdefault(place, source)
    return outcomes


def _hashes(text: str) -> np.ndarray:
    """uint64[words]: a hash of each word, the same within this process."""
    words = _WORD.findall(text.lower())
    return np.fromiter((hash(word) & 0xFFFFFFFFFFFFFFFF for word in words), np.uint64, len(words))


def _runs(words: np.ndarray, length: int) -> np.ndarray:
    """uint64: a hash of each run of `length` words; none if there are fewer."""
    count = len(words) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    mixed = np.zeros(count, np.uint64)
    for offset in range(length):
        mixed = mixed * _FACTOR + words[offset : offset + count]
        mixed ^= mixed >> np.uint64(29)
    return mixed
