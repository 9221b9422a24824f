"""Argoverse 2 motion forecasting: a scenario's tracks (parquet) and map (JSON) as a `Scene`, read without torch or av2.

A scenario is a folder with `scenario_ID.parquet`, one row for each track and step, in any order, and
`log_map_archive_ID.json`; without a map file the scene has no map. The format has no sizes of boxes, no lights and no
speed limits. `argoverse_writing` adds them where av2 does not look: two columns, a third file and a key of each lane.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from aurora_train.errors import UserError, nearest
from driving.argoverse_map import Map, read_map
from driving.scenes import DEFAULT_SIZES, GREEN, KINDS, RED, STEP_S, UNKNOWN, YELLOW, Scene

NUMBERS = ("position_x", "position_y", "heading", "velocity_x", "velocity_y")
PER_SCENARIO = ("scenario_id", "start_timestamp", "end_timestamp", "num_timestamps", "focal_track_id", "city")
COLUMNS = ("observed", "track_id", "object_type", "object_category", "timestep", *NUMBERS, *PER_SCENARIO)
SIZES = ("length_m", "width_m")  # ours; absent from Argoverse's own files
NEAR_M = 1000.0  # nearer to (0, 0) than this, float32 resolves 0.06 mm and no origin is needed
LIGHT_WORDS = {"unknown": UNKNOWN, "green": GREEN, "yellow": YELLOW, "red": RED}


def scenario_files(folder: Path) -> list[Path]:
    """The scenario files in a folder of scenario folders, sorted by name. UserError if there are none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(folder), hint="name the folder of the scenario folders")
    files = sorted(folder.glob("*/scenario_*.parquet")) or sorted(folder.glob("scenario_*.parquet"))
    if not files:
        below = next((path.parents[1] for path in sorted(folder.glob("*/*/scenario_*.parquet"))), None)
        hint = f"did you mean {below}?" if below else "a scenario is a folder ID with the file scenario_ID.parquet"
        raise UserError("there are no scenarios of Argoverse 2 in it", where=str(folder), hint=hint)
    return files


def read_scene(path: Path) -> Scene:
    """The scene in a scenario file and the map beside it. UserError names the file, and the track or row at fault."""
    path = Path(path)
    columns = _columns(path)
    about = {name: _constant(columns[name], name, path) for name in PER_SCENARIO}
    steps = _num_steps(about, path)
    tracks, track_of_row = np.unique(columns["track_id"], return_inverse=True)
    _check_rows(columns, tracks, track_of_row, steps, path)
    origin = _origin(columns, about["focal_track_id"])
    values = np.stack([columns[name] for name in NUMBERS], axis=1)
    values[:, :2] -= origin
    states = np.full((len(tracks), steps, 5), np.nan, np.float32)
    states[track_of_row, columns["timestep"]] = values
    kinds = _per_track(columns["object_type"], "object_type", tracks, track_of_row, path)
    sizes = [DEFAULT_SIZES[kind] for kind in kinds]
    if set(SIZES) <= set(columns):
        sizes = np.stack([_per_track(columns[name], name, tracks, track_of_row, path) for name in SIZES], axis=1)
    road = _map_beside(path, origin)
    lights = _lights_beside(path, steps, origin, road)
    return Scene(
        str(about["scenario_id"]), str(columns["map_id"][0]) if "map_id" in columns else str(about["scenario_id"]),
        tuple(map(str, tracks)), tuple(map(str, kinds)), states, np.asarray(sizes, np.float32).reshape(-1, 2),
        _focal(about["focal_track_id"], tracks, path), _observed(columns, tracks, path), road.lanes, road.drivable,
        *lights, origin, road.crossings, str(about["city"]),
    )  # fmt: skip


