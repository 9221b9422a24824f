"""Prepared scenes of an Argoverse 2 folder, with whole maps held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from driving import argoverse
from driving.scene_store import SceneStore, scene_store
from driving.scenes import Scene

FORMAT = 2  # raised whenever the same files mean other scenes


def recorded_scenes(folder: Path, source: Path, held_out: float, progress) -> SceneStore:
    """The store below `folder` of the scenarios in `source`.

    If `source` has the folders `train` and `val`, as Argoverse 2 comes, the scenes of `val` are the test split, and
    `held_out` / 2 of the maps in `train` are for validation. Otherwise `held_out` of the maps are the test split and
    half as many are for validation. A map belongs to a split by the hash of its id, so more data move no map. A
    scenario without `map_id` counts as a map of its own. With `held_out` 1 every scene of `source` is in the test
    split. `progress(done, total, what)` is told of scenarios.
    """
    source = Path(source).expanduser()
    published = (source / "train").is_dir() and (source / "val").is_dir()
    parts = {"train": source / "train", "test": source / "val"} if published else {"all": source}
    files = {part: argoverse.scenario_files(place) for part, place in parts.items()}
    listing = [(part, str(path.relative_to(source)), *_stamp(path)) for part in files for path in files[part]]
    decisive = {"reader": "Argoverse 2", "version": FORMAT, "held_out": held_out, "files": listing}

    def made() -> Iterator[tuple[str, Scene]]:
        done = 0
        for part, paths in files.items():
            for path in paths:
                progress(done, len(listing), "reading scenarios")
                scene = argoverse.read_scene(path)
                yield split_of(scene.map_id, held_out, published and part), scene
                done += 1
        progress(done, done, "scenarios")

    about = {"source": str(source), "licence": "that of the recordings"}
    return scene_store(folder, decisive, made, about, progress)


def split_of(map_id: str, held_out: float, part: str | bool = False) -> str:
    """The split of a map; `part` is "train" or "test" where the data come divided."""
    share = int.from_bytes(hashlib.sha256(f"aurora map {map_id}".encode()).digest()[:6], "big") / 2**48
    if part == "test" or held_out >= 1:
        return "test"
    if part == "train":
        return "validation" if share < held_out / 2 else "train"
    return "test" if share < held_out else "validation" if share < 1.5 * held_out else "train"


def _stamp(path: Path) -> list[tuple[int, int]]:
    """Size and time of change of the files that make a scene."""
    found = sorted(file for file in path.parent.iterdir() if file.suffix in (".parquet", ".json"))
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in found]
