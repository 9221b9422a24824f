"""A trainer asks for large pages where the kernel leaves it to the program, and a user's own choice stands."""

from __future__ import annotations

import platform
import resource
import subprocess
from pathlib import Path

import pytest
import toy
from kit import Aurora, final_hash

from aurora_train.machine.hugepages import tunables

GLIBC = ("glibc", "2.36")
LEFT_TO_US = "always [madvise] never"


@pytest.mark.parametrize(
    ("now", "kernel", "libc", "wanted"),
    [
        (None, LEFT_TO_US, GLIBC, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=1", LEFT_TO_US, GLIBC, "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", LEFT_TO_US, GLIBC, None),
        (None, "[always] madvise never", GLIBC, None),
        (None, "always madvise [never]", GLIBC, None),
        (None, LEFT_TO_US, ("glibc", "2.31"), None),
        (None, LEFT_TO_US, ("", ""), None),
    ],
)
def test_the_tunable_is_set_only_where_it_does_something_and_nobody_chose(now, kernel, libc, wanted):
    assert tunables(now, kernel, libc) == wanted


def trained(folder: Path, name: str, **extra: str) -> tuple[str, int]:
    """(hash of the final state, page faults) of a run whose temporaries are some megabytes."""
    aurora = Aurora(folder, folder / "cache")
    wide = ("model.width=256", "train.batch=512", "train.steps=40", "evaluate.every=null")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
    command = aurora.command("train", "toy.yaml", *wide, "--run", name, "--quiet")
    done = subprocess.run(command, cwd=folder, env=aurora.environment() | extra, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return final_hash(folder / name), resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before


@pytest.mark.release
@pytest.mark.optimized
def test_large_pages_change_no_bit_and_spare_page_faults(tmp_path):
    if tunables(None, Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(), platform.libc_ver()) is None:
        pytest.skip("this kernel or C library leaves nothing to choose")
    toy.write(tmp_path)
    small, many = trained(tmp_path, "small", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    large, few = trained(tmp_path, "large")
    print(f"page faults of a whole run: {many} with 4 KiB, {few} with what the trainer asks for")
    assert small == large
    assert few < 0.7 * many
