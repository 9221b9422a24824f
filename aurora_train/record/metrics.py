"""The run's two logs, `metrics.jsonl` and `events.jsonl`: append-only, one JSON object per line, every bit kept.

A line that ends in a newline is a record. Anything after the last newline was torn by a crash and does not count, and a
power cut may leave unreadable lines at the end. Floats are written with `repr`, which round-trips float64 exactly; NaN
and the infinities, which JSON lacks, are written as the strings "NaN", "Infinity" and "-Infinity", and `read` returns
them as floats. A text of these words is written with an apostrophe before it, which `read` removes.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import re
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from aurora_train.errors import MissingExtra, UserError
from aurora_train.files import write_atomically

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LIKE_A_NUMBER = re.compile("'*(?:NaN|-?Infinity)")  # texts that would be read as numbers, and those marked as texts
_HAS_SUCH = re.compile(rb"\"'*(?:NaN|-?Infinity)\"")


def _to_json(value: Any) -> Any:
    """A JSON-able copy of a record: numpy and jax scalars become Python's, non-finite floats become strings."""
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if hasattr(value, "tolist"):
        return _to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return f"'{value}" if isinstance(value, str) and _LIKE_A_NUMBER.fullmatch(value) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, str):
        marked = value.startswith("'") and _LIKE_A_NUMBER.fullmatch(value)
        return value[1:] if marked else _NON_FINITE.get(value, value)
    return value


def encode(record: dict) -> bytes:
    """One record as one line of ASCII JSON, newline included."""
    return json.dumps(_to_json(record), allow_nan=False).encode("ascii") + b"\n"


