"""The first reading of a source: which documents are kept, and which split each belongs to.

A document's split follows from sha256 of its id, so it does not move when others come or go. The first `holdout_test`
of the unit interval is the test split, the next `holdout_validation` the validation split. If a small corpus leaves one
of them empty, the document with the next larger number fills it. If there are too few documents to hold out whole ones,
the end of each is held out instead.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from aurora_train.errors import UserError
from aurora_train.sources.readers import LeftOut
from language.corpus import Corpus, Mixture
from language.settings import ALL_HELD_OUT, TextDataConfig
from language.store import SPLITS

_NAMES_KEPT = 20
_NAMES_SHOWN = 3
_PROGRESS_EVERY = 256
_WORTH_CUTTING = 1000  # bytes of the shortest document whose end is held out


@dataclass
class Screening:
    """Decisions per document, in the order of the source.

    Attributes:
        split: int8[documents], an index of SPLITS, or -1 if the document is left out.
        draw: float64[documents] in [0, 1) from the id, independent of the number that decides the split.
        num_bytes: int64[documents], of the raw text.
        skipped: reason -> {"count", "names" (the first twenty)}.
        documents: reads the screened documents again, or the pieces into which they were cut.
        num_cut: the number of documents that were cut into pieces; 0 if they are whole.
    """

    split: np.ndarray
    draw: np.ndarray
    num_bytes: np.ndarray
    skipped: dict[str, dict]
    documents: Callable[[], Iterator[tuple[str, bytes | LeftOut]]]
    num_cut: int = 0


def screen(corpus: Corpus, config: TextDataConfig, progress: Callable) -> Screening:
    """Read every document once; leave out empty ones, those that are not UTF-8 and exact repeats; split the rest.

    A repeat is left out whatever its name, so that no held-out document is in the training text word for word. Raises
    UserError if too few documents are left to fill every split, and they are too short to be cut.
    """
    uniforms, draws, sizes, kept, seen = [], [], [], [], set()
    skipped: dict[str, dict] = {}
    num_kept = 0
    total = None if corpus.tables or corpus.hub else len(corpus.files)
    for name, data in corpus.documents():
        fault = _fault(data, seen)
        if fault:
            entry = skipped.setdefault(fault, {"count": 0, "names": []})
            entry["count"] += 1
            entry["names"] += [name] if entry["count"] <= _NAMES_KEPT else []
        else:
            num_kept += 1
        digest = hashlib.sha256(b"aurora split " + os.fsencode(name)).digest()
        uniforms.append(int.from_bytes(digest[:8], "big") / 2**64)
        draws.append(int.from_bytes(digest[8:16], "big") / 2**64)
        sizes.append(len(data))
        kept.append(not fault)
        if len(kept) % _PROGRESS_EVERY == 0:
            progress(len(kept), total, "reading documents")
        if num_kept == config.max_documents:
            break
    if num_kept == 0:
        raise _no_text(skipped, corpus, config)
    if config.holdout_test == ALL_HELD_OUT:
        split = np.where(kept, SPLITS.index("test"), -1).astype(np.int8)
        return Screening(split, np.array(draws), np.array(sizes, np.int64), skipped, corpus.documents)
    if num_kept < 1 + (config.holdout_test > 0) + (config.holdout_validation > 0):
        return _cut(corpus, np.array(kept), skipped, config)
    split = assign(np.array(uniforms), np.array(kept), config)
    return Screening(split, np.array(draws), np.array(sizes, np.int64), skipped, corpus.documents)


def _fault(data: bytes | LeftOut, seen: set[bytes]) -> str | None:
    if isinstance(data, LeftOut):
        return str(data)
    if not data.strip():
        return "empty"
    try:
        data.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    digest = hashlib.sha256(data).digest()[:16]
    if digest in seen:
        return "repeats another document"
    seen.add(digest)
    return None


def left_out(skipped: dict[str, dict], num_kept: int) -> str | None:
    """One line on a manifest's `skipped`: how many of how many documents were left out, why, and the first names."""
    if not skipped:
        return None
    reasons = []
    for reason, entry in skipped.items():
        names = ", ".join(entry["names"][:_NAMES_SHOWN]) + (", ..." if entry["count"] > _NAMES_SHOWN else "")
        count = f"{entry['count']} " if len(skipped) > 1 else ""
        reasons.append(f"{count}{reason} ({names})")
    total = sum(entry["count"] for entry in skipped.values())
    return f"{total} of {total + num_kept} documents left out: {'; '.join(reasons)}"


