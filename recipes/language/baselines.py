"""Baselines of a language model's score: an n-gram model and general compressors."""

from __future__ import annotations

import numpy as np

from language import counting
from language.ngram import NGram
from language.rivals import compressors


def baselines(ours, names: list[str], texts: list[bytes], trained_on: list[bytes], tokens: tuple, progress) -> dict:
    """The result of `Recipe.baselines`: bits per byte of each baseline, and a table of documents.

    Args:
        ours: the model's bits of each document, float64[N].
        names, texts: of the held-out documents.
        trained_on: the documents of the training split; empty if there are none, as for `evaluate --on`.
        tokens: (tokens of the training documents, of the held-out documents, the vocabulary's size), for `counting`.
    """
    packed = compressors(texts, progress)
    sizes = packed["documents"]["bytes"]
    columns, counted, notes = {"this model": ours}, {}, []
    if trained_on:
        ngram = NGram.fit(trained_on, progress=progress)
        name, bits = f"{ngram.order}-gram", ngram.bits_per_document(texts)
        columns[name], counted[name] = bits, float(bits.sum() / sizes.sum())
        notes = [
            f"the {name} model was fitted to {ngram.trained_bytes:,} bytes of the training text",
            "counted_tokens has no network: counts of the training text's tokens and of those of the document so far",
        ]
        progress(0, 1, "counting tokens")
        columns["counted_tokens"] = bits = counting.bits_per_document(*tokens)
        counted["counted_tokens"] = float(bits.sum() / sizes.sum())
    columns |= {name: packed["documents"][name] for name in ("xz_9", "gzip_9")}
    rows = [
        [names[i], int(sizes[i]), *(round(float(bits[i]) / max(int(sizes[i]), 1), 3) for bits in columns.values())]
        for i in np.argsort(-sizes)
    ]
    better = int(np.sum(ours < packed["documents"]["xz_9"]))
    return {
        **packed["bits_per_byte"],
        **counted,
        "tables": [{"title": "bits per byte of each held-out document",
                    "columns": ["document", "bytes", *columns], "rows": rows}],
        "notes": [
            f"smaller than xz -9 on {better} of {len(texts)} documents; a compressor starts each document without "
            f"context; xz_9_whole reads all of them as one file", *notes,
        ],
    }  # fmt: skip
