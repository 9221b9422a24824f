"""The map of an Argoverse 2 scenario: lanes, drivable areas and pedestrian crossings of `log_map_archive_ID.json`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aurora_train.errors import UserError, nearest
from driving.scenes import LANE_KINDS, Lane


@dataclass(frozen=True)
class Map:
    """The fields of a `Scene` that come from a map."""

    lanes: tuple[Lane, ...]
    drivable: tuple[np.ndarray, ...]
    crossings: tuple[np.ndarray, ...]


def read_map(path: Path, origin: tuple[float, float]) -> Map:
    """The map in a file, its coordinates relative to `origin`. UserError names the file and the lane or area."""
    try:
        content = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError("this map is not JSON, or is cut short", where=str(path), why=str(error)) from error
    layers = {}
    for name in ("lane_segments", "drivable_areas", "pedestrian_crossings"):
        layer = content.get(name) if isinstance(content, dict) else None
        if not isinstance(layer, dict):
            raise UserError(f"this map has no `{name}`", where=str(path), why="a map has three layers, by id",
                            hint="a layer may be empty: {}")  # fmt: skip
        layers[name] = [_Entry(path, f"{name} {key}", entry, origin) for key, entry in layer.items()]
    lanes = [_lane(entry) for entry in layers["lane_segments"]]
    seen = set()
    for lane in lanes:
        if lane.id in seen:
            raise UserError(f"two lanes have the id {lane.id}", where=str(path), why="ids are unique in a map")
        seen.add(lane.id)
    drivable = [entry.line("area_boundary", least=3) for entry in layers["drivable_areas"]]
    crossings = [np.concatenate([entry.line("edge1", exactly=2), entry.line("edge2", exactly=2)[::-1]])
                 for entry in layers["pedestrian_crossings"]]  # fmt: skip
    return Map(tuple(lanes), tuple(drivable), tuple(crossings))


@dataclass(frozen=True)
class _Entry:
    """One object of a layer."""

    path: Path
    name: str
    content: dict
    origin: tuple[float, float]

    def refuse(self, what: str, why: str | None = None, hint: str | None = None) -> UserError:
        return UserError(what, where=f"{self.path}, {self.name}", why=why, hint=hint)

    def get(self, key: str):
        if not isinstance(self.content, dict) or key not in self.content:
            known = list(self.content) if isinstance(self.content, dict) else []
            raise self.refuse(f"it has no `{key}`", hint=nearest(key, known))
        return self.content[key]

    def line(self, key: str, least: int = 2, exactly: int | None = None) -> np.ndarray:
        """float32[P, 2] of a list of points {x, y, z}."""
        points = self.get(key)
        try:
            line = np.array([[point["x"], point["y"]] for point in points], np.float64).reshape(-1, 2)
        except (KeyError, TypeError, ValueError) as error:
            raise self.refuse(f"`{key}` is not a list of points", why="a point is {x, y, z}, in metres") from error
        if not np.isfinite(line).all():
            point = int(np.argmin(np.isfinite(line).all(axis=1)))
            raise self.refuse(f"point {point} of `{key}` is not finite", why=str(points[point]))
        if len(line) < (exactly or least) or exactly and len(line) > exactly:
            wanted = f"{exactly}" if exactly else f"at least {least}"
            raise self.refuse(f"`{key}` has {len(line)} point{'s' * (len(line) != 1)}", why=f"it must have {wanted}")
        return (line - self.origin).astype(np.float32)


def _lane(entry: _Entry) -> Lane:
    left, right = entry.line("left_lane_boundary"), entry.line("right_lane_boundary")
    centre = entry.line("centerline") if "centerline" in entry.content else _between(left, right)
    kind, successors = entry.get("lane_type"), entry.get("successors")
    if kind not in LANE_KINDS:
        why = f"the types are {', '.join(LANE_KINDS)}"
        raise entry.refuse(f"the lane type is {kind!r}", why, nearest(kind, LANE_KINDS))
    if not isinstance(successors, list):
        raise entry.refuse("`successors` is not a list of ids")
    limit = entry.content.get("speed_limit_mps")  # ours; absent from Argoverse's own maps
    if limit is not None and not (isinstance(limit, int | float) and 0 < limit < math.inf):
        raise entry.refuse(f"`speed_limit_mps` is {limit!r}", "it is a positive number of m/s")
    return Lane(str(entry.get("id")), centre, left, right, kind, tuple(map(str, successors)),
                math.nan if limit is None else float(limit), bool(entry.get("is_intersection")))  # fmt: skip


def _between(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The middle of two lines with points at equal shares of their lengths."""
    shares = np.linspace(0, 1, max(len(left), len(right), 10))
    lines = []
    for line in (left.astype(np.float64), right.astype(np.float64)):
        along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
        lines.append(np.stack([np.interp(shares * along[-1], along, line[:, axis]) for axis in (0, 1)], axis=1))
    return ((lines[0] + lines[1]) / 2).astype(np.float32)
