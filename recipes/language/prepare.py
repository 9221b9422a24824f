"""Turns a source into a prepared store. `prepare(config, cache)` is the only entry, and may be called at every start.

If the store for this source, tokenizer and split exists, it is opened and only file times are read; otherwise it is
made, as `aurora_train.data.prepared` makes a folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from aurora_train.data.prepared import changed, key_of, made, writing
from aurora_train.errors import UserError
from language import tokenizers
from language.corpus import Corpus, Mixture, open_corpus
from language.screening import Screening, left_out, screen
from language.settings import TextDataConfig, TokenizerConfig
from language.store import FORMAT, SPLITS, Store

log = logging.getLogger("aurora_train")

_BATCH_BYTES = 1 << 22


def _bpe_training_bytes(vocab: int) -> int:
    """Bytes of text that suffice for a vocabulary: for Python at 2048 entries, 31 MB gave only 0.4 % more bytes per
    token than this 16 MB."""
    return max(1 << 24, 4096 * vocab)


def prepare(
    config: TextDataConfig, cache: Path, base: Path | None = None, progress: Callable = lambda done, total, what: None,
    *, inherited: tokenizers.Tokenizer | None = None,
) -> Store:  # fmt: skip
    """Make the store for `config` below the folder `cache`, or open the existing one.

    `base` is the folder for relative paths (the config file's); `inherited` is the tokenizer of the run from which a
    new one starts. Raises UserError for every fault of the source, and for a `cache` that cannot be written.
    """
    corpus = open_corpus(config, base)
    known = tokenizers.known_tokenizer(config.tokenizer, base, inherited)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        listing = corpus.listing(cache, progress)
    key = _key(config, known, listing, corpus.newly_read())

    def write(folder: Path) -> dict:
        manifest = _write(corpus, config, known, key, folder, progress)
        with writing(cache):
            if corpus.listing(cache, progress) != listing:
                raise changed(corpus.name)
        return manifest

    store = made(Store, cache / f"text-{key[:16]}", write, progress)
    for line in _said(store.manifest, config):
        log.warning("%s", line)
    return store


def _said(manifest: dict, config: TextDataConfig) -> Iterator[str]:
    """Lines on how the store differs from the source, and on settings without effect."""
    num_cut = manifest.get("cut_documents", 0)
    kept = num_cut or sum(split["documents"] for split in manifest["splits"].values())
    yield from filter(None, [left_out(manifest["skipped"], kept)])
    if num_cut:
        shares = {"test": config.holdout_test, "validation": config.holdout_validation}
        held = " and before that ".join(f"{100 * share:g} % for {name}" for name, share in shares.items() if share)
        yield (
            f"{manifest['source']}: {num_cut} document{'s are' if num_cut > 1 else ' is'} too few to hold whole ones "
            f"out; the end of {'each' if num_cut > 1 else 'it'} is held out: {held}"
        )
    tokenizer, vocab = manifest["tokenizer"], config.tokenizer.vocab
    expected = (TokenizerConfig().vocab, tokenizer["vocab_size"])
    if tokenizer["kind"] != "bpe" and config.tokenizer.kind != "inherited" and vocab not in expected:
        yield (
            f"data.tokenizer.vocab={vocab} is not used: it is for kind: bpe, and the tokenizer of kind: "
            f"{tokenizer['kind']} has {tokenizer['vocab_size']:,} entries"
        )


def _kind(known: tokenizers.Tokenizer | None) -> str:
    """The kind of a tokenizer, as recorded in a store."""
    return "bpe" if known is None else "byte" if known.backend is None else "file"


def tokenizer_record(tokenizer: tokenizers.Tokenizer, known: tokenizers.Tokenizer | None) -> dict:
    """A tokenizer as a manifest records it; `known` is None if it was trained here."""
    return {
        "kind": _kind(known), "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id,
        "dtype": str(tokenizer.dtype), "sha256": tokenizer.sha256,
    }  # fmt: skip


def _key(config: TextDataConfig, known, listing: list, newly_read: list[str]) -> str:
    """sha256 hex over all that decides a store's contents. Not sequence and batch, which are index arithmetic."""
    tokenizer = {"kind": _kind(known)}
    if known is None:
        vocab, split = config.tokenizer.vocab, config.tokenizer.split
        split = tokenizers.SPLIT if split == "code" else split
        tokenizer |= {"vocab": vocab, "split": split, "trained_on": _bpe_training_bytes(vocab)}
    elif known.backend is not None:
        tokenizer["sha256"] = known.sha256
    decisive = {
        "format": FORMAT,
        "listing": listing,
        "tokenizer": tokenizer,
        "text_field": config.text_field,
        "holdout": [config.holdout_test, config.holdout_validation],
        "max_documents": config.max_documents,
    }
    if newly_read:
        decisive["newly_read"] = newly_read
    if config.mix:  # not the weights, which are index arithmetic too
        decisive["mix"] = {name: [part.text_field, part.max_documents] for name, part in config.mix.items()}
    return key_of(decisive)


def _write(corpus: Corpus | Mixture, config: TextDataConfig, known, key: str, folder: Path, progress: Callable) -> dict:
    """Write every file of the store into `folder`; returns its manifest."""
    screening = screen(corpus, config, progress)
    tokenizer = known or _trained(config, screening, progress)
    splits, parts, num_lossy = _write_splits(tokenizer, screening, folder, progress)
    with writing(folder.parent):
        tokenizer.save(folder)
    return {
        "format": FORMAT,
        "key": key,
        "source": corpus.name,
        "licence": corpus.licence,
        "splits": splits,
        "skipped": screening.skipped,
        **({"cut_documents": screening.num_cut} if screening.num_cut else {}),
        **({"mix": parts} if config.mix else {}),
        "tokenizer": {**tokenizer_record(tokenizer, known), "lossy_heldout_documents": num_lossy},
    }


def _trained(config, screening: Screening, progress: Callable) -> tokenizers.Tokenizer:
    """Train a tokenizer; if there is more training text than needed, on a deterministic sample by hash of the id."""
    chosen = np.zeros(len(screening.split), bool)
    shuffled = np.argsort(screening.draw, kind="stable")
    shuffled = shuffled[screening.split[shuffled] == SPLITS.index("train")]
    before = np.cumsum(screening.num_bytes[shuffled]) - screening.num_bytes[shuffled]
    chosen[shuffled[before < _bpe_training_bytes(config.tokenizer.vocab)]] = True

    def texts() -> Iterator[list[str]]:
        for batch in _batches(screening, chosen, progress, "training the tokenizer"):
            yield [data.decode() for _, _, data in batch]

    return tokenizers.train_bpe(texts(), config.tokenizer.vocab, config.tokenizer.split)


def _batches(screening: Screening, chosen: np.ndarray, progress: Callable, what: str) -> Iterator[list[tuple]]:
    """Batches of about 4 MB of (ordinal in the source, id, bytes) of the chosen documents."""
    batch, size, total = [], 0, int(chosen.sum())
    done = 0
    for ordinal, (name, data) in zip(range(len(chosen)), screening.documents(), strict=False):
        if chosen[ordinal]:
            batch.append((ordinal, name, data))
            size += len(data)
        if size >= _BATCH_BYTES:
            yield batch
            done += len(batch)
            progress(done, total, what)
            batch, size = [], 0
    if batch:
        yield batch
    progress(total, total, what)


class _SplitWriter:
    """The growing files of one split. Documents' lengths stay in memory (16 bytes each), tokens and text do not."""

    def __init__(self, folder: Path, split: str, tokenizer: tokenizers.Tokenizer):
        self.folder, self.split = folder, split
        self.separator = np.array([tokenizer.eos_id], tokenizer.dtype)
        self.lengths, self.num_bytes = [], []
        self.parts: dict[str, int] = {}  # documents by the first part of their name, in a mixture the source
        self.tokens = (folder / f"tokens-{split}.bin").open("wb")
        self.names = (folder / f"names-{split}.jsonl").open("w")
        self.text = None if split == "train" else (folder / f"text-{split}.bin").open("wb")

    def add(self, name: str, data: bytes, ids: np.ndarray) -> None:
        self.tokens.write(self.separator.tobytes())
        self.tokens.write(ids.tobytes())
        self.names.write(json.dumps(name) + "\n")
        if self.text:
            self.text.write(data)
        self.lengths.append(1 + len(ids))
        source = name.partition("/")[0]
        self.parts[source] = self.parts.get(source, 0) + 1
        self.num_bytes.append(len(data))

    def finish(self) -> dict:
        self.tokens.write(self.separator.tobytes())
        offsets = np.concatenate([[0], np.cumsum(np.array(self.lengths, np.int64))]).astype(np.int64)
        np.save(self.folder / f"documents-{self.split}.npy", offsets)
        np.save(self.folder / f"bytes-{self.split}.npy", np.array(self.num_bytes, np.int64))
        for file in filter(None, (self.tokens, self.names, self.text)):
            file.close()
        return {"documents": len(self.lengths), "bytes": sum(self.num_bytes), "tokens": int(offsets[-1])}


def _write_splits(tokenizer, screening: Screening, folder: Path, progress: Callable) -> tuple[dict, dict, int]:
    """Tokenize every kept document into its split's files.

    Returns (counts per split, documents per split and source of a mixture, number of held-out documents that do not
    survive encoding and decoding).
    """
    with writing(folder.parent):
        writers = [_SplitWriter(folder, split, tokenizer) for split in SPLITS]
    num_lossy = 0
    for batch in _batches(screening, screening.split >= 0, progress, "tokenizing"):
        texts = [data.decode() for _, _, data in batch]
        encoded = tokenizer.encode_batch(texts)
        with writing(folder.parent):
            for (ordinal, name, data), text, ids in zip(batch, texts, encoded, strict=True):
                if tokenizer.eos_id in ids:
                    raise _spelled(name, tokenizer)
                writer = writers[screening.split[ordinal]]
                writer.add(name, data, ids)
                num_lossy += writer.split != "train" and tokenizer.decode(ids) != text
    if num_lossy:
        log.warning(
            "the tokenizer does not reproduce %d held-out documents exactly: bits per byte are not comparable",
            num_lossy,
        )
    with writing(folder.parent):
        parts = {writer.split: writer.parts for writer in writers}
        return {writer.split: writer.finish() for writer in writers}, parts, num_lossy


def _spelled(name: str, tokenizer: tokenizers.Tokenizer) -> UserError:
    return UserError(
        f"{name} holds `{tokenizer.separator}`, which this tokenizer turns into the token that ends a document",
        where="data.tokenizer.separator",
        hint="choose another of its tokens as data.tokenizer.separator, or exclude the document with data.pattern",
    )
