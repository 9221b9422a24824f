"""Comparisons for a language model: general compressors on the same held-out documents, and Python's own parser.

Sizes are whole files, including container, header and checksum, as `xz -9 FILE` and `gzip -9 < FILE` would write them.
Note that a compressor begins every document without any knowledge, unlike a trained model; the figure over the whole
text in one piece shows how much of the difference is due to that.
"""

from __future__ import annotations

import ast
import bz2
import gzip
import lzma
import warnings
from codeop import PyCF_ALLOW_INCOMPLETE_INPUT, PyCF_DONT_IMPLY_DEDENT
from collections.abc import Callable, Sequence

import numpy as np

# `xz` writes its own format with a CRC64, as FORMAT_XZ does by default. xz 5.6 uses threads and then records a block's
# sizes in its header: up to 16 bytes more than here. `gzip` has its own deflate; a test keeps zlib's within 1 % of it.
_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "xz_9": lambda text: lzma.compress(text, format=lzma.FORMAT_XZ, preset=9),
    "gzip_9": lambda text: gzip.compress(text, 9, mtime=0),
    "bzip2_9": lambda text: bz2.compress(text, 9),
}


def compressors(texts: Sequence[bytes], progress: Callable = lambda done, total, what: None) -> dict:
    """Compress each document by itself, and all of them in one piece.

    Returns:
        `bits_per_byte`: name -> float, all compressed bits over all bytes of text: `xz_9`, `gzip_9`, `bzip2_9` with
        each document by itself; `xz_9_whole` for the concatenated documents, in order, as one file.
        `documents`: `bytes` int64[n], and for each of the three its compressed size in bits, int64[n].
    """
    num_bytes = np.array([len(text) for text in texts], np.int64)
    documents = {"bytes": num_bytes} | {name: np.zeros(len(texts), np.int64) for name in _COMPRESSORS}
    for i, text in enumerate(texts):
        progress(i, len(texts), "compressing held-out documents")
        for name, compress in _COMPRESSORS.items():
            documents[name][i] = 8 * len(compress(text))
    bits = {name: documents[name].sum() for name in _COMPRESSORS}
    bits["xz_9_whole"] = 8 * len(_COMPRESSORS["xz_9"](b"".join(texts)))
    return {"bits_per_byte": {name: float(n / num_bytes.sum()) for name, n in bits.items()}, "documents": documents}


def python_parse_share(texts: Sequence[str]) -> float:
    """Share of samples that are the beginning of a Python module, as the running interpreter's parser sees it.

    A sample counts if it parses unchanged. Otherwise its last line is dropped (a token limit may have cut it), and of
    the complete lines only the last top-level statement may be unfinished: everything before it must parse, and it
    must be incomplete, not wrong. In either case there must be at least one complete top-level statement, so neither
    an open string that swallows the rest nor an empty sample counts.
    """
    return sum(map(_begins_a_module, texts)) / len(texts)


def _begins_a_module(text: str) -> bool:
    if _statements(text):
        return True
    lines = text.split("\n")[:-1]
    if _statements("\n".join(lines)):
        return True
    # The text before an `else:` parses too, but `else:` alone is wrong: so every place is tried, not only the last.
    starts = [i for i, line in enumerate(lines) if i and line and line[0] not in " \t"]
    return any(
        _statements("\n".join(lines[:start])) and _is_cut_short("\n".join(lines[start:]) + "\n")
        for start in reversed(starts)
    )


def _statements(text: str) -> int:
    """The number of top-level statements in `text`; 0 if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return len(ast.parse(text).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # all four are documented for ast.parse
            return 0


def _is_cut_short(text: str) -> bool:
    """Whether the only fault of `text` is that it ends too early, which an interactive prompt also checks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "<sample>", "exec", PyCF_ALLOW_INCOMPLETE_INPUT | PyCF_DONT_IMPLY_DEDENT | ast.PyCF_ONLY_AST)
        except SyntaxError as error:
            return "incomplete input" in str(error)
        except (ValueError, RecursionError, MemoryError):
            return False
    return True
