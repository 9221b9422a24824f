"""The prepared store: tokens of every split on disk, memory-mapped, with a manifest of each file's size and hash.

A split is one stream of tokens. Each document is the separator followed by its tokens, and one more separator ends the
stream. So document i is `tokens[offsets[i] : offsets[i + 1] + 1]`, including the separators on both sides: the one that
ends a document also begins the next. A store is complete or absent: `prepare` renames it into place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from aurora_train.errors import UserError
from language.tokenizers import Tokenizer

FORMAT = 1
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
_HASH_AT_MOST_BYTES = 1 << 28  # larger files are checked by size when opened, and by hash in `Store.verify(full=True)`
_verified: set[tuple[str, str]] = set()


class DamagedStore(UserError):
    """Raised if a store's files differ from those in its manifest."""


@dataclass(frozen=True)
class Document:
    """One whole document: `tokens` begin and end with the separator, `num_bytes` counts its UTF-8 text."""

    name: str
    num_bytes: int
    tokens: np.ndarray


class Store:
    """An open, read-only store. Arrays are read from disk as they are accessed.

    Attributes:
        manifest: source, licence, counts per split, skipped documents, tokenizer, files; JSON-able.
        fingerprint: sha256 hex over the store's key and the hash of every file.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / MANIFEST).read_text())
        except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self._damaged(f"{MANIFEST} is missing or cut short") from error
        if fingerprint_of(self.manifest) != self.manifest.get("fingerprint"):
            raise self._damaged(f"{MANIFEST} was changed")
        self.fingerprint = self.manifest["fingerprint"]
        self.verify()
        self._arrays: dict[str, np.ndarray] = {}

    def verify(self, full: bool = False) -> None:
        """Compare every file with the manifest: sizes always, hashes once per process or if `full`.

        Raises DamagedStore, which names the first file that differs.
        """
        seen = (str(self.folder), self.fingerprint)
        for name, recorded in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != recorded["bytes"]:
                raise self._damaged(f"{name} is missing or has another size")
            if full or (seen not in _verified and recorded["bytes"] <= _HASH_AT_MOST_BYTES):
                if hash_file(path) != recorded["xxh3"]:
                    raise self._damaged(f"{name} has other contents")
        _verified.add(seen)

    def _damaged(self, what: str) -> DamagedStore:
        return DamagedStore(
            f"the prepared data is damaged: {what}",
            where=str(self.folder),
            hint="delete this folder; the next run prepares it again from the source",
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)

    @property
    def held_out(self) -> str:
        """A description of the documents in the test and validation splits."""
        is_cut = self.manifest.get("cut_documents")
        return "ends of documents held out" if is_cut else "whole documents held out by a hash of their path"

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            path = self.folder / name
            if path.suffix == ".npy":
                self._arrays[name] = np.load(path, mmap_mode="r")
            else:
                dtype = np.dtype(self.manifest["tokenizer"]["dtype"])
                self._arrays[name] = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
        return self._arrays[name]

    def tokens(self, split: str) -> np.ndarray:
        """uint16 or uint32 [tokens + 1]: the stream of the split, with the separator that ends it."""
        return self._array(f"tokens-{split}.bin")

    def offsets(self, split: str) -> np.ndarray:
        """int64[documents + 1]: where each document's separator stands in `tokens`; the last entry is the end."""
        return self._array(f"documents-{split}.npy")

    def document_bytes(self, split: str) -> np.ndarray:
        """int64[documents]: UTF-8 bytes of each document's text."""
        return self._array(f"bytes-{split}.npy")

    def names(self, split: str) -> list[str]:
        """The documents' ids, in the order of the stream."""
        key = f"names-{split}"
        if key not in self._arrays:
            with (self.folder / f"{key}.jsonl").open() as file:
                self._arrays[key] = [json.loads(line) for line in file]
        return self._arrays[key]

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

    def describe(self) -> dict:
        """The manifest without its list of files, for provenance."""
        return {name: value for name, value in self.manifest.items() if name != "files"} | {"folder": str(self.folder)}


def fingerprint_of(manifest: dict) -> str:
    """sha256 hex over the key and the files' sizes and hashes, which decide every array read from the store."""
    decisive = {name: manifest.get(name) for name in ("format", "key", "files")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """xxh3-64 hex of a file: detects accidents, not malice."""
    hasher = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()
