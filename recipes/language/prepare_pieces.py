"""Reads, encodes and splits conversations, once per source and settings, into `Pieces`.

It is for every recipe that learns answers; what its rows are and how they are encoded is its `Encoding`. A row's split
follows from sha256 of its content: equal rows are never on both sides, wherever they stand.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aurora_train.data.prepared import changed, key_of, made, writing
from aurora_train.errors import UserError
from aurora_train.sources.readers import LeftOut
from language.answers import RefusedRow
from language.conversations import sources
from language.pieces import Pieces
from language.prepare import tokenizer_record
from language.screening import assign
from language.settings import ALL_HELD_OUT
from language.settings_tune import ConversationDataConfig
from language.store import SPLITS
from language.tokenizers import Tokenizer

FORMAT = 2  # part of the key: raise it when the same conversations give other files
_PROGRESS_EVERY = 64
_DECISIVE = ("format", "fields", "max_rows", "damaged", "sequence", "overlong", "holdout_test", "holdout_validation")


class Encoding(NamedTuple):
    """What a recipe makes of its rows.

    Attributes:
        name: of the rows, in the plural and in messages; it begins the folder's name.
        read: as `conversations.read`, with its `say`.
        encode: a row -> its pieces, as `answers.Learned`; [] if nothing in it is learned. It raises RefusedRow for a
            row that `data.damaged` may leave out.
        decisive: everything besides the rows and the tokenizer that decides `encode` and `arrange`; plain JSON.
        arrange: (folder, lengths int64[pieces], split int8[pieces], source int16[pieces]) -> what it adds to the
            manifest; it may write files. `lengths` count inputs, one less than tokens; `source` is an index of the
            sorted names of the sources.
        is_whole: whether a row is dropped that lost one of its pieces, or what told them apart, as a pair is.
        split_by: fields of a row; rows that are equal in these are in the same split. (): in all but the place.
    """

    name: str
    read: Callable[..., Iterator]
    encode: Callable[[Any], list]
    decisive: dict
    arrange: Callable[[Path, np.ndarray, np.ndarray, np.ndarray], dict]
    is_whole: bool = False
    split_by: tuple[str, ...] = ()


def prepare(
    encoding: Encoding, data: ConversationDataConfig, cache: Path, tokenizer: Tokenizer, progress: Callable
) -> Pieces:
    """The pieces of `data`: made below the folder `cache`, or opened if they are there.

    Raises UserError for every fault of the data, and if nothing in them is learned.
    """
    found = sources(data)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        listings = {name: corpus.listing(cache, progress) for name, corpus in found.items()}
    key = _key(encoding, data, tokenizer, listings)

    def write(folder: Path) -> dict:
        writer = _Writer(folder, tokenizer, data, encoding)
        _write(writer, found, data, encoding, progress)
        titles = [f"{name} ({corpus.name})" if name else corpus.name for name, corpus in found.items()]
        counts = writer.finish("; ".join(titles))
        with writing(cache):
            tokenizer.save(folder)
            if {name: corpus.listing(cache, progress) for name, corpus in found.items()} != listings:
                raise changed("; ".join(titles))
        licences = "; ".join(sorted({corpus.licence for corpus in found.values()}))
        return {"format": FORMAT, "key": key, "source": "; ".join(titles), "licence": licences, **counts,
                "tokenizer": tokenizer_record(tokenizer, tokenizer)}  # fmt: skip

    return made(Pieces, cache / f"{encoding.name}-{key[:16]}", write, progress)


def _key(encoding: Encoding, data: ConversationDataConfig, tokenizer: Tokenizer, listings: dict) -> str:
    """Over all that decides the pieces. Not the weights of a mixture, which are index arithmetic."""
    settings = {name: getattr(data, name) for name in _DECISIVE}
    parts = {name: [part.format, part.fields, part.max_rows] for name, part in data.mix.items()}
    return key_of({"format": FORMAT, "listings": listings, "tokenizer": tokenizer.sha256, "settings": settings,
                   "mix": parts, "encoding": [encoding.name, encoding.decisive]})  # fmt: skip


def _write(writer: _Writer, found: dict, data, encoding: Encoding, progress: Callable) -> None:
    """Read every source twice: a fault in its last row is reported before the long work on the first one."""
    total = done = 0
    for corpus in found.values():
        for _ in encoding.read(corpus, data):
            total += 1
            if total % 1024 == 0:
                progress(total, None, f"reading {encoding.name}")
    for name, corpus in found.items():
        writer.begin(name)
        for row in encoding.read(corpus, data, say=lambda line: None):
            if done % _PROGRESS_EVERY == 0:
                progress(done, total, f"tokenizing {encoding.name}")
            done += 1
            writer.add(row)
    progress(done, total, f"tokenizing {encoding.name}")


class _Writer:
    """The growing files. The lengths and numbers of pieces stay in memory, some 200 bytes each, their tokens do not."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, data: ConversationDataConfig, encoding: Encoding):
        self._folder, self._dtype, self._data, self._encoding = folder, tokenizer.dtype, data, encoding
        self._counts: dict[str, dict] = {}
        self._pieces: list[tuple[int, int, int, int]] = []  # tokens, learned tokens, conversation, source
        self._uniforms: list[float] = []  # of each conversation
        self._longest = 0  # tokens of the longest piece, cut or not
        self._overlong: list[tuple[int, str]] = []  # tokens and place of what is longer than a row, to refuse it
        with writing(folder.parent):
            self._tokens, self._learned = (folder / "tokens.bin").open("wb"), (folder / "learned.bin").open("wb")
            self._places = (folder / "places.jsonl").open("w")

    def begin(self, source: str) -> None:
        self._counts[source] = {"rows": 0, "kept": 0, "pieces": 0, "in_several_pieces": 0, "cut": 0,
                                "nothing_learned": 0, "inputs": 0, "learned": 0, "left_out": Counter(),
                                "unwritten": Counter()}  # fmt: skip

    def add(self, row) -> None:
        """Encode a row of the source begun last, and write its pieces; or count why it has none."""
        counts = self._counts[next(reversed(self._counts))]
        counts["rows"] += 1
        if isinstance(row, LeftOut):
            counts["left_out"][str(row)] += 1
            return
        try:
            pieces = self._encoding.encode(row)
        except RefusedRow as refused:
            if self._data.damaged == "refuse":
                raise
            counts["left_out"][refused.reason] += 1
            return
        encoded = [_trimmed(piece.ids, piece.learned) for piece in pieces]
        longest = max((len(ids) for ids, _ in encoded), default=0) - 1
        self._longest = max(self._longest, longest)
        if longest > self._data.sequence:
            if self._data.overlong == "refuse":
                self._overlong.append((longest, row.place))
                return
            if self._data.overlong == "leave_out":
                counts["left_out"][f"longer than {self._data.sequence} tokens"] += 1
                return
            encoded = [_trimmed(ids[: self._data.sequence + 1], learned) for ids, learned in encoded]
        kept = [(ids, learned) for ids, learned in encoded if len(ids)]
        if not kept or self._encoding.is_whole and (len(kept) < len(encoded) or _alike(kept)):
            counts["nothing_learned"] += 1
            return
        counts["kept"] += 1
        counts["pieces"] += len(kept)
        counts["in_several_pieces"] += len(kept) > 1 and not self._encoding.is_whole
        counts["cut"] += longest > self._data.sequence
        counts["inputs"] += sum(len(ids) - 1 for ids, _ in kept)
        counts["learned"] += sum(int(learned.sum()) for _, learned in kept)
        counts["unwritten"].update({what for piece in pieces for what in piece.unwritten})
        with writing(self._folder.parent):
            self._store(row, kept)

    def _store(self, row, pieces: list[tuple[np.ndarray, np.ndarray]]) -> None:
        names = self._encoding.split_by or [name for name in row._fields if name != "place"]
        content = {name: getattr(row, name) for name in names if getattr(row, name)}
        digest = hashlib.sha256(b"aurora split " + json.dumps(content, sort_keys=True).encode()).digest()
        for ids, learned in pieces:
            self._tokens.write(ids.astype(self._dtype).tobytes())
            self._learned.write(learned.astype(bool).tobytes())
            self._pieces.append((len(ids), int(learned.sum()), len(self._uniforms), len(self._counts) - 1))
        self._places.write(json.dumps(row.place) + "\n")
        self._uniforms.append(int.from_bytes(digest[:8], "big") / 2**64)

    def finish(self, name: str) -> dict:
        """Write what is known only now; returns the counts for the manifest. UserError if nothing is learned."""
        for file in (self._tokens, self._learned, self._places):
            with writing(self._folder.parent):
                file.close()
        if self._overlong:
            raise self._too_long()
        if not self._pieces:
            raise self._nothing_learned(name)
        rows = "prompts" if self._encoding.split_by else self._encoding.name
        split = _split(np.array(self._uniforms), self._data, name, rows)
        length, learned, conversation, source = np.array(self._pieces, np.int64).T
        arrays = {"offsets": np.concatenate([[0], np.cumsum(length)]), "conversation": conversation,
                  "split": split[conversation], "source": source.astype(np.int16)}  # fmt: skip
        with writing(self._folder.parent):
            for file, array in arrays.items():
                np.save(self._folder / f"{file}.npy", array)
            arranged = self._encoding.arrange(self._folder, length - 1, split[conversation], source.astype(np.int16))
        splits = {}
        for number, each in enumerate(SPLITS):
            here = split[conversation] == number
            splits[each] = {self._encoding.name: int((split == number).sum()), "pieces": int(here.sum()),
                            "tokens": int(length[here].sum()), "learned": int(learned[here].sum())}  # fmt: skip
        return {"sources": self._counts, "splits": splits, **arranged}

    def _too_long(self) -> UserError:
        longest, (first, place), row = max(self._overlong)[0], self._overlong[0], self._data.sequence
        all_of_them = f"{len(self._overlong):,} {self._encoding.name} are longer than a row"
        return UserError(
            f"{place} has {first:,} tokens, and a row {row:,}", where="data.sequence",
            why=f"{all_of_them}; the longest has {longest:,} tokens",
            hint=f"data.sequence={longest}; or data.overlong=leave_out, which counts such rows; or data.overlong=cut, "
            "which reads only their beginning",
        )  # fmt: skip

    def _nothing_learned(self, name: str) -> UserError:
        rows, nothing = (sum(one[what] for one in self._counts.values()) for what in ("rows", "nothing_learned"))
        left_out = sum((one["left_out"] for one in self._counts.values()), Counter())
        reasons = [f"{number:,} left out: {why}" for why, number in sorted(left_out.items())]
        hint = "the loss is on the messages of the role assistant; `aurora inspect CONFIG --example 0` shows it"
        if self._longest > self._data.sequence:
            hint = f"data.sequence={self._longest} holds the longest; {hint}"
        return UserError(
            f"nothing in {name} can be learned", where="data.source",
            why="; ".join([f"of {rows:,} rows, {nothing:,} have no answer with a token to learn", *reasons]),
            hint=hint,
        )  # fmt: skip


