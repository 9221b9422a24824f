"""Packed rows of pieces: made once, at preparation, within a source and a split; `PackedRows` is their `Source`.

Pieces are placed by best fit, longest first (`windows.pack`), so that few tokens of a row are padding. Each piece is a
segment of its own: attention and the state of linear layers do not cross from one to the next, and positions restart.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from aurora_train.data.order import Part
from aurora_train.errors import UserError
from language.pieces import Pieces
from language.store import SPLITS
from language.windows import pack

_LAYOUT = 1  # part of the fingerprint: raise it when `take` returns other arrays for the same pieces


def arrange(
    folder: Path, lengths: np.ndarray, split: np.ndarray, source: np.ndarray, sequence: int, names: list[str]
) -> dict:
    """Pack the pieces of every split and source, and write which pieces each row holds. As in `Encoding.arrange`.

    Args:
        sequence: T, inputs of a row; no piece is longer.
        names: of the sources, in their order.

    Returns {"packed_rows": rows by split and source, "fill": share of the rows' places that hold an input, by split}.
    """
    counts, fill = {}, {}
    for number, name in enumerate(SPLITS):
        pieces, starts, done, counts[name] = [], [], 0, {}
        for index, each in enumerate(names):
            here = np.flatnonzero((split == number) & (source == index))
            row, column, num_rows = pack(lengths[here], sequence)
            order = np.lexsort((column, row))
            starts.append(done + np.searchsorted(row[order], np.arange(num_rows)))
            pieces.append(here[order])
            done, counts[name][each] = done + len(here), num_rows
        packed = np.concatenate(pieces).astype(np.int64)
        np.save(folder / f"packed-{name}.npy", packed)
        np.save(folder / f"rows-{name}.npy", np.concatenate([*starts, [done]]).astype(np.int64))
        num_rows = sum(counts[name].values())
        fill[name] = float(lengths[packed].sum() / (num_rows * sequence)) if num_rows else None
    return {"packed_rows": counts, "fill": fill}


class PackedRows:
    """Rows of one split. `take` is a pure function of the indices and reads only the tokens it returns."""

    def __init__(self, store: Pieces, split: str, sequence: int, weights: dict[str, float] | None = None):
        """`weights`: the weights of a mixture's sources by name; None for a single source, or to ignore them."""
        self.store, self.split, self.sequence, self.tokenizer = store, split, sequence, store.tokenizer
        self._packed, self._rows = store.array(f"packed-{split}.npy"), store.array(f"rows-{split}.npy")
        if not len(self):
            where = "data.source" if split == "train" else f"data.holdout_{split}"
            hint = "use more data, or hold less of it out" if split == "train" else f"{where}=0.1"
            raise UserError(f"the {split} split is empty", where=where, hint=hint)
        self.weights = None if weights is None else dict(sorted(weights.items()))
        self.mixture = None if weights is None else self._parts()
        decisive = f"packed {_LAYOUT} {store.fingerprint} {split} {sequence}"
        decisive += "" if weights is None else f" {sorted(weights.items())}"
        self.fingerprint = hashlib.sha256(decisive.encode()).hexdigest()

    def _parts(self) -> tuple[Part, ...]:
        parts, first, counts = [], 0, self.store.manifest["packed_rows"][self.split]
        for name, weight in self.weights.items():  # sorted, as the rows are
            if not counts[name]:
                raise UserError(f"no row of the source {name} is left for the {self.split} split",
                                where=f"data.mix.{name}", hint="use more of it, or leave the source out")  # fmt: skip
            parts.append(Part(weight, first, counts[name]))
            first += counts[name]
        return tuple(parts)

    def __len__(self) -> int:
        return len(self._rows) - 1

    @property
    def learned_share(self) -> float:
        """Of the inputs in these rows, the share whose targets are learned. In a mixture each source counts by its
        weight, as if the rows of all were equally full."""
        counts = self.store.manifest["sources"]
        weights = self.weights or self.store.manifest["packed_rows"][self.split]
        shares = {name: counts[name]["learned"] / counts[name]["inputs"] for name, weight in weights.items() if weight}
        return sum(weights[name] * share for name, share in shares.items()) / sum(weights.values())

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """int64[B] -> tokens, targets, segments, positions int32[B, T] and weights float32[B, T].

        `segments` counts a row's pieces from 1 (0 is padding); `positions` restarts at 0 with each; `weights` is 1 for
        a learned target.
        """
        pieces = [self.pieces_of(index) for index in indices]
        counts, chosen = np.array([len(each) for each in pieces]), np.concatenate(pieces)
        row = np.repeat(np.arange(len(indices)), counts)
        lengths = self.store.offsets[chosen + 1] - self.store.offsets[chosen] - 1
        ends = np.cumsum(lengths)
        column = ends - lengths - (ends - lengths)[np.searchsorted(row, row)]
        return self.store.laid_out(chosen, row, column, (len(indices), self.sequence))

    def pieces_of(self, index: int) -> np.ndarray:
        """int64: the numbers of the pieces in a row, in order; the first one is segment 1."""
        return np.asarray(self._packed[self._rows[index] : self._rows[index + 1]])

    def reading(self, arrays: dict[str, np.ndarray], indices: np.ndarray, rows: int) -> dict:
        """Facts about the batch `arrays` of examples `indices`, and the conversations of its first `rows` rows."""
        tokenizer, fill = self.store.manifest["tokenizer"], self.store.manifest["fill"][self.split]
        learned, real = int(arrays["weights"].sum()), int((arrays["segments"] > 0).sum())
        facts = {
            "source": self.store.manifest["source"], "sources": self.store.manifest["sources"],
            "targets": learned, "padding": 1 - real / arrays["segments"].size, "fill": fill,
            "rows": [{"index": int(index), "segments": self.shown(int(index))} for index in indices[:rows]],
        }  # fmt: skip
        facts["summary"] = [
            f"{facts['source']}; tokenizer of {tokenizer['vocab_size']:,} entries; rows of {self.sequence} tokens, "
            f"{fill:.1%} full",
            *self.store.summary(),
            f"here {learned:,} of {real:,} tokens are learned, {facts['padding']:.2%} padding, "
            f"{float(arrays['segments'].max(axis=1).mean()):.2f} conversations per row",
        ]
        return facts

    def shown(self, index: int) -> list[dict]:
        """The conversations of a row: the place in the data, the text, and its parts, [text, is it learned]."""
        parts = {piece: self.store.shown(piece) for piece in self.pieces_of(index)}
        return [
            {"document": self.store.place(piece), "tokens": len(self.store.ids(piece)),
             "text": "".join(text for text, _ in each), "parts": [list(part) for part in each]}
            for piece, each in parts.items()
        ]  # fmt: skip

    def describe(self) -> dict:
        """Provenance: the sources, licence, counts and tokenizer, this split's rows, and the first one in text."""
        return self.store.describe() | {
            "split": self.split, "sequence": self.sequence, "rows": len(self), "rows_fingerprint": self.fingerprint,
            "learned": self.shown(0), **({} if self.weights is None else {"weights": self.weights}),
        }  # fmt: skip
