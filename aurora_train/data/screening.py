"""The first reading of a source: which documents are kept, and which split each belongs to.

A document's split follows from sha256 of its id, so it does not move when others come or go. The first `holdout_test`
of the unit interval is the test split, the next `holdout_validation` the validation split. Where a small corpus leaves
one of them empty, the document nearest above takes its place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from aurora_train.data.config import TextDataConfig
from aurora_train.data.sources import Corpus
from aurora_train.data.store import SPLITS
from aurora_train.errors import UserError

_NAMES_KEPT = 20
_PROGRESS_EVERY = 256


@dataclass
class Screening:
    """Decisions per document, in the order of the source.

    Attributes:
        split: int8[documents], an index of SPLITS, or -1 where the document is left out.
        draw: float64[documents] in [0, 1) from the id, independent of the number that splits.
        num_bytes: int64[documents], of the raw text.
        skipped: reason -> {"count", "names" (the first twenty)}.
    """

    split: np.ndarray
    draw: np.ndarray
    num_bytes: np.ndarray
    skipped: dict[str, dict]


def screen(corpus: Corpus, config: TextDataConfig, progress: Callable) -> Screening:
    """Read every document once; leave out empty ones, those that are not UTF-8 and exact repeats; split the rest.

    A repeat is left out whatever its name, so that no held-out document is in the training text word for word.
    Raises UserError when too few documents are left to fill every split.
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
    _check_enough(num_kept, skipped, corpus, config)
    split = _assign(np.array(uniforms), np.array(kept), config)
    return Screening(split, np.array(draws), np.array(sizes, np.int64), skipped)


def _fault(data: bytes, seen: set[bytes]) -> str | None:
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


def _check_enough(num_kept: int, skipped: dict, corpus: Corpus, config: TextDataConfig) -> None:
    left_out = "; ".join(
        f"{entry['count']} left out: {reason} (such as {entry['names'][0]})" for reason, entry in skipped.items()
    )
    if num_kept == 0:
        raise UserError(
            f"{corpus.name} holds no text",
            where="data.mix" if config.mix else "data.source",
            why=left_out or "it has no documents",
            hint="documents are UTF-8; data.pattern chooses among files, data.text_field among columns",
        )
    needed = 1 + (config.holdout_test > 0) + (config.holdout_validation > 0)
    if num_kept < needed:
        raise UserError(
            f"{corpus.name} holds {num_kept} document{'s' if num_kept > 1 else ''}, too few to hold any out",
            where="data.source",
            why=f"training, data.holdout_test and data.holdout_validation need {needed}"
            + (f"; {left_out}" if left_out else ""),
            hint="cut the text into several files, or set data.holdout_test=0 data.holdout_validation=0",
        )


def _assign(uniforms: np.ndarray, kept: np.ndarray, config: TextDataConfig) -> np.ndarray:
    """int8 split of each document: thresholds on its uniform number, with at least one document in every split."""
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
