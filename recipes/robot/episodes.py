"""Recorded episodes of a robot, in memory or as memory maps, and their store on disk.

A store grows episode by episode. Each episode is appended to one file per feature and then named in a journal with the
sha256 of its content, so that a recording or a decoding that was killed goes on after the last whole episode. The store
becomes visible, complete and hashed, only at its end: `aurora_train.data.prepared` publishes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aurora_train.data.prepared import Prepared, key_of, made, writing
from aurora_train.errors import UserError, nearest

FORMAT = 1
JOURNAL = "episodes.jsonl"


class Episode(NamedTuple):
    """One episode. `arrays`: name -> [T, ...], float32 values or uint8 images; `note`: JSON that the store keeps."""

    arrays: dict[str, np.ndarray]
    task: str = ""
    note: dict = {}


@dataclass(frozen=True)
class Episodes:
    """Episodes end to end; frame f of episode e is row `starts[e] + f` of every array.

    Attributes:
        arrays: feature -> [N, ...]: float32 values, or uint8[N, H, W, 3] images. They may be memory maps. The names
            are LeRobot's: "observation.state", "observation.environment_state", "observation.images.NAME", "action".
        starts, lengths: int64[E].
        tasks: the instruction of each episode; "" if it has none.
        fps: frames per second.
        names: the names of a vector's entries, for features that have some.
        source: where the episodes come from, as JSON.
        notes: what was noted with each episode when it was recorded; () if nothing was.
    """

    arrays: dict[str, np.ndarray]
    starts: np.ndarray
    lengths: np.ndarray
    tasks: tuple[str, ...]
    fps: float
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    source: dict = field(default_factory=dict)
    notes: tuple[dict, ...] = ()

    @classmethod
    def of(cls, episodes: list[Episode], fps: float, names=None, source=None) -> Episodes:
        """Episodes in memory. All must have the same features with the same shapes."""
        lengths = np.array([len(next(iter(one.arrays.values()))) for one in episodes], np.int64)
        arrays = {name: np.concatenate([one.arrays[name] for one in episodes]) for name in episodes[0].arrays}
        tasks, notes = tuple(one.task for one in episodes), tuple(one.note for one in episodes)
        return cls(arrays, np.cumsum(lengths) - lengths, lengths, tasks, fps, names or {}, source or {}, notes)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Episode]:
        return (self[e] for e in range(len(self)))

    def __getitem__(self, e: int) -> Episode:
        rows = slice(self.starts[e], self.starts[e] + self.lengths[e])
        note = self.notes[e] if self.notes else {}
        return Episode({name: array[rows] for name, array in self.arrays.items()}, self.tasks[e], note)

    def feature(self, name: str, where: str | None = None) -> np.ndarray:
        """The array of a feature; UserError placed at `where`, with the names that there are, if there is none."""
        if name not in self.arrays:
            there = f"the episodes have: {', '.join(self.arrays)}"
            raise UserError(f"the episodes have no feature `{name}`", where=where,
                            hint=nearest(name, self.arrays, there))  # fmt: skip
        return self.arrays[name]

    def rows(self, which: np.ndarray) -> np.ndarray:
        """int64: the rows of the frames of the episodes `which`, in their order."""
        parts = [np.arange(self.starts[e], self.starts[e] + self.lengths[e]) for e in which]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """sha256 hex of each episode's task and arrays."""
        return tuple(digest(one) for one in self)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of all content: the digests in order, the rate and the names."""
        return key_of({"episodes": self.digests, "fps": self.fps, "names": self.names})

    def write(self, folder: Path) -> None:
        """Keep the episodes as a store; nothing happens if the same ones are there. UserError for other contents."""
        there = kept(
            folder, {"fingerprint": self.fingerprint}, lambda notes: (self[e] for e in range(len(notes), len(self))),
            fps=self.fps, names=self.names, source=self.source,
        )  # fmt: skip
        if there.fingerprint != self.fingerprint:
            raise UserError("this folder holds other episodes", where=str(folder), hint="name a new folder")

    @classmethod
    def read(cls, folder: Path) -> Episodes:
        """The episodes of a store, as memory maps. UserError if a file is missing or was changed."""
        return Store(folder).episodes()


class Store(Prepared):
    """An open store: FEATURE.bin with the raw values of each feature, and the journal of the episodes."""

    def episodes(self) -> Episodes:
        lines = [json.loads(line) for line in (self.folder / JOURNAL).read_text().splitlines()]
        lengths = np.array([line["length"] for line in lines], np.int64)
        arrays = {
            name: self.array(f"{name}.bin", one["dtype"]).reshape(-1, *one["shape"])
            for name, one in self.manifest["features"].items()
        }
        names = {name: tuple(entries) for name, entries in self.manifest["names"].items()}
        found = Episodes(arrays, np.cumsum(lengths) - lengths, lengths, tuple(line["task"] for line in lines),
                         self.manifest["fps"], names, self.manifest["source"],
                         tuple(line["note"] for line in lines))  # fmt: skip
        # What the cached property would compute anew: the files were verified by their own hashes.
        found.__dict__["digests"] = tuple(line["sha256"] for line in lines)
        return found


def kept(
    folder: Path, decisive: dict, grow: Callable[[list[dict]], Iterator[Episode]], *, fps: float, names=None,
    source=None, progress: Callable = lambda done, total, what: None, what: str = "episodes", total: int | None = None,
) -> Episodes:  # fmt: skip
    """The episodes of the store `folder`; they are made first if it does not exist.

    Args:
        folder: its name should depend on `decisive`, all that decides the content, as JSON.
        grow: given the notes of the episodes that an interrupted call has kept, it yields those that follow them.
        total, what: how many episodes there will be, and what is done with them, for `progress`.

    Raises UserError for a folder that cannot be written, and whatever `grow` raises; the episodes made by then stay.
    """
    folder = Path(folder)
    growing = folder.with_name(f"{folder.name}.growing")
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> dict:
        journal = _Growing(growing, key_of(decisive))
        for episode in grow([line["note"] for line in journal.lines]):
            with writing(folder.parent):
                journal.add(episode)
            progress(len(journal.lines), total, what)
        with writing(folder.parent):
            return journal.link(temporary) | {"fps": fps, "names": names or {}, "source": source or {}}

    store = made(Store, folder, write, progress)
    shutil.rmtree(growing, ignore_errors=True)
    return store.episodes()


class _Growing:
    """A store that is being written, and what an earlier process left of it: whole episodes whose hashes are right."""

    def __init__(self, folder: Path, key: str):
        self.folder, self.key, self.lines, self.features = folder, key, [], {}
        head, *lines = self._left()
        if head == key:
            self._keep(lines)
        if not self.lines:
            self.features = {}
            shutil.rmtree(folder, ignore_errors=True)
            with writing(folder.parent):
                folder.mkdir()
                (folder / JOURNAL).write_text(json.dumps({"key": key}) + "\n")

    def _left(self) -> list:
        """The key of the store that was begun, and the whole lines of its journal."""
        try:
            text = (self.folder / JOURNAL).read_text()
            head, *lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        except (OSError, ValueError):
            return [None]
        return [head["key"], *lines]

    def _keep(self, lines: list[dict]) -> None:
        """Take over the episodes up to the first whose bytes are not those that were hashed; cut off the rest."""
        self.features = lines[0]["features"] if lines else {}
        paths = {name: self.folder / f"{name}.bin" for name in self.features}
        maps = {name: _whole(path, one["dtype"]) for (name, path), one in zip(
            paths.items(), self.features.values(), strict=True)}  # fmt: skip
        sizes, at = {name: int(np.prod(one["shape"])) for name, one in self.features.items()}, 0
        for line in lines:
            end = at + line["length"]
            found = {name: maps[name][at * size : end * size].reshape(-1, *self.features[name]["shape"])
                     for name, size in sizes.items() if len(maps[name]) >= end * size}  # fmt: skip
            if len(found) < len(sizes) or digest(Episode(found, line["task"])) != line["sha256"]:
                break
            self.lines.append(line)
            at = end
        del maps
        for name, path in paths.items() if self.lines else ():
            os.truncate(path, at * sizes[name] * np.dtype(self.features[name]["dtype"]).itemsize)
        if self.lines:
            text = [json.dumps({"key": self.key}), *map(json.dumps, self.lines)]
            (self.folder / JOURNAL).write_text("\n".join(text) + "\n")

    def add(self, episode: Episode) -> None:
        features = {name: {"dtype": str(array.dtype), "shape": list(array.shape[1:])}
                    for name, array in episode.arrays.items()}  # fmt: skip
        lengths = {len(array) for array in episode.arrays.values()}
        self.features = self.features or features
        assert features == self.features and len(lengths) == 1, f"episode {len(self.lines)} differs: {features}"
        for name, array in episode.arrays.items():
            with (self.folder / f"{name}.bin").open("ab") as file:
                file.write(np.ascontiguousarray(array).data)
        line = {"length": lengths.pop(), "task": episode.task, "sha256": digest(episode), "note": episode.note}
        line |= {} if self.lines else {"features": features}
        self.lines.append(line)
        with (self.folder / JOURNAL).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def link(self, temporary: Path) -> dict:
        """Put the files into the store's folder; returns its manifest. They stay here until the store is published."""
        for name in self.features:
            os.link(self.folder / f"{name}.bin", temporary / f"{name}.bin")
        (temporary / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        return {"format": FORMAT, "key": self.key, "features": self.features}


def _whole(path: Path, dtype: str) -> np.ndarray:
    """The whole values of a raw file, whose last one may be cut short; none if there is no file."""
    number = path.stat().st_size // np.dtype(dtype).itemsize if path.is_file() else 0
    return np.memmap(path, dtype, "r", shape=(number,)) if number else np.empty(0, dtype)


def digest(episode: Episode) -> str:
    """sha256 hex of an episode's task and arrays, with their names, types and shapes. The note does not count."""
    hasher = hashlib.sha256(json.dumps(episode.task).encode())
    for name, array in sorted(episode.arrays.items()):
        hasher.update(f"{name} {array.dtype} {array.shape}\n".encode())
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()
