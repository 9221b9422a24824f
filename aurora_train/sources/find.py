"""Finds the files of a source: those below a folder that match a pattern, those of a glob, or one file.

A file's name is its path below the source's root, so the names do not depend on where the root is. Linked folders are
followed; each real folder is read once, under its own path if that is below the root, so that a link back up makes no
loop.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

_SKIPPED = ("__pycache__",)


def find(path: Path, pattern: str, lost: list[str], limit: int | None = None) -> tuple[Path, list[tuple[str, Path]]]:
    """(root, (name, path) of every file, sorted by name) of a folder, a file, or a glob.

    `lost` receives the names of unreadable folders and broken links. With `limit`, the walk through a folder stops
    after so many files.
    """
    if path.is_dir():
        return path, below(path, pattern, _SKIPPED, lost, limit)
    if path.is_file():
        return path.parent, [(path.name, path)]
    matches = _once([Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)])
    root = Path(os.path.commonpath([match.parent for match in matches])) if matches else path.parent
    return root, sorted((match.relative_to(root).as_posix(), match) for match in matches)


def below(
    root: Path, pattern: str, skip: tuple[str, ...], lost: list[str] | None = None, limit: int | None = None
) -> list[tuple[str, Path]]:
    """Matching files below `root`, sorted by their path in it, without hidden ones and folders named in `skip`.

    If `lost` is None, links to folders are not followed.
    """
    matches, names = _matcher(pattern), []
    for name, entry in _walk(str(root), skip, lost):
        if matches(name):
            if os.path.isfile(entry.path):
                names.append(name)
            elif lost is not None and entry.is_symlink():
                lost.append(name)
        if len(names) == limit:
            break
    return [(name, root / name) for name in sorted(names)]


def _walk(root: str, skip: tuple[str, ...], lost: list[str] | None) -> Iterator[tuple[str, os.DirEntry]]:
    """(name, entry) of everything but folders. A linked folder comes after everything that is reachable without it."""
    seen: set[tuple[int, int]] = set()
    waiting, linked = [(root, "")], []
    while waiting or linked:
        if not waiting:
            linked.sort(key=lambda pair: pair[1], reverse=True)
            waiting.append(linked.pop())
        folder, prefix = waiting.pop()
        try:
            status = os.stat(folder)
            entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        except OSError:
            if lost is not None:
                lost.append(prefix)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if not os.path.isdir(entry.path) if entry.is_symlink() else not entry.is_dir():
                yield prefix + entry.name, entry
            elif entry.name not in skip and not entry.is_symlink():
                waiting.append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.name not in skip and lost is not None:
                linked.append((entry.path, f"{prefix}{entry.name}/"))


def _once(matches: list[Path]) -> list[Path]:
    """Drop files matched again through a linked folder; keep the path without a link, else the first."""
    if not matches:
        return []
    base = Path(os.path.commonpath([match.parent for match in matches]))
    real = {folder: Path(os.path.realpath(folder)) for folder in {base, *(match.parent for match in matches)}}
    kept: dict[Path, Path] = {}

    def through_a_link(match: Path) -> bool:
        return real[match.parent] != real[base] / match.parent.relative_to(base)

    for match in sorted(matches, key=lambda match: (through_a_link(match), str(match))):
        kept.setdefault(real[match.parent] / match.name, match)
    return list(kept.values())


def _matcher(pattern: str) -> Callable[[str], bool]:
    """A glob over relative posix paths, where `**/` is any number of folders, including none."""
    expression, position = "", 0
    while position < len(pattern):
        if pattern.startswith("**/", position):
            expression, position = expression + "(?:.*/)?", position + 3
        elif pattern.startswith("**", position):
            expression, position = expression + ".*", position + 2
        else:
            character = pattern[position]
            expression += {"*": "[^/]*", "?": "[^/]"}.get(character, re.escape(character))
            position += 1
    compiled = re.compile(expression + r"\Z", re.DOTALL)
    return lambda name: compiled.match(name) is not None