def _alike(pieces: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    """Whether all of several pieces are the same tokens, as two answers that differ beyond the end of a row."""
    return len(pieces) > 1 and all(np.array_equal(pieces[0][0], ids) for ids, _ in pieces[1:])


def _trimmed(ids: np.ndarray, learned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, learned) up to the last learned token; empty if there is none. The first token is no target."""
    learned = np.asarray(learned[: len(ids)], bool).copy()
    learned[:1] = False
    end = int(np.flatnonzero(learned)[-1]) + 1 if learned.any() else 0
    return np.asarray(ids[:end]), learned[:end]


def _split(uniforms: np.ndarray, data: ConversationDataConfig, name: str, rows: str) -> np.ndarray:
    """int8 split of each conversation. UserError if there are too few different ones to fill every split."""
    if data.holdout_test == ALL_HELD_OUT:
        return np.full(len(uniforms), SPLITS.index("test"), np.int8)
    different, number = np.unique(uniforms, return_inverse=True)
    needed = 1 + (data.holdout_test > 0) + (data.holdout_validation > 0)
    if len(different) < needed:
        raise UserError(
            f"{name} holds {len(different)} different {rows}, too few to hold any out", where="data.source",
            why=f"training, data.holdout_test and data.holdout_validation need {needed}",
            hint="to train on all of them, without a score: data.holdout_test=0 data.holdout_validation=0 "
            "evaluate.final=false",
        )  # fmt: skip
    return assign(different, np.ones(len(different), bool), data)[number]
