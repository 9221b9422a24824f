"""Prepared scenes of a simulator, the car-following one or SUMO: every split has maps of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from driving import car_following, roads, sumo_process, sumo_scenes
from driving.scene_store import SPLITS, SceneStore, scene_store
from driving.scenes import Scene
from driving.settings import SUMO

CAR_FOLLOWING = "car-following"
FIRST_MAP = {"train": 0, "validation": 1_000_000, "test": 2_000_000}  # seeds, so that more maps change no other split


def generated_scenes(
    folder: Path, maps: dict[str, int], scenes_per_map: int, seed: int, progress, simulator: str = CAR_FOLLOWING
) -> SceneStore:
    """The store of `maps[split]` maps for each split, with `scenes_per_map` successive scenes of 11 s on each.

    `seed` is that of the traffic; the maps are the same for all seeds. `progress(done, total, what)` is told of maps.
    `simulator` is CAR_FOLLOWING or SUMO, which needs the extra `driving` (MissingExtra).
    """
    if simulator == SUMO:
        simulate, of = sumo_process.simulations, {"version": sumo_scenes.sumo_version(), "format": sumo_scenes.FORMAT}
        source = f"simulated by SUMO {of['version']}"
    else:
        simulate, of = car_following.simulations, {"formats": [roads.FORMAT, car_following.FORMAT]}
        source = "simulated by a car-following model"
    counts = {split: maps[split] for split in SPLITS}
    decisive = {"simulator": simulator, **of, "maps": counts, "scenes_per_map": scenes_per_map, "seed": seed}
    places = [(split, FIRST_MAP[split] + k) for split in SPLITS for k in range(maps[split])]

    def made() -> Iterator[tuple[str, Scene]]:
        progress(0, len(places), "simulating traffic")
        simulated = simulate([number for _, number in places], scenes_per_map, seed)
        for done, ((split, _), scenes) in enumerate(zip(places, simulated, strict=True), 1):
            yield from ((split, scene) for scene in scenes)
            progress(done, len(places), "simulating traffic")

    about = {"source": source, "licence": "none needed", "traffic_seed": seed}
    return scene_store(folder, decisive, made, about, progress)
