"""Reads LeRobot v3.0 datasets with pyarrow and PyAV: every row is checked, every video is decoded once into a store.

The library passes over a column that is missing, over wrong timestamps and over a dataset at another rate than it says.
Whatever a policy would silently learn wrongly from is refused here, with the file, the episode and the row.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from aurora_train.data.prepared import key_of
from aurora_train.errors import UserError, nearest
from aurora_train.files import sha256
from robot.episodes import Episode, Episodes, kept
from robot.lerobot_meta import EPISODES, INFO, OWN, TASKS, TOLERANCE_S, Feature, Meta, fault, read_meta, read_table
from robot.video import Video

FORMAT = 1


def features(folder: str | Path) -> dict[str, Feature]:
    """What the dataset in `folder` has, by name, without the columns that number its rows. UserError as for `read`."""
    return {name: one for name, one in read_meta(folder).features.items() if name not in OWN}


def read(
    folder: str | Path, cache: Path, features: Sequence[str], progress: Callable = lambda done, total, what: None,
    *, episodes: int | None = None, edge: int | None = None,
) -> Episodes:  # fmt: skip
    """The episodes of the dataset in `folder` with the named features, from a store below `cache`, made if need be.

    With `episodes`, only so many, from the first; the rows of all are checked nevertheless. Vectors become
    float32[N, D], also those that have one entry or are stored as doubles, integers or booleans. Cameras become
    uint8[N, H, W, 3], or with `edge` squares of so many pixels, each the mean of the area that it stands for (Pillow's
    `resize` with BOX). A reading that was killed continues after the last whole episode. Raises UserError with the
    file, and the episode or row, for every fault of the dataset.
    """
    meta, features = read_meta(folder), list(dict.fromkeys(features))
    _check_wanted(meta, features)
    cameras = [name for name in features if meta.features[name].is_camera]
    files = sorted({INFO, TASKS, *meta.data, *_tables(meta), *_films(meta, cameras)})
    count = _count(meta, episodes)
    hashes = {}
    for number, file in enumerate(files):
        progress(number, len(files), "hashing the dataset")
        hashes[file] = sha256(meta.folder / file)
    decisive = {"format": FORMAT, "features": sorted(features), "episodes": count, "edge": edge, "files": hashes}
    key = key_of(decisive)
    names = {name: meta.features[name].names for name in features if meta.features[name].names}
    source = {
        "source": meta.folder.resolve().name, "format": f"LeRobot {meta.info['codebase_version']}",
        "robot": meta.info.get("robot_type"), "files_sha256": key, "episodes": count,
        "frames": int(meta.lengths[:count].sum()),
    }  # fmt: skip

    def grow(notes: list[dict]) -> Iterator[Episode]:
        vectors = _read_vectors(meta, [name for name in features if name not in cameras])
        starts, pictures = np.cumsum(meta.lengths) - meta.lengths, _Pictures(meta, edge)
        for e in range(len(notes), count):
            rows = slice(starts[e], starts[e] + meta.lengths[e])
            arrays = {name: vectors[name][rows] if name in vectors else pictures.take(name, e) for name in features}
            yield Episode(arrays, meta.tasks[meta.instruction[e]])

    return kept(Path(cache) / f"episodes-{key[:16]}", decisive, grow, fps=meta.fps, names=names, source=source,
                progress=progress, what="reading episodes", total=count)  # fmt: skip


def _count(meta: Meta, episodes: int | None) -> int:
    there = len(meta.lengths)
    if episodes is not None and episodes > there:
        raise UserError(f"{episodes} episodes are wanted, and {meta.folder} has {there}", where="data.episodes",
                        hint=f"data.episodes={there} at most, or leave it out for all")  # fmt: skip
    return there if episodes is None else episodes


def _check_wanted(meta: Meta, features: Sequence[str]) -> None:
    for name in features:
        one = meta.features.get(name)
        if one is None:
            there = [known for known in meta.features if known not in OWN]
            raise fault(meta.folder, INFO, f"the dataset has no feature `{name}`",
                        hint=nearest(name, there, f"it has: {', '.join(there)}"))  # fmt: skip
        if not one.is_camera and (len(one.shape) != 1 or one.dtype == "string"):
            raise fault(meta.folder, INFO, f"the feature `{name}` is {one.dtype} of the shape {list(one.shape)}",
                        why="vectors of numbers and cameras are read")  # fmt: skip


def _tables(meta: Meta) -> list[str]:
    return [path.relative_to(meta.folder).as_posix() for path in (meta.folder / EPISODES).glob("*/*.parquet")]


def _films(meta: Meta, cameras: Sequence[str]) -> set[str]:
    return {place.file for name in cameras for place in meta.videos.get(name, ())}


# ---- data files


def _read_vectors(meta: Meta, features: Sequence[str]) -> dict[str, np.ndarray]:
    """float32[N, D] by feature, from all data files; the columns that number the rows are checked."""
    parts: dict[str, list] = {name: [] for name in features}
    for file, episodes in _by_file(meta):
        columns = [name for name, one in meta.features.items() if one.dtype != "video"]
        table = read_table(meta.folder, file, columns, take=[*OWN, *features])
        lengths = meta.lengths[episodes]
        if table.num_rows != lengths.sum():
            raise fault(meta.folder, file, f"this file has {table.num_rows} rows, and its episodes "
                        f"{episodes[0]} to {episodes[-1]} have {lengths.sum()} frames")  # fmt: skip
        rows = _Rows(meta, file, episodes)
        rows.check_numbers({name: rows.values(table, name)[:, 0] for name in OWN})
        for name in features:
            parts[name].append(rows.values(table, name).astype(np.float32))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _by_file(meta: Meta) -> list[tuple[str, list[int]]]:
    """(data file, its episodes) in the order of the episodes; a file that no episode names is refused."""
    found: list[tuple[str, list[int]]] = []
    for e, file in enumerate(meta.data):
        if not found or found[-1][0] != file:
            found.append((file, []))
        found[-1][1].append(e)
    named = [file for file, _ in found]
    there = sorted(path.relative_to(meta.folder).as_posix() for path in (meta.folder / "data").glob("*/*.parquet"))
    odd = [file for file in there if file not in named] + [file for file in named if named.count(file) > 1]
    if odd:
        raise fault(meta.folder, odd[0], "this file is not one part of the dataset's episodes, in their order",
                    why="the library reads all files of data/, one after the other")  # fmt: skip
    return found


class _Rows:
    """The rows of one data file, for checks that name the episode."""

    def __init__(self, meta: Meta, file: str, episodes: list[int]):
        self.meta, self.file = meta, file
        lengths = meta.lengths[episodes]
        self.episode = np.repeat(np.array(episodes), lengths)
        self.frame = np.arange(len(self.episode)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        self.first = int(meta.lengths[: episodes[0]].sum())

    def _fault(self, row: int, what: str, **more) -> UserError:
        place = f"row {row} (episode {self.episode[row]}, frame {self.frame[row]})"
        return fault(self.meta.folder, self.file, f"{place}: {what}", **more)

    def values(self, table, name: str) -> np.ndarray:
        """[N, D] of a column; UserError for a row without value, of another length, or that is no finite number."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column, size = table[name].combine_chunks(), self.meta.features[name].shape[0]
        if column.null_count:
            raise self._fault(int(np.argmax(pc.is_null(column))), f"`{name}` is empty")
        kind = column.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            lengths = np.asarray(pc.list_value_length(column))
            if (lengths != size).any():
                row = int(np.argmax(lengths != size))
                raise self._fault(row, f"`{name}` has {lengths[row]} entries, info.json says {size}")
            column, kind = pc.list_flatten(column), kind.value_type
        elif size != 1:
            raise self._fault(0, f"`{name}` is a single value, info.json says {size} entries")
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
            raise self._fault(0, f"`{name}` holds {kind} instead of numbers")
        if column.null_count:
            raise self._fault(int(np.argmax(pc.is_null(column))) // size, f"`{name}` has an empty entry")
        values = column.to_numpy(zero_copy_only=False).reshape(-1, size)
        finite = np.isfinite(values.astype(np.float32, copy=False)).all(axis=1)
        if not finite.all():
            row = int(np.argmin(finite))
            raise self._fault(row, f"`{name}` has an entry that is not a finite number: {values[row].tolist()}",
                              hint="leave the episode out, or repair it where it was recorded")  # fmt: skip
        return values

    def check_numbers(self, found: dict[str, np.ndarray]) -> None:
        """UserError for the first row whose numbers are not those of its place in the tables."""
        meta = self.meta
        wanted = {
            "episode_index": self.episode, "frame_index": self.frame,
            "index": self.first + np.arange(len(self.frame)), "task_index": meta.instruction[self.episode],
        }  # fmt: skip
        for name, values in wanted.items():
            if (found[name] != values).any():
                row = int(np.argmax(found[name] != values))
                raise self._fault(row, f"`{name}` is {found[name][row]} instead of {values[row]}",
                                  why="the rows are not those that meta/ describes, in their order")  # fmt: skip
        times, given = self.frame / meta.fps, found["timestamp"].astype(np.float64)
        late = np.abs(given - times) > TOLERANCE_S + 1e-6 * times
        if late.any():
            row, gaps = int(np.argmax(late)), np.diff(given[self.episode == self.episode[0]])
            rate = 1 / np.median(gaps) if np.median(gaps) > 0 else 0.0
            other = f"these timestamps are those of {rate:.4g} frames per second" if rate else "time stands still"
            raise self._fault(row, f"`timestamp` is {given[row]:g} s instead of {times[row]:g} s",
                              why=f"{INFO} says {meta.fps:g} frames per second; {other}")  # fmt: skip


# ---- cameras


class _Pictures:
    """The images of one episode after the other: from the video files, or those that are embedded in the data files."""

    def __init__(self, meta: Meta, edge: int | None):
        self.meta, self.edge = meta, edge
        self._open: dict[str, tuple[str, Video]] = {}  # camera -> its current file
        self._columns: dict[str, tuple] = {}  # camera -> its current file and what is embedded there
        self._first = {e: k for _, episodes in _by_file(meta) for k, e in enumerate(episodes)}

    def take(self, camera: str, e: int) -> np.ndarray:
        """uint8[T, H, W, 3] of a whole episode."""
        meta, one = self.meta, self.meta.features[camera]
        if one.dtype == "image":
            return self._embedded(camera, e)
        place = meta.videos[camera][e]
        file, video = self._open.get(camera, ("", None))
        if file != place.file:
            if video:
                video.close()
            video = Video(meta.folder / place.file, one.shape[:2], meta.fps)
            self._open[camera] = place.file, video
        return video.take(place.from_s, int(meta.lengths[e]), e, self._fit)

    def _fit(self, image: np.ndarray) -> np.ndarray:
        if self.edge is None:
            return image
        from PIL import Image

        return np.asarray(Image.fromarray(image).resize((self.edge, self.edge), Image.Resampling.BOX))

    def _embedded(self, camera: str, e: int) -> np.ndarray:
        from PIL import Image

        meta, file = self.meta, self.meta.data[e]
        shape = meta.features[camera].shape
        images = []
        before = int(meta.lengths[e - self._first[e] : e].sum())
        if self._columns.get(camera, ("",))[0] != file:  # once for all of its episodes
            self._columns[camera] = file, read_table(meta.folder, file, [camera])[camera]
        column = self._columns[camera][1]
        for frame, cell in enumerate(column.slice(before, int(meta.lengths[e])).to_pylist()):
            at = f"row {before + frame} (episode {e}, frame {frame})"
            content = cell.get("bytes") if isinstance(cell, dict) else None
            if content is None:
                raise fault(meta.folder, file, f"{at}: `{camera}` has no embedded image")
            try:
                image = Image.open(io.BytesIO(content))
                found = (image.height, image.width, 3)  # before its pixels, which may be many, are decoded
                pixels = np.asarray(image.convert("RGB")) if found == shape else None
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise fault(meta.folder, file, f"{at}: `{camera}` is not an image: {error}") from None
            if pixels is None:
                raise fault(meta.folder, file, f"{at}: `{camera}` has the shape {list(found)}, "
                            f"info.json says {list(shape)}")  # fmt: skip
            images.append(self._fit(pixels))
        return np.stack(images)
