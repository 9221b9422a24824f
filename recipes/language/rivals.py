"""What a language score is set beside: general compressors on the same held-out documents, and Python's own parser.

Sizes are whole files: container, header and checksum are counted, as `xz -9 FILE` and `gzip -9 < FILE` would write
them. The one thing to know: a compressor begins every document knowing nothing, a trained model does not; the figure
over the whole text in one piece is there to show how much of the difference that is.
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

# `xz` writes its own format with a CRC64, as FORMAT_XZ does by default. xz 5.6 uses threads and then notes a block's
# sizes in its header: up to 16 bytes more than here. `gzip` has its own deflate; a test holds zlib's within 1 % of it.
_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "xz_9": lambda text: lzma.compress(text, format=lzma.FORMAT_XZ, preset=9),
    "gzip_9": lambda text: gzip.compress(text, 9, mtime=0),
    "bzip2_9": lambda text: bz2.compress(text, 9),
}


def compressors(texts: Sequence[bytes], progress: Callable = lambda done, total, what: None) -> dict:
    """Compress each document by itself, and all of them in one piece.

    Returns:
        `bits_per_byte`: name -> float, all compressed bits over all bytes of text: `xz_9`, `gzip_9`, `bzip2_9` with
        each document by itself; `xz_9_whole` for the documents end to end, in order, as one file.
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

    A sample counts when it parses as it stands, or when both parts of it pass: its last line goes (a token limit may
    have cut it in the middle), and from the complete lines only the last top-level statement may be unfinished: what
    is before it must parse, and it must be cut short, not wrong. In either case at least one complete top-level
    statement must be there, so neither an open string that swallows all that follows nor an empty sample counts.
    """
    return sum(map(_begins_a_module, texts)) / len(texts)


def _begins_a_module(text: str) -> bool:
    if _statements(text):
        return True
    lines = text.split("\n")[:-1]
    if _statements("\n".join(lines)):
        return True
    # Before an `else:` the text parses as well, and `else:` alone is wrong: so every place is tried, not the last.
    starts = [i for i, line in enumerate(lines) if i and line and line[0] not in " \t"]
    return any(
        _statements("\n".join(lines[:start])) and _is_cut_short("\n".join(lines[start:]) + "\n")
        for start in reversed(starts)
    )


def _statements(text: str) -> int:
    """How many top-level statements `text` holds; 0 when it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return len(ast.parse(text).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # all four are documented of ast.parse
            return 0


def _is_cut_short(text: str) -> bool:
    """True when the only fault of `text` is that it ends too early: the question an interactive prompt asks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "<sample>", "exec", PyCF_ALLOW_INCOMPLETE_INPUT | PyCF_DONT_IMPLY_DEDENT | ast.PyCF_ONLY_AST)
        except SyntaxError as error:
            return "incomplete input" in str(error)
        except (ValueError, RecursionError, MemoryError):
            return False
    return True
