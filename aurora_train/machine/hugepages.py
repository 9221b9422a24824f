"""Pages of 2 MB for what XLA:CPU allocates: it takes its buffers anew in every step, and the kernel gives them page by
page.

glibc asks for them where the kernel leaves it to the program (`madvise`, the default of Ubuntu and of DGX OS), but only
if its tunable says so when the process starts. So the process is started again, once, before anything heavy is
imported: same pid, same arguments, some 20 ms. Figures: docs/performance.md.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SINCE = (2, 35)  # of glibc


def tunables(now: str | None, kernel: str, libc: tuple[str, str]) -> str | None:
    """What GLIBC_TUNABLES should be, or None where it should stay.

    Args:
        now: its value; a user's own choice of this tunable is kept.
        kernel: the text of /sys/kernel/mm/transparent_hugepage/enabled; only "[madvise]" leaves it to the program.
        libc: name and version, as `platform.libc_ver` has them.
    """
    name, version = libc
    old = name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < _SINCE
    if old or "[madvise]" not in kernel or _TUNABLE in (now or ""):
        return None
    return f"{now}:{_TUNABLE}=1" if now else f"{_TUNABLE}=1"


def restart_with_huge_pages() -> None:
    """Replace this process by itself with the tunable set; return where that gains nothing or cannot be done."""
    try:
        wanted = tunables(os.environ.get("GLIBC_TUNABLES"), _SETTING.read_text(), platform.libc_ver())
        if wanted is None or not sys.executable or not sys.orig_argv:
            return
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": wanted})
    except (OSError, ValueError):
        return  # no such kernel file, a version that is no number, no right to execute: slower, never wrong