def _columns(path: Path) -> dict[str, np.ndarray]:
    """The needed columns as arrays, of the dtype that each must have."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise UserError(f"it has no column `{missing[0]}`", where=str(path), why="it has " + ", ".join(names),
                            hint="a scenario of Argoverse 2 forecasting has all of " + ", ".join(COLUMNS))  # fmt: skip
        optional = [name for name in ("map_id", *SIZES) if name in names]
        table = file.read([*COLUMNS, *optional])
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError("this is not a whole parquet file", where=str(path), why=str(error).split("\n")[0]) from error
    if table.num_rows == 0:
        raise UserError("it has no rows", where=str(path), why="a scenario without tracks names no focal track")
    return {name: _column(table.column(name), name, path) for name in [*COLUMNS, *optional]}


def _column(column, name: str, path: Path) -> np.ndarray:
    import pyarrow.types as types

    def wrong(what: str) -> UserError:
        return UserError(f"column `{name}` {what}", where=str(path))

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise UserError(f"column `{name}` is empty in row {row}", where=str(path), why="a track with a null disappears")
    if name in (*NUMBERS, *SIZES):
        if not (types.is_floating(kind) or types.is_integer(kind)):
            raise wrong(f"holds {kind}, not numbers")
        return column.to_numpy().astype(np.float64)
    if name in ("timestep", "num_timestamps", "start_timestamp", "end_timestamp"):
        if not (types.is_integer(kind) or types.is_floating(kind)):
            raise wrong(f"holds {kind}, not whole numbers")
        values = column.to_numpy()
        if not np.array_equal(values, np.floor(values)):
            raise wrong("holds numbers that are not whole")
        return values.astype(np.int64)
    if name == "observed":
        if not types.is_boolean(kind):
            raise wrong(f"holds {kind}, not true and false")
        return column.to_numpy().astype(bool)
    # Ids are text. Where a writer kept them as numbers, their digits are the text.
    return np.array([str(value) for value in column.to_pylist()])


def _constant(values: np.ndarray, name: str, path: Path):
    different = np.flatnonzero(values != values[0])
    if len(different):
        raise UserError(
            f"column `{name}` is {values[0]!s} in row 0 and {values[different[0]]!s} in row {different[0]}",
            where=str(path), why="it is the same in all rows of one scenario", hint="write one file for each scenario",
        )  # fmt: skip
    return values[0]


def _num_steps(about: dict, path: Path) -> int:
    steps, span_ns = int(about["num_timestamps"]), int(about["end_timestamp"]) - int(about["start_timestamp"])
    if steps < 1:
        raise UserError(f"num_timestamps is {steps}", where=str(path), why="a scenario has at least one step")
    if steps > 1 and not 0.9 < span_ns / (steps - 1) / (STEP_S * 1e9) < 1.1:
        raise UserError(
            f"its {steps} steps span {span_ns / 1e9:g} s", where=str(path), hint="resample the tracks to 10 Hz",
            why=f"a step is {STEP_S} s, timestamps are nanoseconds",
        )  # fmt: skip
    return steps


def _check_rows(columns, tracks, track_of_row, steps: int, path: Path) -> None:
    """Every row can be placed, once, and says something possible."""

    def refuse(bad: np.ndarray, what, why: str, hint: str | None = None) -> None:
        rows = np.flatnonzero(bad)
        if len(rows):
            row = int(rows[0])
            where = f"{path}, row {row}, track {tracks[track_of_row[row]]}"
            raise UserError(what(row), where=where, why=why, hint=hint)

    timestep, heading, kind = columns["timestep"], columns["heading"], columns["object_type"]
    refuse((timestep < 0) | (timestep >= steps), lambda row: f"timestep {timestep[row]} is outside of the scenario",
           f"num_timestamps is {steps}")  # fmt: skip
    order = np.lexsort((np.arange(len(timestep)), timestep, track_of_row))
    again = np.zeros(len(timestep), bool)
    same = (np.diff(track_of_row[order]) == 0) & (np.diff(timestep[order]) == 0)
    again[order[1:]] = same
    refuse(again, lambda row: f"timestep {timestep[row]} of this track was there before", "a track has one row a step")
    for name in NUMBERS:
        refuse(~np.isfinite(columns[name]), lambda row, name=name: f"`{name}` is {columns[name][row]}",
               "what was not observed has no row")  # fmt: skip
    refuse(np.abs(heading) > 2 * math.pi + 1e-3, lambda row: f"the heading is {heading[row]:g}",
           "headings are radians, counterclockwise from the x axis", "convert degrees")  # fmt: skip
    unknown = ~np.isin(kind, KINDS)
    refuse(unknown, lambda row: f"the object type is `{kind[row]}`", f"the types are {', '.join(KINDS)}",
           nearest(str(kind[unknown][0]), KINDS) if unknown.any() else None)  # fmt: skip
    for name in (name for name in SIZES if name in columns):
        sizes = columns[name]
        refuse(~((sizes > 0) & np.isfinite(sizes)),
               lambda row, name=name, sizes=sizes: f"`{name}` is {sizes[row]:g}", "a box has a size")  # fmt: skip


def _per_track(values: np.ndarray, name: str, tracks, track_of_row, path: Path) -> np.ndarray:
    """One value for each track. UserError if it changes within a track."""
    first = np.zeros(len(tracks), int)
    first[track_of_row[::-1]] = np.arange(len(values))[::-1]
    one = values[first]
    changed = np.flatnonzero(values != one[track_of_row])
    if len(changed):
        row, track = int(changed[0]), track_of_row[changed[0]]
        raise UserError(f"`{name}` changes from {one[track]} to {values[row]}", why="it is one value for each track",
                        where=f"{path}, row {row}, track {tracks[track]}")  # fmt: skip
    return one


def _observed(columns, tracks, path: Path) -> int:
    """The number of history steps: rows up to one step are `observed`, and those after it are not."""
    observed, timestep = columns["observed"], columns["timestep"]
    if not observed.any():
        raise UserError("no row is observed", where=str(path), why="a scene without a history cannot be continued")
    number = int(timestep[observed].max()) + 1
    early = np.flatnonzero(~observed & (timestep < number))
    if len(early):
        raise UserError(f"timestep {timestep[early[0]]} is not observed, but timestep {number - 1} is",
                        where=f"{path}, row {early[0]}, track {columns['track_id'][early[0]]}",
                        why="the history ends at one step for all tracks")  # fmt: skip
    return number


def _focal(name: str, tracks: np.ndarray, path: Path) -> int:
    found = np.flatnonzero(tracks == name)
    if not len(found):
        raise UserError(f"the focal track {name!r} has no rows", where=str(path),
                        hint=nearest(str(name), tracks, f"its tracks are {', '.join(tracks[:10])}"))  # fmt: skip
    return int(found[0])


def _origin(columns, focal: str) -> tuple[float, float]:
    """Whole metres near the focal track if coordinates are large, so that float32 keeps its millimetres."""
    xy = np.stack([columns["position_x"], columns["position_y"]], axis=1)
    if np.abs(xy).max() < NEAR_M:
        return 0.0, 0.0
    rows = np.flatnonzero(columns["track_id"] == focal)
    x, y = np.round(xy[rows[columns["timestep"][rows].argmin()] if len(rows) else 0])
    return float(x), float(y)


def _map_beside(path: Path, origin) -> Map:
    """The map in the scenario's folder; an empty one if there is none."""
    own = path.with_name(f"log_map_archive_{path.stem.removeprefix('scenario_')}.json")
    found = [own] if own.exists() else sorted(path.parent.glob("log_map_archive_*.json"))
    if len(found) > 1:
        raise UserError("it has several maps beside it", where=str(path), why=", ".join(file.name for file in found),
                        hint=f"the scenario's own map is named {own.name}")  # fmt: skip
    return read_map(found[0], origin) if found else Map((), (), ())


