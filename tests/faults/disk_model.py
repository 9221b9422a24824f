"""A disk as a power cut leaves it: what a program wrote, what of it is durable, and the disk after a cut at any change.

A disk keeps what the program wrote (the view that every process has) and, apart from it, what is durable: a file's
bytes as of its last fsync, a folder's names as of the folder's. Changes are numbered in a log; from the log the disk
after a cut at any number can be made again, as an ordinary folder. `powercut.py` puts it under a real program.

The model is POSIX at its most pessimistic. fsync of a file says nothing of its name, a rename between two folders is
two changes that each folder's fsync makes durable, and a new folder is in its parent only when the parent was synced.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

ROOT = 1
SECTOR = 512  # bytes that a disk writes whole or not at all
_WORDS = {"create", "mkdir", "unlink", "rename", "write", "truncate", "fsync", "fsyncdir", "fsync_failed"}


@dataclass
class File:
    """`pending`: changes since the last fsync, as (offset, bytes), or (size, None) for a truncation."""

    parent: int
    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def change(self, at: int, data: bytes | None) -> None:
        _change(self.now, at, data)
        self.pending.append((at, data))

    def sync(self) -> None:
        content = bytearray(self.synced)
        for at, data in self.pending:
            _change(content, at, data)
        self.synced = bytes(content)
        self.pending.clear()

    def forget(self) -> None:
        """A sync that failed: the kernel takes the pages for clean, so no later one writes them."""
        self.pending.clear()


def _change(content: bytearray, at: int, data: bytes | None) -> None:
    """Write `data` at an offset, or cut there; what lies between the end and the offset is zeros."""
    if data is None:
        del content[at:]
    end = at if data is None else at + len(data)
    content.extend(bytes(max(end - len(content), 0)))
    if data is not None:
        content[at:end] = data


@dataclass
class Folder:
    """`pending`: changes of names since the last fsync; each is a tuple of (name, node or None) that go together."""

    parent: int
    now: dict[str, int] = field(default_factory=dict)
    synced: dict[str, int] = field(default_factory=dict)
    pending: list[tuple] = field(default_factory=list)

    def change(self, *names: tuple[str, int | None]) -> None:
        _enter(self.now, names)
        self.pending.append(names)

    def sync(self) -> None:
        self.synced = dict(self.now)
        self.pending.clear()


def _enter(names: dict[str, int], changes) -> None:
    for name, node in changes:
        names.pop(name, None)
        if node is not None:
            names[name] = node


class Disk:
    """Files and folders by number, changed by the operations of the log and by nothing else."""

    def __init__(self):
        self.nodes: dict[int, File | Folder] = {ROOT: Folder(ROOT)}

    # ---- the operations

    def apply(self, operation: tuple) -> None:
        """One operation of the log: its name and its arguments."""
        name, *arguments = operation
        assert name in _WORDS, operation
        getattr(self, name)(*arguments)

    def create(self, folder: int, name: str, node: int) -> None:
        self.nodes[node] = File(folder)
        self.nodes[folder].change((name, node))

    def mkdir(self, folder: int, name: str, node: int) -> None:
        self.nodes[node] = Folder(folder)
        self.nodes[folder].change((name, node))

    def unlink(self, folder: int, name: str) -> None:
        self.nodes[folder].change((name, None))

    def rename(self, folder: int, name: str, to_folder: int, to_name: str) -> None:
        node = self.nodes[folder].now[name]
        self.nodes[node].parent = to_folder
        if folder == to_folder:
            self.nodes[folder].change((name, None), (to_name, node))
        else:
            self.nodes[to_folder].change((to_name, node))
            self.nodes[folder].change((name, None))

    def write(self, node: int, offset: int, data: bytes) -> None:
        self.nodes[node].change(offset, data)

    def truncate(self, node: int, size: int) -> None:
        self.nodes[node].change(size, None)

    def fsync(self, node: int) -> None:
        self.nodes[node].sync()

    def fsyncdir(self, node: int) -> None:
        self.nodes[node].sync()

    def fsync_failed(self, node: int) -> None:
        self.nodes[node].forget()

    # ---- looking at it

    def find(self, path: str) -> int | None:
        """The number of a file or folder, as the program sees it now; None where there is none."""
        node = ROOT
        for name in PurePosixPath(path).parts:
            if name == "/":
                continue
            if not isinstance(self.nodes[node], Folder) or name not in self.nodes[node].now:
                return None
            node = self.nodes[node].now[name]
        return node

    def read(self, path: str) -> bytes:
        """A file's bytes as the program sees them; b"" where it is not there."""
        node = self.find(path)
        return b"" if node is None else bytes(self.nodes[node].now)

    def path_of(self, operation: tuple) -> str:
        """Which file or folder an operation is about, as a path, right after it."""
        name, node, *rest = operation
        tail = {"create": rest[:1], "mkdir": rest[:1], "unlink": rest[:1], "rename": rest[2:]}.get(name, [])
        node = rest[1] if name == "rename" else node
        parts = list(tail)
        while node != ROOT:
            parent = self.nodes[node].parent
            parts.insert(0, next((n for n, number in self.nodes[parent].now.items() if number == node), "(removed)"))
            node = parent
        return "/".join(parts)


