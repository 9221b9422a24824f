"""Scenes as Argoverse 2 scenarios, which the package av2 opens: for its tools and metrics, and to exchange made scenes.

What the format lacks is kept where av2 does not look: columns `length_m` and `width_m`, `speed_limit_mps` of a lane,
and lights in `traffic_lights_ID.json`. `argoverse.read_scene` reads back the scene that was written.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from aurora_train.errors import UserError
from driving.argoverse import LIGHT_WORDS, NUMBERS
from driving.scenes import STEP_S, Scene

FRAGMENT, UNSCORED, FOCAL = 0, 1, 3  # Argoverse 2's categories of tracks


def write_scene(scene: Scene, folder: Path) -> Path:
    """Write `folder/ID/scenario_ID.parquet` and the map beside it; returns the path of the parquet file.

    Raises UserError for what the format cannot hold: no agents, no focal one, or lanes whose ids are not numbers; and
    for an identifier that is not the name of a file, since that of a recording comes from elsewhere.
    """
    if scene.identifier != Path(scene.identifier).name or scene.identifier in ("", ".."):
        raise UserError(f"the identifier {scene.identifier!r} cannot be the name of a folder", where=str(folder))
    if scene.num_agents == 0 or scene.focal < 0:
        raise UserError("a scenario of Argoverse 2 must have a focal track", where=f"scene {scene.identifier}",
                        why="its number of steps and its id are columns of the tracks' rows")  # fmt: skip
    place = Path(folder) / scene.identifier
    place.mkdir(parents=True, exist_ok=True)
    if scene.lanes or scene.drivable or scene.crossings:
        (place / f"log_map_archive_{scene.identifier}.json").write_text(json.dumps(_map(scene)))
    if scene.lights is not None:
        (place / f"traffic_lights_{scene.identifier}.json").write_text(json.dumps(_lights(scene)))
    # A folder without its tracks is no scenario, so an interrupted export leaves none that lacks its map.
    path = place / f"scenario_{scene.identifier}.parquet"
    _write_tracks(scene, path)
    return path


def _write_tracks(scene: Scene, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    agent, step = np.nonzero(scene.valid)
    values = scene.states[agent, step].astype(np.float64)
    values[:, :2] += scene.origin
    whole = scene.valid.all(axis=1)
    category = np.where(whole, UNSCORED, FRAGMENT)
    category[scene.focal] = FOCAL
    rows = len(agent)
    columns = {
        "observed": step < scene.observed,
        "track_id": np.array(scene.track_ids)[agent],
        "object_type": np.array(scene.kinds)[agent],
        "object_category": category[agent],
        "timestep": step,
        **{name: values[:, k] for k, name in enumerate(NUMBERS)},
        "scenario_id": np.full(rows, scene.identifier),
        "start_timestamp": np.zeros(rows, np.int64),
        "end_timestamp": np.full(rows, round((scene.steps - 1) * STEP_S * 1e9), np.int64),
        "num_timestamps": np.full(rows, scene.steps, np.int64),
        "focal_track_id": np.full(rows, scene.track_ids[scene.focal]),
        "city": np.full(rows, scene.city),
        "map_id": np.full(rows, scene.map_id),
        "length_m": scene.sizes[agent, 0],
        "width_m": scene.sizes[agent, 1],
    }
    beside = path.with_name(path.name + ".new")
    pyarrow.parquet.write_table(pyarrow.table(columns), beside)
    beside.replace(path)


def _map(scene: Scene) -> dict:
    def points(line: np.ndarray) -> list[dict]:
        moved = line.astype(np.float64) + scene.origin
        return [{"x": float(x), "y": float(y), "z": 0.0} for x, y in moved]

    before: dict[str, list[int]] = {}
    for lane in scene.lanes:
        for name in lane.successors:
            before.setdefault(name, []).append(_number(lane.id, scene))
    lanes = {
        lane.id: {
            "id": _number(lane.id, scene), "is_intersection": bool(lane.is_intersection), "lane_type": lane.kind,
            "centerline": points(lane.centre), "left_lane_boundary": points(lane.left),
            "right_lane_boundary": points(lane.right), "left_lane_mark_type": "UNKNOWN",
            "right_lane_mark_type": "UNKNOWN", "left_neighbor_id": None, "right_neighbor_id": None,
            "predecessors": before.get(lane.id, []), "successors": [_number(name, scene) for name in lane.successors],
            **({} if np.isnan(lane.speed_limit) else {"speed_limit_mps": float(lane.speed_limit)}),
        }
        for lane in scene.lanes
    }  # fmt: skip
    areas = {f"{k}": {"id": k, "area_boundary": points(area)} for k, area in enumerate(scene.drivable)}
    crossings = {f"{k}": {"id": k, "edge1": points(c[:2]), "edge2": points(c[:1:-1])}
                 for k, c in enumerate(scene.crossings)}  # fmt: skip
    return {"lane_segments": lanes, "drivable_areas": areas, "pedestrian_crossings": crossings}


def _number(name: str, scene: Scene) -> int:
    """A lane's id as the whole number that it is in Argoverse 2."""
    if not name.lstrip("-").isdigit():
        raise UserError(f"lane {name!r} has no whole number as its id", where=f"scene {scene.identifier}",
                        why="Argoverse 2 has numbers")  # fmt: skip
    return int(name)


def _lights(scene: Scene) -> dict:
    words = {value: word for word, value in LIGHT_WORDS.items()}
    stops = scene.light_stops.astype(np.float64) + scene.origin
    lights = [
        {"lane_id": _number(lane, scene), "stop": {"x": x, "y": y}, "states": [words[int(state)] for state in row]}
        for lane, (x, y), row in zip(scene.light_lanes, stops.tolist(), scene.lights, strict=True)
    ]
    return {"lights": lights}
