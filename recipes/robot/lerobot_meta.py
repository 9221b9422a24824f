"""The metadata of a LeRobot v3.0 dataset: info.json, the table of instructions and the table of episodes, all checked.

The library itself opens datasets whose tables contradict each other, and hands out wrong items. Here every such
dataset is refused, with the file and the episode. Layout: huggingface/lerobot, releases 0.4 to 0.6.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aurora_train.errors import UserError, nearest

VERSION = "v3.0"
INFO, TASKS, EPISODES = "meta/info.json", "meta/tasks.parquet", "meta/episodes"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
OWN = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
TOLERANCE_S = 1e-4  # of a time, as in the library


class Feature(NamedTuple):
    """`dtype`: "float32" and the like, "video", "image" (in the data files), or "string". A camera's `shape` is height,
    width, 3. `names`: of a vector's entries."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None

    @property
    def is_camera(self) -> bool:
        return self.dtype in ("video", "image")


class Place(NamedTuple):
    """Where an episode lies in a video file: its name, and the time in it of the first frame."""

    file: str
    from_s: float


@dataclass(frozen=True)
class Meta:
    """A dataset's metadata; every list has an entry for each episode.

    Attributes:
        tasks: the instructions by `task_index`.
        instruction: the place in `tasks` of each episode's one instruction.
        lengths: int64[E] frames.
        data: the name of the data file of each episode.
        videos: camera -> `Place` of each episode.
    """

    folder: Path
    info: dict
    fps: float
    features: dict[str, Feature]
    tasks: tuple[str, ...]
    instruction: np.ndarray
    lengths: np.ndarray
    data: tuple[str, ...]
    videos: dict[str, tuple[Place, ...]]


def fault(folder: Path, file: str, what: str, *, why: str | None = None, hint: str | None = None) -> UserError:
    """The error of a file of a dataset."""
    return UserError(what, where=str(Path(folder) / file), why=why, hint=hint)


def read_meta(folder: str | Path) -> Meta:
    """Read and check all metadata. Raises UserError with the file, and the episode if there is one."""
    folder = Path(folder).expanduser()
    info = _read_info(folder)
    fps, features = _fps(folder, info), _features(folder, info)
    tasks = _read_tasks(folder)
    rows = _read_episodes(folder, [name for name, one in features.items() if one.dtype == "video"])
    lengths = _lengths(folder, rows)
    totals = {"total_episodes": len(rows), "total_frames": int(lengths.sum()), "total_tasks": len(tasks)}
    for name, count in totals.items():
        if info.get(name) != count:
            raise fault(folder, INFO, f"`{name}` is {info.get(name)}, and the tables have {count}",
                        why="a dataset is complete, or it is not used",
                        hint="was `finalize()` called, and was all of it copied?")  # fmt: skip
    videos = {name: tuple(_place(folder, info, name, row, fps, features) for row in rows)
              for name, one in features.items() if one.dtype == "video"}  # fmt: skip
    data = tuple(_file(folder, info, "data_path", row, "data/", file) for file, row in rows)
    instruction = np.array([_instruction(folder, tasks, file, row) for file, row in rows], np.int64)
    return Meta(folder, info, fps, features, tasks, instruction, lengths, data, videos)


# ---- info.json


def _read_info(folder: Path) -> dict:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", where="data.source",
                        hint="the path of a LeRobot dataset: the folder that has meta/ and data/")  # fmt: skip
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise fault(folder, INFO, "this file is missing", why="a LeRobot dataset is described by it") from None
    except (OSError, ValueError) as error:
        raise fault(folder, INFO, f"this file is not JSON: {error}") from None
    if not isinstance(info, dict):
        raise fault(folder, INFO, "this file is not a JSON object")
    version = info.get("codebase_version")
    if version != VERSION:
        older = str(version).startswith(("v1", "v2"))
        hint = "lerobot converts it: python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=..."
        raise fault(folder, INFO, f"`codebase_version` is {version!r}", why=f"datasets of {VERSION} are read",
                    hint=hint if older else None)  # fmt: skip
    for key, needs in (("data_path", ("chunk_index", "file_index")), ("video_path", ("video_key", "file_index"))):
        pattern = info.get(key)
        if key == "video_path" and pattern is None:
            continue
        try:
            shown = [str(pattern).format(chunk_index=0, file_index=n, video_key=n) for n in (1, 2)]
        except (KeyError, ValueError, IndexError, AttributeError, TypeError):
            shown = [""]
        if not isinstance(pattern, str) or len(set(shown)) < 2 or ".." in pattern or pattern.startswith("/"):
            raise fault(folder, INFO, f"`{key}` is {pattern!r}", why=f"it needs fields for {' and '.join(needs)}",
                        hint=DATA_PATH if key == "data_path" else VIDEO_PATH)  # fmt: skip
    return info


