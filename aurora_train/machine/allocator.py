"""Memory that a step frees, kept for the next one: on a CPU, XLA allocates its buffers anew in every step.

glibc gives those of 128 KiB and more back to the kernel at once, and the next step pays a page fault for every 4 KiB of
them: a quarter of the time of a small model's step (`benchmarks/allocator.py`). Up to 32 MiB, glibc's limit, are kept.
Keeping larger ones too took the faults of a 10M step away and 4.1 GB where 1.3 GB were planned: holes of a heap do not
fit the next step's buffer.
"""

from __future__ import annotations

import ctypes
import os
import sys

# malloc.h; none of them is in Python's standard library.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_KEPT = 32 * 2**20  # bytes
_TOP_PAD = 256 * 2**20  # bytes by which the heap grows at a time; untouched ones take no memory


def keep_freed_memory(gpus: list[str]) -> bool:
    """Whether glibc now keeps what is freed. Call it before any thread is started: each may make a heap of its own.

    Nothing is done where a GPU computes (what the host frees there should go back), where the allocator is another,
    or where the user has set it up.
    """
    theirs = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if gpus or theirs or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False  # another libc
    settings = {_M_MMAP_THRESHOLD: _KEPT, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: _TOP_PAD, _M_ARENA_MAX: 1}
    return all([mallopt(name, value) for name, value in settings.items()])
