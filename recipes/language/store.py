"""The prepared store: tokens of every split on disk, memory-mapped, with a manifest of each file's size and hash.

A split is one stream of tokens. Each document is the separator followed by its tokens, and one more separator ends the
stream. So document i is `tokens[offsets[i] : offsets[i + 1] + 1]`, including the separators on both sides: the one that
ends a document also begins the next. A store is complete or absent: `prepare` renames it into place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from language.prepared import PreparedText

FORMAT = 1
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """One whole document: `tokens` begin and end with the separator, `num_bytes` counts its UTF-8 text."""

    name: str
    num_bytes: int
    tokens: np.ndarray


class Store(PreparedText):
    """An open store. The manifest also has the licence and the documents left out."""

    @property
    def held_out(self) -> str:
        """A description of the documents in the test and validation splits."""
        is_cut = self.manifest.get("cut_documents")
        return "ends of documents held out" if is_cut else "whole documents held out by a hash of their path"

    def tokens(self, split: str) -> np.ndarray:
        """uint16 or uint32 [tokens + 1]: the stream of the split, with the separator that ends it."""
        return self.array(f"tokens-{split}.bin")

    def offsets(self, split: str) -> np.ndarray:
        """int64[documents + 1]: where each document's separator stands in `tokens`; the last entry is the end."""
        return self.array(f"documents-{split}.npy")

    def document_bytes(self, split: str) -> np.ndarray:
        """int64[documents]: UTF-8 bytes of each document's text."""
        return self.array(f"bytes-{split}.npy")

    def names(self, split: str) -> list[str]:
        """The documents' ids, in the order of the stream."""
        return self.lines(f"names-{split}.jsonl")

    def num_documents(self, split: str) -> int:
        return len(self.document_bytes(split))

    def documents(self, split: str) -> Iterator[Document]:
        """Every document of the split, whole, in order."""
        tokens, offsets = self.tokens(split), self.offsets(split)
        for i, (name, num_bytes) in enumerate(zip(self.names(split), self.document_bytes(split), strict=True)):
            yield Document(name, int(num_bytes), np.asarray(tokens[offsets[i] : offsets[i + 1] + 1]))

    def text(self, split: str, i: int) -> bytes:
        """The raw bytes of document `i`.

        Held-out text is kept verbatim, so a compressor sees the exact bytes of the file. Training text is decoded
        from its tokens: equal to the file for byte and bpe tokenizers, not always for a user's tokenizer.json.
        """
        if split == "train":
            offsets = self.offsets(split)
            return self.tokenizer.decode(self.tokens(split)[offsets[i] + 1 : offsets[i + 1]]).encode()
        ends = np.cumsum(self.document_bytes(split))
        with (self.folder / f"text-{split}.bin").open("rb") as file:
            file.seek(int(ends[i] - self.document_bytes(split)[i]))
            return file.read(int(self.document_bytes(split)[i]))