def decode(line: bytes) -> dict:
    """The inverse of `encode`. Raises ValueError for a line that is not a JSON object."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return _from_json(record)


def decode_lines(content: bytes) -> tuple[list[dict], int]:
    """(the records of whole lines, how many lines are none), in a fifth of the time that `decode` would take."""
    lines = content.split(b"\n")[:-1]
    plain = _from_json if _HAS_SUCH.search(content) else (lambda record: record)
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(b"[" + b",".join(lines) + b"]")
        if len(found) == len(lines) and all(isinstance(record, dict) for record in found):
            return [plain(record) for record in found], 0
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(decode(line))
    return records, len(lines) - len(records)


class Sink(Protocol):
    """A second destination for records. The JSONL file is authoritative; a sink may be lost without harm."""

    def write(self, record: dict) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Append-only writer. When `write` returns, the record has reached the operating system and survives kill -9.

    Records up to the last `sync` survive a power failure. Opening the file drops a torn record at its end, so that none
    follows it. If the disk is full, read-only or failing, records wait in memory, in order, and only `sync` raises
    UserError: training is worth more than its log. After a failed fsync the kernel may consider pages clean that it
    never wrote, so that the next fsync succeeds. Therefore unsynced records are kept here and rewritten in place before
    the next sync. Raises UserError if the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, sinks: Iterable[Sink] = ()):
        self.path, self.sinks = Path(path), tuple(sinks)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_tail(self.path)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._end = os.fstat(self._file).st_size
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._waiting = bytearray()  # bytes that the disk did not accept
        self._unsynced = bytearray()  # bytes accepted since the last sync
        self._in_doubt = False

    def write(self, record: dict) -> None:
        self._waiting += encode(record)
        with contextlib.suppress(OSError):  # the next save reports it
            self._drain()
        for sink in self.sinks:
            sink.write(record)

    def sync(self) -> None:
        """Force everything written so far to the disk. Called before a checkpoint of that step is committed."""
        try:
            self._drain()
            if self._in_doubt:
                self._write_again()
            self._in_doubt = True
            os.fsync(self._file)
            self._in_doubt = False
            self._unsynced.clear()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _drain(self) -> None:
        while self._waiting:
            taken = os.write(self._file, self._waiting)
            self._unsynced += self._waiting[:taken]
            self._end += taken
            del self._waiting[:taken]

    def _write_again(self) -> None:
        """Rewrite the same bytes in the same place, so that a kill at any instant leaves the log intact."""
        again = os.open(self.path, os.O_WRONLY)  # a descriptor with O_APPEND would write at the end
        try:
            done = 0
            while done < len(self._unsynced):
                done += os.pwrite(again, self._unsynced[done:], self._end - len(self._unsynced) + done)
        finally:
            os.close(again)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(UserError):  # records lost here are of steps without a checkpoint
                self.sync()
            os.close(self._file)
            self._file = None
            for sink in self.sinks:
                sink.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class MetricsLog(JsonLines):
    """`metrics.jsonl`: one record per training step and one per evaluation ({"step": n, "evaluation": {...}})."""


class EventLog(JsonLines):
    """`events.jsonl`: what happened to the run. Each record carries its wall-clock time (ISO 8601, UTC)."""

    def event(self, name: str, step: int | None = None, **details: Any) -> dict:
        """Write {"event": name, "step": step, "time": now, **details}, sync it if possible, and return it."""
        record = {"event": name, "step": step, "time": now(), **details}
        self.write(record)
        if not self._waiting:
            with contextlib.suppress(UserError):
                self.sync()
        return record


def now() -> str:
    """The current time as ISO 8601 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read(path: str | os.PathLike) -> list[dict]:
    """All records of a log; [] for a file that does not exist. A torn last line is left out.

    Raises UserError with the line number for an unreadable record anywhere else in the file.
    """
    lines = _lines(Path(path))
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(decode(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise _damaged(path, number) from error
    return records


def newest(path: str | os.PathLike, key: str, value: Any = None) -> dict | None:
    """The last record that has `key` (with this value, if one is given). Reads from the end, because logs grow long.

    None if there is no such record or file. Torn or unreadable lines are skipped.
    """
    word = json.dumps(key if value is None else value).encode()
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
            while (hit := content.rfind(word, 0, end)) >= 0:
                start = content.rfind(b"\n", 0, hit) + 1
                with contextlib.suppress(ValueError):
                    record = decode(content[start : content.find(b"\n", hit) + 1])
                    if key in record and value in (None, record[key]):
                        return record
                end = start
    except (FileNotFoundError, ValueError):  # mmap refuses an empty file
        pass
    return None


def set_aside(path: str | os.PathLike, after_step: int, aside_path: str | os.PathLike) -> int:
    """Move the records later than `after_step` to `aside_path`; return how many lines were moved.

    At resume the run goes back to a saved step, and the records of the repeated steps must not be in the log twice. If
    the process is killed at any instant, the log is either the old or the new one, and a repetition gives the same
    result: the moved lines are on disk before the log is replaced, and are not added twice. A torn last line is
    dropped; unreadable lines after the last kept record, which a power failure leaves, are moved unchanged. Records
    without a step stay. Raises UserError for an unreadable line before a record that is kept.
    """
    path, aside_path = Path(path), Path(aside_path)
    kept, moved, unreadable = [], [], None
    for number, line in enumerate(_lines(path), 1):
        try:
            step = decode(line).get("step")
        except ValueError:
            unreadable = unreadable or number
            moved.append(line)
            continue
        if step is not None and step > after_step:
            moved.append(line)
        elif unreadable:
            raise _damaged(path, unreadable)
        else:
            kept.append(line)
    before = path.read_bytes() if path.exists() else b""
    after = b"".join(kept)
    if after == before:
        return 0
    try:
        if moved:
            earlier = aside_path.read_bytes() if aside_path.exists() else b""
            addition = b"".join(moved)
            if not earlier.endswith(addition):
                write_atomically(aside_path, earlier + addition)
        write_atomically(path, after)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return len(moved)


def _lines(path: Path) -> list[bytes]:
    """Complete lines, newline included."""
    if not path.exists():
        return []
    content = path.read_bytes()
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def _cut_torn_tail(path: Path) -> None:
    """Cut off what is not a record at the end of the file. Reads only the end: a log may hold millions of records.

    A kill leaves part of a line. A power cut may leave only its end, with zeros in place of its beginning.
    """
    if not path.exists() or path.stat().st_size == 0:  # mmap refuses an empty file
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = whole = len(content)
        while whole:
            begin = content.rfind(b"\n", 0, whole - 1) + 1
            if _is_record(content[begin:whole]):
                break
            whole = begin
    if whole != end:
        os.truncate(path, whole)


def _is_record(line: bytes) -> bool:
    try:
        decode(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        "cannot write the log",
        where=str(path),
        why=error.strerror or str(error),
        hint="free some space or fix the permissions, then run the same command again: the run resumes",
    )


def _damaged(path, number: int) -> UserError:
    return UserError(
        "this line is not a JSON record",
        where=f"{path}:{number}",
        why="the log was edited or damaged before its end",
        hint="delete the line, if its loss is acceptable, and run the command again",
    )


class TensorBoardSink:
    """Scalars for TensorBoard in `folder`. Records of earlier processes after `after_step` are purged."""

    def __init__(self, folder: str | os.PathLike, after_step: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboardX", "tensorboard", "`log.sinks: [tensorboard]`") from error
        # Its file names hold the time in seconds: without a suffix, two processes within a second would share a file.
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(os.fspath(folder), purge_step=after_step + 1, filename_suffix=suffix)

    def write(self, record: dict) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.get("step"))

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases. Offline unless `online`: nothing leaves the machine, and `wandb sync` can send it later.

    All processes of a run, one after another, continue one wandb run, whose id is stored in the file `identity`.
    """

    def __init__(self, folder: Path, identity: Path, name: str, config: dict, online: bool = False):
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra("wandb", "wandb", "`log.sinks: [wandb]`") from error
        if not identity.exists():
            write_atomically(identity, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project="aurora_train", name=name, dir=os.fspath(folder), config=config,
            mode="online" if online else "offline", id=identity.read_text().strip(), resume="allow",
        )  # fmt: skip

    def write(self, record: dict) -> None:
        self._run.log(scalars(record), step=record.get("step"))

    def close(self) -> None:
        self._run.finish()


def scalars(record: dict) -> dict[str, float]:
    """The numbers of a record by slash-joined name, without `step`: {"evaluation": {"loss": 2}} -> evaluation/loss."""
    flat = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat.update({f"{name}/{inner}": number for inner, number in scalars(value).items()})
        elif name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[name] = value
    return flat