def _no_text(skipped: dict, corpus: Corpus | Mixture, config: TextDataConfig) -> UserError:
    return UserError(
        f"{corpus.name} holds no text",
        where="data.mix" if config.mix else "data.source",
        why=left_out(skipped, 0) or "it has no documents",
        hint="documents are UTF-8; data.pattern chooses among files, data.text_field among columns",
    )


# ---- too few documents: their ends


def _cut(corpus: Corpus | Mixture, kept: np.ndarray, skipped: dict, config: TextDataConfig) -> Screening:
    """Cut each kept document: its last part is for test, the part before that for validation, the rest for training."""

    def pieces() -> Iterator[tuple[str, str, bytes]]:
        for keep, (name, data) in zip(kept, corpus.documents(), strict=False):
            if keep:
                yield from _pieces(name, data, config)

    splits, sizes = [], []
    for split, _, data in pieces():
        splits.append(SPLITS.index(split))
        sizes.append(len(data))
    num_kept, needed = int(kept.sum()), {"train", *_shares(config)}
    if {SPLITS[split] for split in splits} != needed:
        raise UserError(
            f"{corpus.name} holds {num_kept} document{'s' if num_kept > 1 else ''}, too few to hold any out",
            where="data.mix" if config.mix else "data.source",
            why=f"training, data.holdout_test and data.holdout_validation need {len(needed)}, or one of at least "
            f"{_WORTH_CUTTING:,} bytes, whose end can be held out"
            + (f"; {left_out(skipped, num_kept)}" if skipped else ""),
            hint="to train on all of it, without a score: data.holdout_test=0 data.holdout_validation=0 "
            "evaluate.final=false",
        )
    return Screening(
        np.array(splits, np.int8), np.arange(len(splits)) / len(splits), np.array(sizes, np.int64), skipped,
        lambda: ((name, data) for _, name, data in pieces()), num_kept,
    )  # fmt: skip


def _shares(config: TextDataConfig) -> dict[str, float]:
    """The shares of the held-out splits in use, in the order in which they end a document, the last first."""
    shares = {"test": config.holdout_test, "validation": config.holdout_validation}
    return {name: share for name, share in shares.items() if share > 0}


def _pieces(name: str, data: bytes, config: TextDataConfig) -> Iterator[tuple[str, str, bytes]]:
    """(split, name, bytes) of a document's parts, in order."""
    end, stop, held = len(data.rstrip()), len(data), []
    if end >= _WORTH_CUTTING:
        for split, share in _shares(config).items():
            size = max(int(end * share), 1)
            end = _boundary(data, max(end - size, 1), max(end - 2 * size, 1))
            held.append((split, f"{name}:{split}", data[end:stop]))
            stop = end
    yield "train", name, data[:stop]
    yield from reversed(held)


def _boundary(data: bytes, at: int, low: int) -> int:
    """The last start of a line in `low`..`at`; if there is none, of a word; if there is none, of a character."""
    for mark in (b"\n", b" "):
        place = data.rfind(mark, low - 1, at)
        if place >= 0:
            return place + 1
    while data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def assign(uniforms: np.ndarray, kept: np.ndarray, config) -> np.ndarray:
    """int8 split of each document: thresholds on its uniform number, with at least one document in every split.

    `config` has `holdout_test` and `holdout_validation`; there must be as many kept documents as splits in use.
    """
    split = np.full(len(kept), -1, np.int8)
    order = np.flatnonzero(kept)
    order = order[np.argsort(uniforms[order], kind="stable")]
    sorted_uniforms = uniforms[order]
    start, threshold = 0, 0.0
    shares = {"test": config.holdout_test, "validation": config.holdout_validation}
    for name, share in shares.items():
        threshold += share
        end = int(np.searchsorted(sorted_uniforms, threshold))
        if share > 0:
            end = max(end, start + 1)
        still_needed = 1 + (name == "test" and config.holdout_validation > 0)
        end = min(max(end, start), len(order) - still_needed)
        split[order[start:end]] = SPLITS.index(name)
        start = end
    split[order[start:]] = SPLITS.index("train")
    return split
