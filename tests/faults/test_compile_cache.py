"""A compile cache that is damaged costs a compilation, never a bit; one that was moved costs nothing."""

from __future__ import annotations

import random
import shutil

import pytest
import toy
from kit import Aurora, final_hash, losses

SLOW = ("truncated", "emptied")
SEED = 20261125


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A command line whose cache holds the compiled step, and the run that filled it."""
    folder = tmp_path_factory.mktemp("warm")
    aurora = Aurora(folder, folder / "cache")
    aurora.good("train", toy.write(folder), "--run", "first", "--quiet")
    entries = {path: path.read_bytes() for path in (aurora.cache / "compile").rglob("*") if path.is_file()}
    assert sum(map(bool, entries.values())) > 3, "there is no cache to damage"
    return aurora, entries


def damaged(content: bytes, how: str, draw: random.Random) -> bytes:
    if how == "emptied":
        return b""
    if how == "truncated":
        return content[: draw.randrange(len(content))]
    flipped = bytearray(content)
    for _ in range(20):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def test_a_cache_that_was_moved_is_used_where_it_is(warm):
    here, entries = warm
    moved = Aurora(here.folder, here.folder / "moved")
    shutil.copytree(here.cache, moved.cache)
    moved.good("train", "toy.yaml", "--run", "elsewhere", "--quiet")
    after = {path.name for path in (moved.cache / "compile").rglob("*-cache")}
    assert after == {path.name for path in entries if path.name.endswith("-cache")}


@pytest.mark.parametrize("how", [*(pytest.param(one, marks=pytest.mark.slow) for one in SLOW), "flipped"])
def test_damaged_entries_change_no_bit(how, warm):
    (aurora, entries), draw = warm, random.Random(SEED)
    for path, content in sorted(entries.items()):
        if content:
            path.write_bytes(damaged(content, how, draw))
    again = aurora("train", "toy.yaml", "--run", how, "--quiet")
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(aurora.folder / how) == losses(aurora.folder / "first")
    assert final_hash(aurora.folder / how) == final_hash(aurora.folder / "first")
