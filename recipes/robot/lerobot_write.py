"""Writes episodes as a LeRobot v3.0 dataset, as release 0.4.4 lays it out, so that the library opens it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from aurora_train.data.prepared import writing
from aurora_train.errors import UserError
from aurora_train.files import make_folder, sync, write_json
from robot import lerobot_statistics as statistics
from robot.episodes import Episode, Episodes
from robot.lerobot_meta import DATA_PATH, EPISODES_PATH, INFO, OWN, TASKS, VERSION, VIDEO_PATH
from robot.video import CODECS, encode

FILES_IN_CHUNK, DATA_MB, VIDEO_MB = 1000, 100, 200
_RAW_VIDEO_BYTES = 2 << 30  # frames before encoding, of one video file: far below VIDEO_MB once they are encoded


def write(episodes: Episodes, folder: str | Path, *, robot: str | None = None, codec: str = "libsvtav1",
          progress: Callable = lambda done, total, what: None) -> None:  # fmt: skip
    """Write all features of `episodes` into the new folder `folder`; it appears complete or not at all.

    Vectors become float32 columns and cameras videos of `codec`, a key of `video.CODECS`, which loses a little.
    Raises UserError if the folder exists, the rate is not a whole number, or an image cannot be encoded.
    """
    folder = Path(folder)
    _check(episodes, folder, codec)
    temporary = folder.with_name(f"{folder.name}.writing")
    with writing(folder.parent):
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder(temporary)
        tasks = sorted(set(episodes.tasks), key=episodes.tasks.index)  # in the order of their first episode
        tables = [_table(episodes, e, tasks) for e in range(len(episodes))]
        rows = [{"episode_index": e, "tasks": [one.task], "length": len(tables[e])} for e, one in enumerate(episodes)]
        _write_data(temporary, episodes, tables, rows)
        for camera in _cameras(episodes):
            _write_videos(temporary, episodes, camera, rows, codec, progress)
        found = [_statistics(one, table) for one, table in zip(episodes, tables, strict=True)]
        _write_tables(temporary, tasks, rows, found)
        names = found[0]
        write_json(temporary / "meta/stats.json", {
            name: _plain(statistics.of_all([one[name] for one in found])) for name in names})  # fmt: skip
        write_json(temporary / INFO, _info(episodes, tasks, robot, codec))
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        temporary.rename(folder)
        sync(folder.parent)


def _check(episodes: Episodes, folder: Path, codec: str) -> None:
    if folder.exists():
        raise UserError("this folder exists", where=str(folder), hint="name a new one")
    if codec not in CODECS:
        raise UserError(f"unknown codec {codec!r}", hint=f"one of: {', '.join(CODECS)}")
    for name, array in episodes.arrays.items():
        if array.ndim != (4 if array.dtype == np.uint8 else 2):
            raise UserError(f"`{name}` is {array.dtype}{list(array.shape)}", why="vectors float32[N, D] and images "
                            "uint8[N, H, W, 3] are written")  # fmt: skip
    if episodes.fps != round(episodes.fps):
        raise UserError(f"{episodes.fps:g} frames per second are not a whole number", why="LeRobot's `fps` is one")
    for camera in _cameras(episodes):
        height, width = episodes.arrays[camera].shape[1:3]
        if height % 2 or width % 2 or min(height, width) < 16:
            raise UserError(f"the images of `{camera}` have {height} x {width} pixels",
                            why="these codecs encode even sizes from 16 on", hint="resize them")  # fmt: skip


def _cameras(episodes: Episodes) -> list[str]:
    return [name for name, array in episodes.arrays.items() if array.ndim == 4]


class _Table(dict):
    """The columns of one episode as they go into the data file; `len` is the number of frames."""

    def __len__(self) -> int:
        return len(self["timestamp"])


def _table(episodes: Episodes, e: int, tasks: list[str]) -> _Table:
    one, length, start = episodes[e], int(episodes.lengths[e]), int(episodes.starts[e])
    frames = np.arange(length)
    columns = {name: array for name, array in one.arrays.items() if array.ndim == 2}
    return _Table(columns | {
        "timestamp": (frames / episodes.fps).astype(np.float32), "frame_index": frames,
        "episode_index": np.full(length, e), "index": start + frames,
        "task_index": np.full(length, tasks.index(one.task)),
    })  # fmt: skip


def _groups(sizes: list[int], limit: int) -> Iterator[tuple[dict, range]]:
    """Consecutive episodes that share a file of at most `limit` bytes: ({"chunk_index", "file_index"}, episodes)."""
    first, filled, number = 0, 0, 0
    for e, size in enumerate([*sizes, limit + 1]):
        if e > first and filled + size > limit:
            place = dict(zip(("chunk_index", "file_index"), divmod(number, FILES_IN_CHUNK), strict=True))
            yield place, range(first, e)
            first, filled, number = e, 0, number + 1
        filled += size


def _write_data(folder: Path, episodes: Episodes, tables: list[_Table], rows: list[dict]) -> None:
    """One row group for each episode, snappy; the schema carries what the package `datasets` wants to know."""
    import pyarrow.parquet as pq

    sizes = [sum(np.asarray(column).nbytes for column in table.values()) for table in tables]
    for place, group in _groups(sizes, DATA_MB << 20):
        path = folder / DATA_PATH.format(**place)
        make_folder(path.parent)
        arrow = [_arrow(tables[e]) for e in group]
        with pq.ParquetWriter(path, arrow[0].schema, compression="snappy") as writer:
            for table in arrow:
                writer.write_table(table)
        for e in group:
            start, length = int(episodes.starts[e]), int(episodes.lengths[e])
            rows[e] |= {f"data/{name}": value for name, value in place.items()}
            rows[e] |= {"dataset_from_index": start, "dataset_to_index": start + length}


def _arrow(table: _Table):
    import pyarrow as pa

    columns, described = {}, {}
    for name, values in table.items():
        kind = {"dtype": OWN.get(name, "float32"), "_type": "Value"}
        flat = pa.array(np.asarray(values).reshape(-1), kind["dtype"])
        size = values.shape[1] if values.ndim == 2 else 1
        if size > 1:
            flat = pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(pa.field("element", pa.float32()), size))
            kind = {"feature": kind, "length": size, "_type": "List"}
        columns[name], described[name] = flat, kind
    about = json.dumps({"info": {"features": described}})
    return pa.table(columns).replace_schema_metadata({"huggingface": about})


def _write_videos(folder: Path, episodes: Episodes, camera: str, rows: list[dict], codec: str, progress) -> None:
    size = int(np.prod(episodes.arrays[camera].shape[1:]))
    done = 0

    def on_episode():
        nonlocal done
        done += 1
        progress(done, len(episodes), f"encoding {camera}")

    for place, group in _groups([int(length) * size for length in episodes.lengths], _RAW_VIDEO_BYTES):
        path = folder / VIDEO_PATH.format(video_key=camera, **place)
        make_folder(path.parent)
        encode(path, (episodes[e].arrays[camera] for e in group), episodes.fps, codec, on_episode)
        before = 0
        for e in group:
            first, before = before, before + int(episodes.lengths[e])
            times = {"from_timestamp": first / episodes.fps, "to_timestamp": before / episodes.fps}
            rows[e] |= {f"videos/{camera}/{name}": value for name, value in (place | times).items()}


def _statistics(one: Episode, table: _Table) -> dict[str, dict[str, np.ndarray]]:
    images = {name: array for name, array in one.arrays.items() if array.ndim == 4}
    return {name: statistics.of_episode(np.asarray(values)) for name, values in (table | images).items()}


def _plain(found: dict[str, np.ndarray]) -> dict[str, list]:
    return {name: np.asarray(value).tolist() for name, value in found.items()}


def _write_tables(folder: Path, tasks: list[str], rows: list[dict], found: list[dict]) -> None:
    """meta/episodes, with the statistics of each episode as columns, and meta/tasks.parquet with its pandas index."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = {"chunk_index": 0, "file_index": 0}
    path = folder / EPISODES_PATH.format(**place)
    make_folder(path.parent)
    flat = [{f"stats/{name}/{number}": value for name, numbers in one.items()
             for number, value in _plain(numbers).items()} for one in found]  # fmt: skip
    own = {f"meta/episodes/{name}": value for name, value in place.items()}
    pq.write_table(pa.Table.from_pylist([row | one | own for row, one in zip(rows, flat, strict=True)]), path)
    index = pd.Index(tasks, name="task")
    pd.DataFrame({"task_index": range(len(tasks))}, index=index).to_parquet(folder / TASKS)


