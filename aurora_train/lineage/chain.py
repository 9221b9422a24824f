"""A chain of records: `lineage.jsonl`, append-only, one JSON object a line, each with the sha256 of the line before it.

The hash of the last line, the head, therefore decides all lines. A line without its newline was torn by a kill and is
no record; the next writer removes it and goes on after the last whole one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aurora_train.errors import UserError
from aurora_train.record.metrics import decode, encode, now

NAME = "lineage.jsonl"


def digest(content: bytes) -> str:
    """sha256 hex."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 hex of a file's bytes, read anew. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines(path: Path) -> list[bytes]:
    """The whole lines of a file, newline included; [] if there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def read(path: Path) -> list[dict]:
    """The records of a chain, oldest first; [] if there is none. UserError for a line that is no record."""
    records = []
    for number, line in enumerate(lines(path), 1):
        try:
            records.append(decode(line))
        except ValueError as error:
            raise UserError("this line is no record of a lineage", where=f"{path}:{number}", why=str(error),
                            hint="`aurora lineage DIR --verify` says what else was changed; restore the file from a "
                            "copy") from error  # fmt: skip
    return records


class Head(NamedTuple):
    """Where a chain ends: bytes of the file, number of records, sha256 of the last line ("" for none)."""

    size: int
    count: int
    sha256: str


def head_of(path: Path) -> Head:
    """The end of a chain as it lies on the disk. Last lines that are no records were torn by a power cut."""
    held = lines(path)
    while held and decoded(held[-1]) is None:
        held.pop()
    return Head(sum(map(len, held)), len(held), digest(held[-1]) if held else "")


def decoded(line: bytes) -> dict | None:
    """The record in a line; None if it is none."""
    try:
        return decode(line)
    except ValueError:
        return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other process appends to the chain in this context. Raises OSError if its folder cannot be written."""
    with open(path, "ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def append(path: Path, head: Head, records: list[dict[str, Any]]) -> Head:
    """Add records after `head`, and sync them; returns the new head. The caller holds the lock.

    A record has a "kind". What stands after the head is a torn record, and is removed. Raises OSError if the disk takes
    no more: then none, some or part of the records are written, which `head_of` tells.
    """
    written = []
    for one in records:
        time = one.get("time") or now()
        written.append(encode({"n": head.count, "kind": one["kind"], **one, "time": time, "prev": head.sha256}))
        head = Head(head.size + len(written[-1]), head.count + 1, digest(written[-1]))
    content = b"".join(written)
    with open(path, "r+b", buffering=0) as file:
        file.truncate(head.size - len(content))
        file.seek(0, os.SEEK_END)
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())
    return head


def add(path: Path, records: list[dict[str, Any]]) -> Head:
    """As `append`, after whatever the chain has, under its lock."""
    with locked(path):
        return append(path, head_of(path), records)


def faults(held: list[bytes]) -> list[str]:
    """What is wrong with the lines of a chain: a line for each place at which it was changed; [] if it is whole."""
    found, before = [], ""
    for number, line in enumerate(held, 1):
        record = decoded(line)
        if record is None:
            found.append(f"{NAME}:{number} is no record any more")
            before = digest(line)
            continue
        position = record.get("n")
        if position != number - 1:
            found.append(f"{NAME}:{number}: record {position} ({record.get('kind')}) stands where record {number - 1} "
                         "belongs: records were removed, added or moved")  # fmt: skip
        elif record.get("prev") != before:
            what = f"record {number - 2}" if number > 1 else "what came before it"
            found.append(f"{NAME}:{max(number - 1, 1)}: {what} is not the one after which record {number - 1} "
                         f"({record.get('kind')}) was written: it was changed")  # fmt: skip
        before = digest(line)
    return found