def _lights_beside(path: Path, steps: int, origin, road: Map):
    """(lights int8[L, T] or None, lanes, stops float32[L, 2]) from the file that `argoverse_writing` puts there."""
    file = path.with_name(f"traffic_lights_{path.stem.removeprefix('scenario_')}.json")
    if not file.exists():
        return None, (), np.zeros((0, 2), np.float32)
    known = {lane.id for lane in road.lanes}
    try:
        entries = json.loads(file.read_text())["lights"]
        lanes = tuple(str(entry["lane_id"]) for entry in entries)
        stops = np.array([[entry["stop"]["x"], entry["stop"]["y"]] for entry in entries], np.float64).reshape(-1, 2)
        if not np.isfinite(stops).all():
            raise ValueError("a stop is not finite")
        words = [entry["states"] for entry in entries]
        states = np.array([[LIGHT_WORDS[word] for word in row] for row in words], np.int8)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"this is not a file of lights ({type(error).__name__}: {error})", where=str(file),
                        why="a light has lane_id, stop (x, y) and states, each of "
                        + ", ".join(LIGHT_WORDS)) from error  # fmt: skip
    for number, lane in enumerate(lanes):
        if lane not in known:
            raise UserError(f"light {number} governs the lane {lane}, which the map does not have", where=str(file))
        if len(words[number]) != steps:
            raise UserError(f"light {number} has {len(words[number])} states", where=str(file),
                            why=f"the scenario has {steps} steps")  # fmt: skip
    return states.reshape(-1, steps), lanes, (stops - origin).astype(np.float32)