def _info(episodes: Episodes, tasks: list[str], robot: str | None, codec: str) -> dict:
    cameras, fps = _cameras(episodes), round(episodes.fps)
    features = {}
    for name, array in episodes.arrays.items():
        features[name] = {"dtype": "video" if name in cameras else "float32", "shape": list(array.shape[1:]),
                          "names": list(episodes.names[name]) if name in episodes.names else None}  # fmt: skip
        if name in cameras:
            height, width = array.shape[1:3]
            features[name] |= {"names": ["height", "width", "channels"], "info": {
                "video.height": height, "video.width": width, "video.codec": {"libsvtav1": "av1"}.get(codec, "h264"),
                "video.pix_fmt": "yuv420p", "video.is_depth_map": False, "video.fps": fps, "video.channels": 3,
                "has_audio": False,
            }}  # fmt: skip
    features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in OWN.items()}
    return {
        "codebase_version": VERSION, "robot_type": robot, "total_episodes": len(episodes),
        "total_frames": int(episodes.lengths.sum()), "total_tasks": len(tasks), "chunks_size": FILES_IN_CHUNK,
        "data_files_size_in_mb": DATA_MB, "video_files_size_in_mb": VIDEO_MB, "fps": fps,
        "splits": {"train": f"0:{len(episodes)}"}, "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if cameras else None, "features": features,
    }  # fmt: skip
