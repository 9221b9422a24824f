"""Reads a log that another process appends to, each byte once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from aurora_train.record.metrics import decode_lines

BLOCK_BYTES = 1 << 20  # read and decoded at once, in about 25 ms
_LONGEST_LINE_BYTES = 1 << 26  # what is longer is no log of ours
_PROOF_BYTES = 64  # by which a log is known again


class Log:
    """A JSONL log from its beginning. A resume replaces the file by a shorter one, and a new run may take its name:
    that is noticed, and reading starts anew.

    `size` and `done` are bytes: of the file, and those that were read. `unreadable` counts lines that are no records.
    """

    def __init__(self, path: Path):
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.size = self.done = self.unreadable = 0
        self._proof, self._file, self._torn = b"", None, -1

    @property
    def behind(self) -> bool:
        """Whether there are complete lines that were not read, as far as is known."""
        return self.done < self.size != self._torn

    def is_another(self) -> bool:
        """Look at the file. True if it does not go on from what was read: then all of it is to be read."""
        try:
            about = os.stat(self.path)
        except OSError:
            known, self.size = self.done, 0
            self._forget()
            return known > 0
        same = (about.st_dev, about.st_ino) == self._file and about.st_size >= self.done
        if same and about.st_size != self.size and self._proof:
            same = self.piece(self.done - len(self._proof), self.done) == self._proof
        if not same:
            known = self.done
            self._forget()
        self.size, self._file = about.st_size, (about.st_dev, about.st_ino)
        return not same and known > 0

    def piece(self, begin: int, end: int) -> bytes:
        """The bytes of the file between two places, fewer where it ends or cannot be read."""
        return next(iter(self.pieces([begin], end - begin)), b"")

    def next(self) -> list[dict] | None:
        """The records of the next block; None if all complete lines that there were at `is_another` have been read."""
        block = next(self.blocks(BLOCK_BYTES), None)
        if block is None:
            return None
        records, unreadable = decode_lines(block)
        self.unreadable += unreadable
        return records

    def blocks(self, size: int) -> Iterator[bytes]:
        """The complete lines that were not read yet, about `size` bytes at a time."""
        asked = size
        while self.done < self.size:
            block = self.piece(self.done, min(self.done + asked, self.size))
            whole = block.rfind(b"\n") + 1
            if whole:
                self.done, asked = self.done + whole, size
                self._proof = block[max(whole - _PROOF_BYTES, 0) : whole]
                yield block[:whole]
            elif len(block) < asked or asked > _LONGEST_LINE_BYTES:
                self._torn = self.size  # or still being written
                return
            else:
                asked *= 4

    def pieces(self, begins: Iterable[int], size: int) -> list[bytes]:
        """Parts of one size of the file; [] if it cannot be read."""
        try:
            with open(self.path, "rb") as file:
                return [os.pread(file.fileno(), size, begin) for begin in begins]
        except OSError:
            return []

    def last(self, size: int = 1 << 14) -> list[dict]:
        """The records of the last bytes of the file, whatever was read before."""
        begin = max(self.size - size, 0)
        end = self.piece(begin, self.size)
        return decode_lines(end[end.find(b"\n") + 1 if begin else 0 :].rpartition(b"\n")[0] + b"\n")[0]


def left(deadline: float) -> bool:
    """Whether there is time until a moment of `time.monotonic`."""
    return time.monotonic() < deadline