class Image:
    """A disk after a cut: what was durable; with `draw`, a random part of the rest too, in any order.

    Of what was not synced, each change of a folder's names reached the disk or did not; each sector of a file is as
    of some moment since its last fsync, and so is the file's size, apart from its sectors. A sector that was never
    written holds zeros.
    """

    def __init__(self, disk: Disk, draw: random.Random | None = None):
        self.disk, self.draw = disk, draw
        self.reached = draw.choice((0.1, 0.5, 0.9)) if draw else 0.0  # how likely a change that was not synced is
        self._bytes: dict[int, bytes] = {}

    def make(self, target: Path, node: int = ROOT) -> Path:
        """Write it as a folder that is not there yet."""
        target.mkdir()
        for name, number in self._names(self.disk.nodes[node]).items():
            if isinstance(self.disk.nodes[number], Folder):
                self.make(target / name, number)
            else:
                (target / name).write_bytes(self._content(number))
        return target

    def _names(self, folder: Folder) -> dict[str, int]:
        names = dict(folder.synced)
        for changes in folder.pending if self.draw else ():
            if self.draw.random() < self.reached:
                _enter(names, changes)
        return names

    def _content(self, number: int) -> bytes:
        file = self.disk.nodes[number]
        if not self.draw or not file.pending:
            return file.synced
        if number not in self._bytes:  # a file with two names has one content
            self._bytes[number] = self._torn(file)
        return self._bytes[number]

    def _torn(self, file: File) -> bytes:
        sizes = [len(file.synced)]
        for at, data in file.pending:
            sizes.append(at if data is None else max(sizes[-1], at + len(data)))
        longest = -(-max(sizes) // SECTOR) * SECTOR
        content = bytearray(file.synced.ljust(longest, b"\0"))
        moments = [self._moment(len(file.pending)) for _ in range(longest // SECTOR)]
        for number, (at, data) in enumerate(file.pending):
            # A truncation zeroes what lay beyond it.
            end, new = (longest, bytes(longest - at)) if data is None else (at + len(data), data)
            for sector in range(at // SECTOR, -(-end // SECTOR)):
                if number < moments[sector]:
                    begin, stop = max(at, sector * SECTOR), min(end, (sector + 1) * SECTOR)
                    content[begin:stop] = new[begin - at : stop - at]
        return bytes(content[: sizes[self._moment(len(file.pending))]])

    def _moment(self, last: int) -> int:
        return last if self.draw.random() < self.reached else self.draw.randrange(last + 1)


def now(disk: Disk, target: Path, node: int = ROOT) -> Path:
    """Write the disk as the program sees it, as a folder that is not there yet."""
    target.mkdir()
    for name, number in disk.nodes[node].now.items():
        found = disk.nodes[number]
        if isinstance(found, Folder):
            now(disk, target / name, number)
        else:
            (target / name).write_bytes(found.now)
    return target


def replay(log: list[tuple], cuts: list[int]) -> Iterator[tuple[int, Disk]]:
    """(cut, the disk after that many operations) for each cut, ascending. The disk is one and goes on."""
    disk, done = Disk(), 0
    for cut in sorted(cuts):
        for operation in log[done:cut]:
            disk.apply(operation)
        done = cut
        yield cut, disk


def read_log(path: Path) -> list[tuple]:
    """The operations that a disk logged, in order."""
    log = []
    with open(path, "rb") as handle:
        while True:
            try:
                log.append(pickle.load(handle))
            except EOFError:
                return log
