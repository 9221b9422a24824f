"""Conversations as token ids, of which some are learned, on disk: what `prepare_pieces.prepare` wrote.

A row of the data is one piece, or several where a template renders an earlier answer otherwise than when it was the
last. A piece ends with its last learned token, because nothing after it is a target.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from language.prepared import PreparedText
from language.store import SPLITS
from language.tokenizers import Tokenizer
from language.windows import laid_out

_CONTEXT = 8  # tokens before a part with which it is decoded; a character has at most 4


class Pieces(PreparedText):
    """The pieces of all splits, in the order of the sources.

    The manifest has "sources", counts by the name of each source, and "splits", counts by split.
    """

    @property
    def offsets(self) -> np.ndarray:
        """int64[pieces + 1]: where each piece begins in the stream of tokens; the last entry is the end."""
        return self.array("offsets.npy")

    @property
    def conversation(self) -> np.ndarray:
        """int64[pieces]: the number of the conversation that each piece belongs to. Those left out have no number."""
        return self.array("conversation.npy")

    @property
    def source(self) -> np.ndarray:
        """int16[pieces]: the source of each piece, as its number among the names in the manifest's "sources"."""
        return self.array("source.npy")

    def of_split(self, split: str) -> np.ndarray:
        """int64: the pieces of a split, in the order of the sources."""
        return np.flatnonzero(self.array("split.npy") == SPLITS.index(split))

    def place(self, piece: int) -> str:
        """Where the piece's conversation stands in the data: "line 12 of chats.jsonl"."""
        return self.lines("places.jsonl")[self.conversation[piece]]

    def ids(self, piece: int) -> np.ndarray:
        """uint16 or uint32[n], the piece's tokens."""
        return self.array("tokens.bin")[self.offsets[piece] : self.offsets[piece + 1]]

    def learned(self, piece: int) -> np.ndarray:
        """bool[n]: the tokens of the piece on which there is a loss; never the first, which nothing precedes."""
        return self.array("learned.bin", "bool")[self.offsets[piece] : self.offsets[piece + 1]]

    def laid_out(self, pieces: np.ndarray, row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> dict:
        """`windows.laid_out` of the pieces, whose learned tokens have weight 1."""
        counted = np.concatenate([self.learned(piece)[1:] for piece in pieces])
        return laid_out([self.ids(piece) for piece in pieces], row, column, counted, shape)

    def shown(self, piece: int) -> list[tuple[str, bool]]:
        """The piece's text, cut where its learned tokens begin and end: (text, is it learned)."""
        return shown(self.tokenizer, self.ids(piece), self.learned(piece))

    def texts(self, split: str) -> Iterator[tuple[str, str]]:
        """(place, text) of every piece of a split."""
        for piece in self.of_split(split):
            yield self.place(piece), "".join(text for text, _ in self.shown(piece))

    def answer_bytes(self, piece: int) -> int:
        """UTF-8 bytes of the learned text, without the control tokens in it."""
        text = "".join(text for text, is_learned in self.shown(piece) if is_learned)
        for control in self.tokenizer.controls:
            text = text.replace(control, "")
        return len(text.encode())

    def summary(self) -> list[str]:
        """For each source, a line on what was read and what became of it."""
        return [_summary(name, counts) for name, counts in self.manifest["sources"].items()]

    def losses(self) -> list[str]:
        """Those lines of the summary that tell of a row which is not learned, or not all of it."""
        counts = self.manifest["sources"].values()
        lost = [one["kept"] < one["rows"] or one["cut"] > 0 or bool(one["unwritten"]) for one in counts]
        return [line for line, is_lost in zip(self.summary(), lost, strict=True) if is_lost]


def shown(tokenizer: Tokenizer, ids: np.ndarray, learned: np.ndarray) -> list[tuple[str, bool]]:
    """The text of `ids`, cut where the learned tokens begin and end.

    A part is decoded with a few tokens before it, because a decoder may treat the first token of a text differently.
    """
    cuts, parts = [*(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)], []
    for start, end in zip([0, *cuts], cuts, strict=False):
        begin = max(start - _CONTEXT, 0)
        before, text = tokenizer.decode(ids[begin:start]), tokenizer.decode(ids[begin:end])
        parts.append((text[len(os.path.commonprefix([before, text])) :], bool(learned[start])))
    return parts


def _summary(name: str, counts: dict) -> str:
    kept, rows = f"{counts['kept']:,}", f"{counts['rows']:,}"
    line = f"{name}: " if name else ""
    line += f"{kept} of {rows} rows are learned" if kept != rows else f"all {rows} rows are learned"
    if counts["in_several_pieces"]:
        line += f", {counts['in_several_pieces']:,} of them as one row per answer"
    if counts["cut"]:
        line += f", {counts['cut']:,} of them without their end (data.overlong)"
    if counts["nothing_learned"]:
        line += f"; in {counts['nothing_learned']:,} nothing is learned"
    line += "".join(f"; in {number:,} the template does not write {what}"
                    for what, number in sorted(counts["unwritten"].items()))  # fmt: skip
    reasons = sorted(counts["left_out"].items())
    return line + "".join(f"; {number:,} left out: {why}" for why, number in reasons)
