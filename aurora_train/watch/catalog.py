"""The runs of a folder as they are now: what was found out about each is kept until its files change."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aurora_train.errors import UserError
from aurora_train.run import Run
from aurora_train.tools import runs
from aurora_train.tools.runs import Row
from aurora_train.watch.curves import Curves
from aurora_train.watch.glance import Glance
from aurora_train.watch.log import Log, left

_MOST_EVENTS = 5000  # kept of one run; a run of weeks has some thousands


class Watched:
    """One run. `row` is None until the run was looked at; `events` are filled by `read`."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.run = folder, name, Run(folder)
        self.row: Row | None = None
        self.settings: dict[str, Any] = {}
        self.glance = Glance(Log(self.run.metrics))
        self.curves = Curves(Log(self.run.metrics))
        self.events: list[dict] = []
        self._event_log = Log(self.run.events)
        self._seen: tuple = ()
        self._config_seen: tuple = ()

    def look(self, deadline: float) -> None:
        """Find out what the list shows, if a file has changed since the last look."""
        run = self.run
        paths = (run.config, run.metrics, run.events, run.scores, run.folder / ".lock", run.checkpoints)
        seen = tuple(map(stamp, paths))
        if seen == self._seen and not self.glance.behind and not self._may_have_died():
            return
        written = max(one[0] for one in seen[:3]) / 1e9
        row = Row(self.name, str(self.folder), "failed start", written=written)
        try:
            self.glance.look(deadline)
            if seen[0] != self._config_seen:
                self.settings = runs.settings(run.config) if run.config.is_file() else {}
                self._config_seen = seen[0]
            step, loss = self.glance.last.get("step", 0), self.glance.evaluation.get("loss")
            self.row = runs.looked_at(run, row, self.settings, step, loss)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # files of someone else
            self.row = runs.unreadable(row, error)
        self._seen = seen

    def _may_have_died(self) -> bool:
        return self.row is not None and self.row.state == "training" and not self.run.is_held()

    def read(self, deadline: float) -> bool:
        """Read the run's logs on until a moment of `time.monotonic`. True if they are read to their ends."""
        if self._event_log.is_another():
            self.events = []
        while (records := self._event_log.next()) is not None:
            self.events += [record for record in records if isinstance(record.get("event"), str)]
        del self.events[:-_MOST_EVENTS]
        return self.curves.read(deadline)

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the best evaluation, as far as is known."""
        series = self.curves.known("evaluation/loss")
        return series.lowest if series else self.glance.best

    @property
    def unreadable(self) -> int:
        """Lines of its logs that are no records."""
        return self.curves.log.unreadable + self._event_log.unreadable

    @property
    def seconds_left(self) -> float | None:
        """Until the last step at the pace of the last log points; None for what is not training."""
        row, pace = self.row, self.glance.seconds_a_step
        if row is None or row.state != "training" or not row.steps or pace is None:
            return None
        return max(row.steps - row.step, 0) * pace


@dataclass(frozen=True)
class Overview:
    """All runs, those that are training first, then by when they were last written; `waiting` were not looked at yet.

    `fault` says why the folder cannot be listed, "" if it can.
    """

    runs: list[Watched] = field(default_factory=list)
    waiting: int = 0
    fault: str = ""


class Catalog:
    """The runs of a folder (None: `runs/`), which may appear and vanish. One request at a time is in its `lock`."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.lock = threading.Lock()
        self._known: dict[str, Watched] = {}
        self._apart: tuple[list, dict] = ([], {})  # settings, and what differs among them

    def look(self, seconds: float, unseen_seconds: float) -> Overview:
        """Look at all runs: at the ends of all their logs, for about `unseen_seconds` at those that were not looked at
        yet; and then into long logs, for about `seconds`."""
        began = time.monotonic()
        try:
            self._find()
        except (UserError, OSError) as error:
            return Overview(fault=str(error))
        waiting = 0
        for one in self._known.values():  # what has a row and is quickly brought up to date; then those that are new
            if one.row is not None:
                one.look(0.0)
        unseen = [one for one in self._known.values() if one.row is None]
        for one in sorted(unseen, key=lambda one: -stamp(one.run.metrics)[0]):
            if left(began + unseen_seconds):
                one.look(0.0)
        for one in self._known.values():
            if one.glance.behind and left(began + seconds):
                one.look(began + seconds)
            waiting += one.row is None or one.glance.behind
        self._set_apart([one for one in self._known.values() if one.row is not None])
        return Overview(sorted(self._known.values(), key=_order), waiting)

    def _set_apart(self, looked: list[Watched]) -> None:
        """Write into the rows which settings differ among the runs of a recipe."""
        known = [(one.name, one.settings) for one in looked if one.row.state != "imported"]
        if known != self._apart[0]:
            self._apart = (known, runs.differences(dict(known)))
        for one in looked:
            one.row = replace(one.row, differs=self._apart[1].get(one.name, {}))

    def chosen(self, names: Iterable[str]) -> list[Watched]:
        """The runs of these names that there are, looked at: at the ends of their logs alone."""
        self._find()
        found = [self._known[name] for name in names if name in self._known]
        for one in found:
            one.look(time.monotonic())
        return found

    def _find(self) -> None:
        found = {name: folder for folder, name in runs.find(self.folder)}
        self._known = {name: self._known.get(name) or Watched(folder, name) for name, folder in found.items()}


def _order(one: Watched) -> tuple:
    if one.row is None:
        return (2, one.name)
    if one.row.state == "training":  # by name: those that write all the time would change places all the time
        return (0, one.name)
    return (1, -one.row.written, one.name)


def stamp(path: Path) -> tuple[int, int, int]:
    """(time of the last change, size, inode) of a file or folder; zeros if it is not there."""
    try:
        about = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (about.st_mtime_ns, about.st_size, about.st_ino)
