"""Rows of a fixed length from a prepared store: `TokenSource` is the `Source` of every text recipe.

Row r reads `sequence + 1` tokens from position r * sequence of its split's stream: inputs and, one further, targets,
so that every token but the first is a target exactly once. Everything else is index arithmetic on the documents'
offsets. A row may hold several documents: each is its own segment, attention never crosses, and the separator that
ends a document is a target predicted from that document alone. The last row is padded with separators of weight 0 and
segment 0; nothing is dropped.
"""

from __future__ import annotations

import hashlib

import numpy as np

from aurora_train.data.order import Part
from aurora_train.errors import UserError
from language.matches import Matches
from language.store import Store

_LAYOUT = 1  # part of the fingerprint: raise it when `take` returns other arrays for the same store


class TokenSource:
    """Rows of one split. `take` is a pure function of the indices and reads only the tokens it returns."""

    def __init__(
        self, store: Store, split: str, sequence: int, weights: dict[str, float] | None = None,
        matches: Matches | None = None,
    ):  # fmt: skip
        """`weights`: the weights of a mixture's sources by name; None for a single source. `matches`: of the store, if
        rows are to have them."""
        self.store, self.split, self.sequence, self._matches = store, split, sequence, matches
        self.tokenizer = store.tokenizer
        self._tokens, self._offsets = store.tokens(split), np.asarray(store.offsets(split))
        self.num_targets = len(self._tokens) - 1
        if self.num_targets == 0:
            raise UserError(
                f"the {split} split is empty", where=f"data.holdout_{split}", hint=f"data.holdout_{split}=0.01"
            )
        if split == "train" and self.num_targets < sequence:
            raise UserError(
                f"a row of {sequence} tokens is longer than the whole training text",
                where="data.sequence",
                why=f"it has {self.num_targets} tokens in {store.num_documents(split)} documents",
                hint=f"use data.sequence={max(2, self.num_targets // 4)}, or more text",
            )
        self.weights = None if weights is None else dict(sorted(weights.items()))
        self.mixture = None if weights is None else self._parts(self.weights)
        decisive = f"rows {_LAYOUT} {store.fingerprint} {split} {sequence}"
        decisive += "" if weights is None else f" {sorted(weights.items())}"
        decisive += "" if matches is None else f" {matches.fingerprint}"
        self.fingerprint = hashlib.sha256(decisive.encode()).hexdigest()

    def _parts(self, weights: dict[str, float]) -> tuple[Part, ...]:
        """The rows of each source. A row with the end of one source and the start of the next belongs to the first."""
        parts, document, counts = [], 0, self.store.manifest["mix"][self.split]
        for name in weights:  # sorted, as in the stream
            documents = counts.get(name, 0)
            ends = int(self._offsets[document]), int(self._offsets[document + documents])
            first, last = (-(-end // self.sequence) for end in ends)
            if ends[1] - ends[0] < self.sequence:
                raise UserError(
                    f"the source {name} has less than one row of {self.sequence} tokens", where=f"data.mix.{name}",
                    hint="use more text or a smaller data.sequence, or leave the source out",
                )  # fmt: skip
            parts.append(Part(weights[name], first, last - first))
            document += documents
        return tuple(parts)

    def __len__(self) -> int:
        return -(-self.num_targets // self.sequence)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """int64[B] -> tokens, targets, segments, positions int32[B, T] and weights float32[B, T].

        `segments` counts a row's documents from 1 (0 is padding); `positions` restarts at 0 with each document and
        with each row; `weights` is 1 for a real target, 0 for padding. With matches also `matches`
        int32[B, T, contexts, 3], as `Matches.at` gives them: of the whole document so far, what stands in earlier rows
        too.
        """
        starts = np.asarray(indices, np.int64)[:, None] * self.sequence
        places = starts + np.arange(self.sequence + 1)
        window = self._tokens[np.minimum(places, self.num_targets)].astype(np.int32)
        places = places[:, :-1]
        real = places < self.num_targets
        document = np.searchsorted(self._offsets, places, side="right") - 1
        begins = np.maximum(self._offsets[document], starts)
        beside = {}
        if self._matches is not None:
            matches = self._matches.at(self.split, np.minimum(places, self.num_targets - 1))
            beside = {"matches": np.where(real[..., None, None], matches, 0)}
        return beside | {
            "tokens": window[:, :-1],
            "targets": window[:, 1:],
            "segments": np.where(real, document - document[:, :1] + 1, 0).astype(np.int32),
            "positions": np.where(real, places - begins, 0).astype(np.int32),
            "weights": real.astype(np.float32),
        }

    def documents_of(self, index: int) -> list[str]:
        """Names of the documents of which row `index` holds a part, in order."""
        first = index * self.sequence
        last = min(first + self.sequence, self.num_targets) - 1
        low, high = np.searchsorted(self._offsets, [first, last], side="right") - 1
        return self.store.names(self.split)[low : high + 1]

    def reading(self, arrays: dict[str, np.ndarray], indices: np.ndarray, rows: int) -> dict:
        """Facts about the batch `arrays` of examples `indices`, and the documents and text of its first `rows` rows."""
        counts, tokenizer = self.store.manifest["splits"][self.split], self.store.manifest["tokenizer"]
        facts = {
            "source": self.store.manifest["source"],
            "left_out": self.store.manifest["skipped"],
            "tokenizer": f"{tokenizer['kind']}, {tokenizer['vocab_size']} entries",
            "targets": int(arrays["weights"].sum()),
            "padding": float(1 - arrays["weights"].mean()),
            "documents_in_split": counts["documents"],
            "bytes_per_token": counts["bytes"] / (counts["tokens"] - counts["documents"]),
            "segments_per_row": float(arrays["segments"].max(axis=1).mean()),
            "rows": [self._row(int(indices[i]), arrays, i) for i in range(rows)],
        }
        facts["summary"] = [
            f"{facts['source']}; tokenizer {facts['tokenizer']}; {facts['bytes_per_token']:.3f} bytes per token",
            f"{facts['targets']:,} targets, {facts['padding']:.2%} padding, {facts['segments_per_row']:.2f} documents "
            "per row",
        ]
        return facts

    def _row(self, index: int, arrays: dict[str, np.ndarray], i: int) -> dict:
        segments, tokens = arrays["segments"][i], arrays["tokens"][i]
        return {
            "index": index,
            "segments": [
                {
                    "document": name,
                    "tokens": int((segments == number).sum()),
                    "text": self.tokenizer.decode(tokens[segments == number]),
                }
                for number, name in enumerate(self.documents_of(index), 1)
            ],
            "last_target": self.tokenizer.decode(arrays["targets"][i][segments > 0][-1:]),
        }

    def describe(self) -> dict:
        """Provenance: the store's source, licence, counts and tokenizer, and this source's split and rows."""
        return self.store.describe() | {
            "split": self.split,
            "sequence": self.sequence,
            "rows": len(self),
            "rows_fingerprint": self.fingerprint,
            **({} if self.weights is None else {"weights": self.weights}),
        }
