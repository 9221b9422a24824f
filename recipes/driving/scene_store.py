"""Scenes on disk: the tracks of a split in one memory-mapped file, each map once, complete or absent.

Lists and names are lines of JSON, arrays are raw little-endian files, one after the other; an entry has the counts from
which offsets follow. What is read is what was written, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from aurora_train.data.prepared import Prepared, key_of, made, writing
from driving.scenes import Lane, Scene

FORMAT = 1
SPLITS = ("train", "validation", "test")
ARRAYS = {"states": "<f4", "sizes": "<f4", "lights": "<i1", "stops": "<f4"}


@dataclass(frozen=True)
class RoadMap:
    """What scenes of one map share; the fields are those of `Scene`."""

    lanes: tuple[Lane, ...]
    drivable: tuple[np.ndarray, ...]
    crossings: tuple[np.ndarray, ...]


class SceneStore(Prepared):
    """An open store of scenes."""

    def count(self, split: str) -> int:
        return self.manifest["scenes"][split]

    @cached_property
    def _offsets(self) -> dict[str, np.ndarray]:
        """int64[scenes + 1, 4] of each split: where its agents' states, agents, lights' states and lights begin."""
        offsets = {}
        for split in SPLITS:
            entries = self.lines(f"scenes-{split}.jsonl")
            counts = [(e["agents"] * e["steps"], e["agents"], e["lights"] * e["steps"], e["lights"]) for e in entries]
            offsets[split] = np.cumsum(np.array([(0, 0, 0, 0), *counts], np.int64), axis=0)
        return offsets

    @cached_property
    def _maps(self) -> dict[int, RoadMap]:
        return {}

    def map_number(self, split: str, index: int) -> int:
        """Which map a scene has; scenes with the same number share the very same `lanes`."""
        return self.lines(f"scenes-{split}.jsonl")[index]["map"]

    def scene(self, split: str, index: int) -> Scene:
        """Scene `index` of the split, its states read from the disk."""
        entry = self.lines(f"scenes-{split}.jsonl")[index]
        begin, end = self._offsets[split][index : index + 2]
        places = dict(zip(ARRAYS, zip(begin, end, strict=True), strict=True))
        array = {name: self._columns(name, split)[start:stop] for name, (start, stop) in places.items()}
        agents, steps, roads = entry["agents"], entry["steps"], self.roads(entry["map"])
        return Scene(
            entry["identifier"], entry["map_id"], tuple(entry["track_ids"]), tuple(entry["kinds"]),
            array["states"].reshape(agents, steps, 5), array["sizes"], entry["focal"], entry["observed"], roads.lanes,
            roads.drivable, array["lights"].reshape(-1, steps) if entry["has_lights"] else None,
            tuple(entry["light_lanes"]), array["stops"], tuple(entry["origin"]), roads.crossings, entry["city"],
        )  # fmt: skip

    def _columns(self, name: str, split: str) -> np.ndarray:
        array = self.array(f"{name}-{split}.bin", ARRAYS[name])
        width = {"states": 5, "sizes": 2, "stops": 2}.get(name)
        return array.reshape(-1, width) if width else array

    def roads(self, number: int) -> RoadMap:
        """A map, kept once it was read."""
        if number not in self._maps:
            entry = self.lines("maps.jsonl")[number]
            points = self.array("points.bin", "<f4").reshape(-1, 2)
            at = entry["first_point"]

            def line(count: int) -> np.ndarray:
                nonlocal at
                at += count
                return points[at - count : at]

            lanes = tuple(
                Lane(name, line(c), line(le), line(r), kind, tuple(after), math.nan if limit is None else limit, inside)
                for name, c, le, r, kind, after, limit, inside in entry["lanes"]
            )
            polygons = {name: tuple(line(count) for count in entry[name]) for name in ("drivable", "crossings")}
            self._maps[number] = RoadMap(lanes, **polygons)
        return self._maps[number]


def scene_store(folder: Path, decisive: dict, scenes: Callable, about: dict, progress) -> SceneStore:
    """The store below `folder` for what `decisive` names, made first if it is not there (`made`).

    Args:
        decisive: plain JSON that decides every scene: seeds, a listing of files, settings.
        scenes: called without arguments, returns an iterable of (split, Scene).
        about: plain JSON for the provenance: source, licence.
    """
    key = key_of({"format": FORMAT, **decisive})

    def write(temporary: Path) -> dict:
        with _Writer(temporary) as writer:
            for split, scene in scenes():
                writer.add(split, scene)
        return {"format": FORMAT, "key": key, **about, **writer.counts}

    with writing(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return made(SceneStore, Path(folder) / f"scenes-{key[:16]}", write, progress)


class _Writer:
    """Appends scenes to the files of a store."""

    def __init__(self, folder: Path):
        names = ["maps.jsonl", "points.bin", *(f"scenes-{split}.jsonl" for split in SPLITS)]
        names += [f"{array}-{split}.bin" for array in ARRAYS for split in SPLITS]
        self.folder, self.maps, self.points = folder, {}, 0
        self.scenes, self.agents = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        with writing(folder):
            self.files = {name: (folder / name).open("wb") for name in names}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with writing(self.folder):
            for file in self.files.values():
                file.close()

    @property
    def counts(self) -> dict:
        return {"scenes": self.scenes, "agents": self.agents, "maps": len(self.maps)}

    def add(self, split: str, scene: Scene) -> None:
        arrays = {
            "states": scene.states, "sizes": scene.sizes, "stops": scene.light_stops,
            "lights": np.zeros((0, scene.steps)) if scene.lights is None else scene.lights,
        }  # fmt: skip
        entry = {
            "identifier": scene.identifier, "map_id": scene.map_id, "map": self._map(scene), "city": scene.city,
            "track_ids": scene.track_ids, "kinds": scene.kinds, "agents": scene.num_agents, "steps": scene.steps,
            "focal": scene.focal, "observed": scene.observed, "origin": scene.origin,
            "has_lights": scene.lights is not None, "lights": len(scene.light_lanes), "light_lanes": scene.light_lanes,
        }  # fmt: skip
        with writing(self.folder):
            for name, array in arrays.items():
                self.files[f"{name}-{split}.bin"].write(np.ascontiguousarray(array, ARRAYS[name]).tobytes())
            self.files[f"scenes-{split}.jsonl"].write(f"{json.dumps(entry)}\n".encode())
        self.scenes[split] += 1
        self.agents[split] += scene.num_agents

    def _map(self, scene: Scene) -> int:
        """The number of the scene's map, which is written when it is first seen."""
        lines = [line for lane in scene.lanes for line in (lane.centre, lane.left, lane.right)]
        lines += [*scene.drivable, *scene.crossings]
        points = b"".join(np.ascontiguousarray(line, "<f4").tobytes() for line in lines)
        entry = {
            "lanes": [(lane.id, len(lane.centre), len(lane.left), len(lane.right), lane.kind, lane.successors,
                       None if np.isnan(lane.speed_limit) else lane.speed_limit, bool(lane.is_intersection))
                      for lane in scene.lanes],
            "drivable": [len(polygon) for polygon in scene.drivable],
            "crossings": [len(polygon) for polygon in scene.crossings],
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(entry).encode() + points).digest()
        if key not in self.maps:
            self.maps[key] = len(self.maps)
            with writing(self.folder):
                self.files["points.bin"].write(points)
                self.files["maps.jsonl"].write(f"{json.dumps(entry | {'first_point': self.points})}\n".encode())
            self.points += len(points) // 8
        return self.maps[key]
