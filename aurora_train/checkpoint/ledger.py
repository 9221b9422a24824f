"""Records which checkpoints a run has committed, and their scores, so that one that has vanished is noticed.

A folder without a manifest is either the remains of a killed save or a checkpoint that lost its manifest. Only a
separate record distinguishes the two: a step is entered here after it is sealed, and struck out before it is deleted.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import NamedTuple

import xxhash

from aurora_train.checkpoint import durable
from aurora_train.files import write_atomically

NAME = "index.json"


class Entries(NamedTuple):
    """`fault`: why the record cannot be read (then it is not known what was committed), or None."""

    committed: frozenset[int]
    scores: dict[int, float]
    fault: str | None = None
    lower_is_better: bool = True  # of the scores


class Ledger:
    """The record in a folder of checkpoints. Its methods may be called from several threads of one process."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._lock = threading.Lock()

    def read(self) -> Entries:
        """The entries on record; empty if nothing has been committed yet."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            # The first save may have been killed just before its entry was made; by the second, the record exists.
            sealed = [path for path in self.path.parent.glob("*") if path.name.isdigit() and durable.is_sealed(path)]
            return Entries(frozenset(), {}, "missing" if len(sealed) > 1 else None)
        except (OSError, UnicodeDecodeError) as error:
            return Entries(frozenset(), {}, f"unreadable ({error})")
        try:
            stored = json.loads(text)
            scores = {int(step): float(score) for step, score in stored["scores"].items()}
            if "committed" not in stored:  # written by a version that recorded only scores
                return Entries(frozenset(), scores)
            committed = frozenset(int(step) for step in stored["committed"])
            if stored["digest"] != _digest(stored["committed"], stored["scores"]):
                return Entries(frozenset(), {}, "its content has changed since it was written")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Entries(frozenset(), {}, f"unreadable ({error})")
        return Entries(committed, scores, lower_is_better=not stored.get("higher_is_better", False))

    def commit(self, step: int) -> None:
        """Enter a step that is sealed."""
        with self._lock:
            entries = self.read()
            self._write(entries.committed | {step}, entries.scores, entries.lower_is_better)

    def strike(self, steps) -> None:
        """Remove the entries of steps that are about to be deleted, or were set aside."""
        with self._lock:
            entries = self.read()
            if not entries.committed.isdisjoint(steps):
                self._write(entries.committed - set(steps), entries.scores, entries.lower_is_better)

    def attach_score(self, step: int, score: float, *, lower_is_better: bool = True) -> None:
        """Record the score of a step. Scores with the other direction measured something else and are dropped."""
        with self._lock:
            entries = self.read()
            comparable = entries.scores if entries.lower_is_better == lower_is_better else {}
            self._write(entries.committed, {**comparable, step: score}, lower_is_better)

    def begin_anew(self, steps) -> Path | None:
        """Set an unreadable record aside and start a new one with these steps. Returns the old one's new path."""
        with self._lock:
            aside = self.path.with_name(f"damaged-{NAME}") if self.path.exists() else None
            if aside is not None:
                self.path.replace(aside)
            self._write(frozenset(steps), {}, True)
            return aside

    def _write(self, committed, scores, lower_is_better: bool) -> None:
        steps, named = sorted(committed), {str(step): score for step, score in sorted(scores.items())}
        document = {"committed": steps, "scores": named, "digest": _digest(steps, named)}
        document |= {} if lower_is_better else {"higher_is_better": True}
        write_atomically(self.path, json.dumps(document))


def _digest(committed, scores) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps([committed, scores]).encode())
