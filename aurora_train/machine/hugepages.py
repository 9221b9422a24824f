"""Enables pages of 2 MB for the buffers of XLA:CPU, which it allocates again in every step and the kernel maps page by
page.

If the kernel leaves the choice to the program (`madvise`, the default of Ubuntu and DGX OS), glibc requests such pages,
but only if its tunable is set when the process starts. So the process is restarted once, before anything heavy is
imported: same pid, same arguments, some 20 ms. Figures: docs/performance.md.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SINCE = (2, 35)  # first version of glibc with this tunable


def tunables(now: str | None, kernel: str, libc: tuple[str, str]) -> str | None:
    """The value that GLIBC_TUNABLES should have, or None if it should stay as it is.

    Args:
        now: its present value; a user's own choice of this tunable is kept.
        kernel: the text of /sys/kernel/mm/transparent_hugepage/enabled; only "[madvise]" leaves it to the program.
        libc: name and version, from `platform.libc_ver`.
    """
    name, version = libc
    old = name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < _SINCE
    if old or "[madvise]" not in kernel or _TUNABLE in (now or ""):
        return None
    return f"{now}:{_TUNABLE}=1" if now else f"{_TUNABLE}=1"


def restart_with_huge_pages() -> None:
    """Restart this process with the tunable set. Returns if that would gain nothing or cannot be done."""
    try:
        wanted = tunables(os.environ.get("GLIBC_TUNABLES"), _SETTING.read_text(), platform.libc_ver())
        if wanted is None or not sys.executable or not sys.orig_argv:
            return
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": wanted})
    except (OSError, ValueError):
        return  # the kernel file is missing, a version is not a number, or exec is denied: slower, but never wrong
