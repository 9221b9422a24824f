"""A run's chain follows its record: what is in events.jsonl and in the files beside it, and is not in the chain yet.

Everything is read from files, so a process that is killed at any instant leaves nothing out: the next one goes on from
the last whole record. An event enters the chain once it is synced.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from aurora_train.checkpoint import durable
from aurora_train.errors import UserError
from aurora_train.files import read_json
from aurora_train.lineage import begin, chain
from aurora_train.lineage.publish import of_event, of_scores, without_folders
from aurora_train.lineage.signing import SIGNATURE
from aurora_train.record.metrics import EventLog, decode
from aurora_train.run import Run

# All other files are rewritten by a process while it trains, and put on record at its end.
_FIXED = ("config.yaml", "provenance.json", "code/", "facts/")
# In the chain line by line, by its manifest, or nowhere: drawn from the rest, scratch, or another program's.
_APART = (chain.NAME, SIGNATURE, "events.jsonl", ".lock", "report.html")
_APART_FOLDERS = ("checkpoints", ".trash", "work", "tensorboard", "wandb", "__pycache__")


class Follower:
    """Brings the chain of a run up to date, again and again. Raises OSError or UserError if it cannot be written."""

    def __init__(self, run: Run):
        self.run, self.path = run, run.lineage
        self._head: chain.Head | None = None
        self._offset = self._lines = 0  # of events.jsonl, that the chain has
        self._files: dict[str, str | None] = {}

    def go_on(self, *, files: bool = False, ended: bool = False, also: tuple[dict, ...] = ()) -> chain.Head:
        """Put new events on record, and with `files` those files that changed.

        `ended`: no step will follow, so that the files count that a process rewrites while it trains. `also`: records
        that come after them.
        """
        with chain.locked(self.path):
            new = self._read_again()
            new += self._events()
            if files:
                new += self._changed(ended)
            self._head = chain.append(self.path, self._head, [*new, *also]) if new or also else self._head
            return self._head

    def _read_again(self) -> list[dict]:
        """Read the chain, unless it is as this process left it. Returns the records that it needs before others."""
        if self._head is not None and self._head == chain.Head(os.path.getsize(self.path), *self._head[1:]):
            return []
        self._head, self._files, events = chain.head_of(self.path), {}, chain.lines(self.run.events)
        if not self._head.count:
            self._offset = self._lines = 0
            return [begin.record(self.run)]
        wanted, start = [], (0, chain.digest(b""))
        for record in filter(None, map(chain.decoded, chain.lines(self.path))):  # an edited line stops no run
            if record["kind"] == "files":
                self._files |= record["files"]
            elif record["kind"] == "departed":
                start, wanted = (record["lines"], record["events"]), []
            elif "event" in record:
                wanted.append(record["event"])
        self._lines = start[0] + len(wanted)
        self._offset = sum(map(len, events[: self._lines]))
        before = chain.digest(b"".join(events[: start[0]]))
        if before == start[1] and [chain.digest(line) for line in events[start[0] : self._lines]] == wanted:
            return []
        self._lines, self._offset = len(events), sum(map(len, events))
        return [{"kind": "departed", "lines": self._lines, "events": chain.digest(b"".join(events))}]

    def _events(self) -> list[dict]:
        """The records of events that came after those on record.

        They are not synced here but by their writer, who has to know of a sync that fails.
        """
        records = []
        if not self.run.events.exists():
            return records
        with open(self.run.events, "rb") as file:
            file.seek(self._offset)
            for line in file:
                try:
                    event = decode(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                records.append(self._record(event, line))
                self._offset, self._lines = self._offset + len(line), self._lines + 1
        return records

    def _record(self, event: dict, line: bytes) -> dict[str, Any]:
        name, step = event.get("event"), event.get("step")
        record = {"kind": name, "step": step, "time": event.get("time"), **of_event(event), "event": chain.digest(line)}
        if name == "save":
            record["checkpoint"] = manifest_digest(self.run.checkpoints / str(step))
        return record

    def _changed(self, ended: bool) -> list[dict]:
        now = digests(self.run, ended)
        gone = {name: None for name, known in self._files.items()
                if known and name not in now and (ended or is_fixed(name))}  # fmt: skip
        changed = {name: found for name, found in {**now, **gone}.items() if self._files.get(name) != found}
        if not changed:
            return []
        self._files |= changed
        scores = of_scores(read_json(self.run.scores, {})) if changed.get("scores.json") else None
        return [{"kind": "files", "files": changed, **({"scores": without_folders(scores)} if scores else {})}]


def manifest_digest(folder: Path) -> str | None:
    """sha256 of a checkpoint's manifest, which lists the hash of each of its files; None if it is gone."""
    try:
        return chain.digest((folder / durable.MANIFEST).read_bytes())
    except OSError:
        return None


def is_fixed(name: str) -> bool:
    """Whether a file of a run stays as it is while the run trains."""
    return name.startswith(_FIXED)


def digests(run: Run, ended: bool) -> dict[str, str]:
    """sha256 of the files of a run that its chain has as they are, by name; without `ended`, of the fixed ones."""
    found = {}
    for path in sorted(run.folder.rglob("*")):
        name = path.relative_to(run.folder).as_posix()
        apart = name in _APART or name.endswith(".new") or not {*name.split("/")}.isdisjoint(_APART_FOLDERS)
        if not apart and path.is_file() and (ended or is_fixed(name)):
            found[name] = chain.file_digest(path)
    return found


class ChainedEvents(EventLog):
    """`events.jsonl`, of which each event enters the chain at once. A chain that cannot be written catches up later."""

    def __init__(self, run: Run, *, begun: bool = False):
        """`begun`: a process begins to train, so that the files that it begins with are put on record."""
        super().__init__(run.events)
        self._chain = None if run.follows else Follower(run)
        self._go_on(files=begun)

    def event(self, name: str, step: int | None = None, **details: Any) -> dict:
        record = super().event(name, step, **details)
        self._go_on()
        return record

    def seal(self) -> None:
        """At the end of a process: put on record all that it has written."""
        self._go_on(files=True, ended=True)

    def _go_on(self, **how) -> None:
        if self._chain is not None:
            with contextlib.suppress(OSError, UserError):
                self._chain.go_on(**how)


def catch_up(run: Run) -> None:
    """Bring the chain of a run that is not training up to date after a verb has changed its record, if it can be
    written."""
    if not run.config.is_file() or run.is_export():
        return
    if not (run.lineage).exists() and "data" not in read_json(run.provenance, {}):
        return  # an imported model: its chain begins with the data that it is trained on
    with contextlib.suppress(OSError, UserError):
        Follower(run).go_on(files=True, ended=not run.is_held())