def _fps(folder: Path, info: dict) -> float:
    fps = info.get("fps")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < 1e6:
        raise fault(folder, INFO, f"`fps` is {fps!r}", why="it is the number of frames in a second")
    return float(fps)


def _features(folder: Path, info: dict) -> dict[str, Feature]:
    given = info.get("features")
    if not isinstance(given, dict) or not given:
        raise fault(folder, INFO, "`features` is missing or empty", why="it describes the columns of the data")
    found = {}
    for name, one in given.items():
        if "/" in name:  # files are named by features, here and there, and this one could lie in any folder
            raise fault(folder, INFO, f"the feature `{name}` has a slash in its name", why="LeRobot allows none")
        try:
            names, shape = one.get("names"), tuple(int(size) for size in one["shape"])
            dtype = str(one["dtype"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise fault(folder, INFO, f"the feature `{name}` needs a dtype and a shape, it is {one!r:.80}") from None
        if isinstance(names, dict) and len(names) == 1:  # {"motors": [...]}, as of recordings with older releases
            names = next(iter(names.values()))
        flat = isinstance(names, list) and all(isinstance(entry, str) for entry in names)
        if flat and len(shape) == len(names) == 3 and names[0] in ("channel", "channels"):
            shape = (*shape[1:], shape[0])  # the same video, described in torch's order
        flat = flat and len(shape) == 1
        if flat and len(names) != shape[0]:
            raise fault(folder, INFO, f"the feature `{name}` has {len(names)} names for {shape[0]} entries")
        found[name] = Feature(dtype, shape, tuple(names) if flat else None)
        if found[name].is_camera and (len(shape) != 3 or shape[2] != 3 or min(shape) < 1):
            raise fault(folder, INFO, f"the camera `{name}` has the shape {list(shape)}",
                        why="images are height, width and 3 colours; depth is not read")  # fmt: skip
    missing = [name for name in OWN if name not in found]
    if missing:
        raise fault(folder, INFO, f"`features` has no `{missing[0]}`", why="every LeRobot dataset has this column")
    if any(one.dtype == "video" for one in found.values()) and info.get("video_path") is None:
        raise fault(folder, INFO, "there are videos among the features, and no `video_path`", hint=VIDEO_PATH)
    return found


# ---- tables


def read_table(folder: Path, file: str, columns: list[str] | None = None, take: list[str] | None = None):
    """A Parquet file of the dataset as an Arrow table of the columns `take`, by default `columns`, or all.

    Raises UserError if the file is missing or damaged, or lacks one of `columns`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        there = pq.read_schema(folder / file).names
        for name in columns or ():
            if name not in there:
                others = ", ".join(one for one in there if not one.startswith("stats/"))
                raise fault(folder, file, f"this file has no column `{name}`",
                            hint=nearest(name, there, f"it has: {others}"))  # fmt: skip
        return pq.read_table(folder / file, columns=take or columns)
    except FileNotFoundError:
        raise fault(folder, file, "this file is missing", hint="was all of the dataset copied?") from None
    except (pa.ArrowException, OSError) as error:
        raise fault(folder, file, f"this file cannot be read as Parquet: {str(error).splitlines()[0]}",
                    hint="it is cut short if the recording did not call `finalize()`") from None  # fmt: skip


def _read_tasks(folder: Path) -> tuple[str, ...]:
    """The instructions. The library writes them as the index of a pandas table, which Arrow shows as a column."""
    table = read_table(folder, TASKS, None)
    described = (table.schema.metadata or {}).get(b"pandas")
    try:
        index = [name for name in json.loads(described)["index_columns"] if isinstance(name, str)] if described else []
    except (ValueError, KeyError, TypeError):
        index = []
    if len(index) != 1 or index[0] not in table.column_names:
        raise fault(folder, TASKS, "the instructions are not the index of this table",
                    why="the library would take the number of the row for the instruction",
                    hint="write it with pandas: DataFrame({'task_index': ...}, index=instructions).to_parquet()"
                    )  # fmt: skip
    if "task_index" not in table.column_names:
        raise fault(folder, TASKS, "this file has no column `task_index`")
    numbers, tasks = table["task_index"].to_pylist(), table[index[0]].to_pylist()
    if numbers != list(range(len(numbers))):
        at = next(k for k, number in enumerate(numbers) if number != k)
        raise fault(folder, TASKS, f"row {at} has the task_index {numbers[at]}",
                    why="the library looks instructions up by the number of the row")  # fmt: skip
    for row, task in enumerate(tasks):
        if not isinstance(task, str) or task in tasks[:row]:
            raise fault(folder, TASKS, f"row {row} has the instruction {task!r}",
                        why="an instruction is text, and occurs once")  # fmt: skip
    return tuple(tasks)


def _read_episodes(folder: Path, cameras: list[str]) -> list[tuple[str, dict]]:
    """(file, row) of every episode, in order."""
    columns = ["episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index", "data/chunk_index",
               "data/file_index"]  # fmt: skip
    columns += [f"videos/{camera}/{name}" for camera in cameras
                for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]  # fmt: skip
    files = sorted((folder / EPISODES).glob("*/*.parquet"))
    if not files:
        raise fault(folder, EPISODES, "there is no table of episodes in this folder", hint="chunk-000/file-000.parquet")
    rows = []
    for path in files:
        file = path.relative_to(folder).as_posix()
        for row in read_table(folder, file, columns).to_pylist():
            odd = next((name for name in columns if not isinstance(row[name], _kind(name))), None)
            if odd or row["episode_index"] != len(rows):
                odd = odd or "episode_index"
                found = "empty" if row[odd] is None else f"{row[odd]!r:.40}"
                raise fault(folder, file, f"in the row of episode {len(rows)}, `{odd}` is {found}",
                            why="episodes are numbered from 0, in order, with whole numbers, times in seconds and a "
                            "list of instructions")  # fmt: skip
            rows.append((file, row))
    return rows


def _kind(column: str) -> type | tuple[type, ...]:
    """What a column of the table of episodes holds."""
    return list if column == "tasks" else (int, float) if column.endswith("_timestamp") else int


def _lengths(folder: Path, rows: list[tuple[str, dict]]) -> np.ndarray:
    at = 0
    for e, (file, row) in enumerate(rows):
        first, end, length = (row[name] for name in ("dataset_from_index", "dataset_to_index", "length"))
        if first != at or end - first != length:
            raise fault(folder, file, f"episode {e} has {length} frames at {first} to {end}",
                        why=f"the episode before ends at {at}, and `dataset_to_index` is exclusive")  # fmt: skip
        if length < 2:
            raise fault(folder, file, f"episode {e} has {length} frame{'s' * (length != 1)}",
                        why="nothing moves in fewer than two", hint="leave this episode out")  # fmt: skip
        at = end
    return np.array([row["length"] for _, row in rows], np.int64)


def _file(folder: Path, info: dict, pattern: str, row: dict, prefix: str, table: str, **fields) -> str:
    numbers = {name: row[f"{prefix}{name}"] for name in ("chunk_index", "file_index")}
    file = info[pattern].format(**numbers, **fields)
    if not (folder / file).is_file():
        raise fault(folder, file, f"this file is missing; {table} places episode {row['episode_index']} in it",
                    hint="was all of the dataset copied?")  # fmt: skip
    return file


def _place(folder: Path, info: dict, camera: str, found: tuple[str, dict], fps: float, features: dict) -> Place:
    table, row = found
    prefix = f"videos/{camera}/"
    file = _file(folder, info, "video_path", row, prefix, table, video_key=camera)
    first, end = float(row[f"{prefix}from_timestamp"]), float(row[f"{prefix}to_timestamp"])
    if not (first >= 0 and abs(end - first - row["length"] / fps) <= 0.5 / fps):
        raise fault(folder, table, f"episode {row['episode_index']} lies at {first:g} to {end:g} s of {file}",
                    why=f"its {row['length']} frames last {row['length'] / fps:g} s at the {fps:g} frames per second "
                    f"of {INFO}")  # fmt: skip
    return Place(file, first)


def _instruction(folder: Path, tasks: tuple[str, ...], file: str, row: dict) -> int:
    given = row["tasks"]
    if len(given) != 1:
        raise fault(folder, file, f"episode {row['episode_index']} has {len(given)} instructions",
                    why="an episode is read with one", hint="split it where the instruction changes")  # fmt: skip
    if given[0] not in tasks:
        raise fault(folder, file, f"episode {row['episode_index']} has the instruction {given[0]!r}",
                    why=f"{TASKS} does not have it", hint=nearest(given[0], tasks))  # fmt: skip
    return tasks.index(given[0])
