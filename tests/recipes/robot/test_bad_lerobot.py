"""LeRobot datasets that are wrong somewhere: each is refused with one message that names the file and the place.

The library itself opens many of them; what it does then is in the comments.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import damaging
import numpy as np
import pyarrow as pa
import pytest
from damaging import DATA, FILM, TABLE, TOP, cell, column, cut, feature, info, rows, text, without
from recorded_episodes import episode, episodes

from aurora_train.errors import UserError
from robot import lerobot, lerobot_write
from robot.episodes import Episode, Episodes
from robot.lerobot_meta import INFO, TASKS
from robot.video import encode

pytest.importorskip("av")

MOVED = {"from": 1.13, "to": 1.83}
FEATURES = ["observation.state", "action", TOP]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Four episodes of 5, 6, 7 and 8 frames at 10 per second."""
    folder = tmp_path_factory.mktemp("lerobot") / "good"
    lerobot_write.write(episodes(4), folder, codec="libx264")
    return folder


def state(row: int, index: int, value: float):
    def edit(found):
        found[row]["observation.state"][index] = value

    return rows(DATA, edit)


def swapped(first: int, second: int):
    def edit(found):
        found[first], found[second] = found[second], found[first]

    return rows(DATA, edit)


def all_rows(name: str, change):
    return rows(DATA, lambda found: [row.update({name: change(row)}) for row in found])


def film(shape=(16, 16), fps=10.0, frames=26):
    """Another video in the place of the camera's."""
    images = np.zeros((frames, *shape, 3), np.uint8)
    return lambda folder: encode(folder / FILM, iter([images]), fps, "libx264", lambda: None)


def doubled(folder: Path) -> None:
    shutil.copyfile(folder / DATA, folder / DATA.replace("000.parquet", "001.parquet"))


def one_frame(folder: Path) -> None:
    short = Episode({name: array[:1] for name, array in episode(9).arrays.items()}, "Wave.")
    made = Episodes.of([*episodes(2), short], 10.0)
    shutil.rmtree(folder)
    lerobot_write.write(made, folder, codec="libx264")


BAD = {
    # info.json
    "no folder": (shutil.rmtree, "data.source: there is no folder"),
    "no info": (without(INFO), f"{INFO}: this file is missing"),
    "info is cut": (cut(INFO), f"{INFO}: this file is not JSON"),
    "info is a list": (text(INFO, "[]"), f"{INFO}: this file is not a JSON object"),
    "version 2.1": (info(codebase_version="v2.1"), f"{INFO}: `codebase_version` is 'v2.1'\n.*\n.*convert_dataset_v21"),
    "version 3.1": (info(codebase_version="v3.1"), f"{INFO}: `codebase_version` is 'v3.1'"),  # opened
    "no version": (info(codebase_version=None), f"{INFO}: `codebase_version` is None"),
    "no fps": (info(fps=None), f"{INFO}: `fps` is None"),
    "fps zero": (info(fps=0), f"{INFO}: `fps` is 0"),
    "no features": (info(features={}), f"{INFO}: `features` is missing or empty"),
    "feature without shape": (feature("action", shape=None), f"{INFO}: the feature `action` needs a dtype and a shape"),
    "names of another number": (feature("action", names=["a"]), f"{INFO}: the feature `action` has 1 names for 2"),
    "no timestamp": (feature("timestamp", away=True), f"{INFO}: `features` has no `timestamp`"),
    "camera of one colour": (feature(TOP, shape=[16, 16, 1]), f"{INFO}: the camera `{TOP}` has the shape"),
    "unknown feature": (feature("action", away=True), f"{INFO}: the dataset has no feature `action`"),
    "feature of text": (feature("action", dtype="string"), f"{INFO}: the feature `action` is string"),
    "path without number": (info(data_path="data/all.parquet"), f"{INFO}: `data_path` is 'data/all.parquet'"),
    "path of something else": (info(data_path="{chunk_index.x}{file_index}"), f"{INFO}: `data_path` is"),
    "a feature with a path": (
        lambda folder: info(features=json.loads((folder / INFO).read_text())["features"] | {"../../x": {}})(folder),
        f"{INFO}: the feature `../../x` has a slash in its name",
    ),
    "path out of the folder": (info(data_path="../{file_index}"), f"{INFO}: `data_path` is"),
    "more frames in total": (info(total_frames=27), f"{INFO}: `total_frames` is 27, and the tables have 26"),  # the hub
    "no total of tasks": (info(total_tasks=None), f"{INFO}: `total_tasks` is None, and the tables have 2"),
    # tasks.parquet
    "no tasks": (without(TASKS), f"{TASKS}: this file is missing"),
    "tasks without index": (damaging.tasks_without_index, f"{TASKS}: the instructions are not the index"),  # a number
    "tasks with another index": (damaging.tasks_described_as("{}"), f"{TASKS}: the instructions are not the index"),
    "tasks described by half": (damaging.tasks_described_as("{"), f"{TASKS}: the instructions are not the index"),
    "tasks as a column": (damaging.tasks_as_a_column, f"{TASKS}: the instructions are not the index"),
    "tasks out of order": (cell(TASKS, 0, "task_index", 1), f"{TASKS}: row 0 has the task_index 1"),
    "the same instruction twice": (cell(TASKS, 1, "task", "Move to 0."), f"{TASKS}: row 1 has the instruction"),
    # meta/episodes
    "no episodes": (without("meta/episodes"), "meta/episodes: there is no table"),
    "episodes are cut": (cut(TABLE), f"{TABLE}: this file cannot be read as Parquet"),
    "episodes without length": (column(TABLE, "length"), f"{TABLE}: this file has no column `length`"),
    "an episode twice": (cell(TABLE, 2, "episode_index", 1), f"{TABLE}: in the row of episode 2, `episode_index` is 1"),
    "a place with a point": (  # what pandas makes of numbers if one was missing
        column(TABLE, "data/file_index", lambda found: pa.array([float(one) for one in found])),
        f"{TABLE}: in the row of episode 0, `data/file_index` is 0.0",
    ),
    "a time as text": (
        column(TABLE, f"videos/{TOP}/from_timestamp", lambda found: pa.array(["soon"] * 4)),
        f"{TABLE}: in the row of episode 0, `videos/{TOP}/from_timestamp` is 'soon'",
    ),
    "an instruction outside a list": (
        column(TABLE, "tasks", lambda found: pa.array([one[0] for one in found])),
        f"{TABLE}: in the row of episode 0, `tasks` is 'Move to 0.'",
    ),
    "an end that is no number": (
        cell(TABLE, 1, f"videos/{TOP}/to_timestamp", float("nan")), f"{TABLE}: episode 1 lies at 0.5 to nan s",
    ),
    "an empty place": (cell(TABLE, 1, f"videos/{TOP}/file_index", None), f"{TABLE}: in the row of episode 1"),
    "a gap in the index": (cell(TABLE, 2, "dataset_from_index", 12), f"{TABLE}: episode 2 has 7 frames at 12 to 18"),
    "another length": (cell(TABLE, 3, "length", 9), f"{TABLE}: episode 3 has 9 frames at 18 to 26"),
    "one frame": (one_frame, f"{TABLE}: episode 2 has 1 frame\n"),
    "two instructions": (cell(TABLE, 1, "tasks", ["Move to 0.", "Move to 1."]), f"{TABLE}: episode 1 has 2 instr"),
    "unknown instruction": (cell(TABLE, 1, "tasks", ["Move to 2."]), f"{TABLE}: episode 1 has the instruction 'M"),
    "a film too short for it": (cell(TABLE, 1, f"videos/{TOP}/to_timestamp", 0.8), f"{TABLE}: episode 1 lies at 0.5"),
    # data
    "no data": (without(DATA), f"{DATA}: this file is missing.* episode 0"),  # the hub
    "data are cut": (cut(DATA), f"{DATA}: this file cannot be read as Parquet"),
    "data twice": (doubled, "file-001.parquet: this file is not one part"),  # more frames than the tables have
    "no actions": (column(DATA, "action"), f"{DATA}: this file has no column `action`"),  # None
    "a state that nobody reads": (column(DATA, "observation.environment_state"), f"{DATA}: .*no column `obs.*_state`"),
    "fewer rows": (rows(DATA, lambda found: found.pop()), f"{DATA}: this file has 25 rows, and .* 26 frames"),
    "a state that is no number": (state(7, 1, float("nan")), r"row 7 \(episode 1, frame 2\): `observation.state`.*nan"),
    "an infinite action": (cell(DATA, 12, "action", [0, float("inf")]), r"row 12 \(episode 2, frame 1\): `action`"),
    "an empty action": (cell(DATA, 3, "action", None), r"row 3 \(episode 0, frame 3\): `action` is empty"),
    "an empty entry": (cell(DATA, 3, "action", [0.0, None]), r"row 3 \(episode 0, frame 3\): `action` has an empty"),
    "actions of another length": (feature("action", shape=[3], names=None), "`action` has 2 entries, info.json says 3"),
    "one longer action": (
        column(DATA, "action", lambda found: pa.array([*found[:9], [0.0, 0.0, 0.0], *found[10:]])),
        r"row 9 \(episode 1, frame 4\): `action` has 3 entries, info.json says 2",
    ),
    "actions as text": (column(DATA, "action", lambda found: pa.array([["a", "b"]] * 26)), "`action` holds string"),
    "a scalar action": (column(DATA, "action", lambda found: pa.array([0.0] * 26)), "`action` is a single value"),
    "unsorted rows": (swapped(6, 7), r"row 6 \(episode 1, frame 1\): `frame_index` is 2 instead of 1"),
    "episodes mixed up": (swapped(4, 5), r"row 4 \(episode 0, frame 4\): `episode_index` is 1 instead of 0"),
    "a jump of the index": (cell(DATA, 20, "index", 40), r"row 20 \(episode 3, frame 2\): `index` is 40 instead of 20"),
    "another instruction": (cell(DATA, 8, "task_index", 0), r"row 8 \(episode 1, frame 3\): `task_index` is 0"),
    "a wrong timestamp": (cell(DATA, 8, "timestamp", 0.33), r"row 8 \(episode 1, frame 3\): `timestamp` is 0.33 s"),
    "time since the start": (all_rows("timestamp", lambda row: row["index"] / 10), r"row 5 \(episode 1, frame 0\): `t"),
    "another rate": (info(fps=20), f"{TABLE}: episode 0 lies at 0 to 0.5 s of .*\n.* 0.25 s at the 20 frames per"),
    "time stands still": (all_rows("timestamp", lambda row: 0.0), r"row 1 \(.*\n.*time stands still"),
    # videos
    "no video": (without(FILM), f"{FILM}: this file is missing; {TABLE} places episode 0 in it"),
    "an empty video": (text(FILM, ""), f"{FILM}: this file cannot be opened as a video"),
    "not a video": (text(FILM, "hello" * 99), f"{FILM}: this file cannot be opened as a video"),
    "a video that ends early": (film(frames=20), f"{FILM}: this video ends after 2 of the 8 frames of episode 3"),
    "a cut video": (cut(FILM, 0.7), f"{FILM}: this video ends after 0 of the 7 frames of episode 2"),
    "a larger video": (film(shape=(32, 32)), f"{FILM}: the frames have 32 x 32 pixels instead of 16 x 16"),
    "a faster video": (film(fps=30.0), f"{FILM}: the video has 30 frames per second, info.json says 10"),
    "between two frames": (
        rows(TABLE, lambda found: found[2].update({f"videos/{TOP}/{end}_timestamp": at for end, at in MOVED.items()})),
        f"{FILM}: frame 0 of episode 2 should be at 1.13.* s of this video; the next frame is at 1.2",
    ),
}  # fmt: skip


def content(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_dataset_is_refused_with_file_and_place(name, good, tmp_path):
    damage, message = BAD[name]
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    damage(folder)
    before = content(folder)
    with pytest.raises(UserError) as error:
        lerobot.read(folder, tmp_path / "cache", FEATURES)
    assert re.search(message, str(error.value)), str(error.value)
    assert error.value.status == 2 and len(str(error.value).splitlines()) <= 3
    assert content(folder) == before  # the dataset is only read
    assert not [path for path in (tmp_path / "cache").glob("episodes-*") if path.is_dir() and "." not in path.name]


def test_a_rate_that_the_timestamps_contradict_is_named_beside_theirs(tmp_path):
    """The library opens it, and takes chunks of actions at the wrong times."""
    lerobot_write.write(episodes(2, camera=False), tmp_path / "arm")
    info(fps=20)(tmp_path / "arm")
    with pytest.raises(UserError, match=r"`timestamp` is 0.1 s instead of 0.05 s\n.*20 frames.* of 10 frames per"):
        lerobot.read(tmp_path / "arm", tmp_path, ["action"])


def test_the_good_dataset_is_read(good, tmp_path):
    """So that none of the cases above fails for another reason than its own."""
    read = lerobot.read(good, tmp_path, FEATURES)
    assert read.lengths.tolist() == [5, 6, 7, 8] and read.tasks == episodes(4).tasks
    assert np.array_equal(read.arrays["action"], episodes(4).arrays["action"])


def test_there_are_enough_of_them():
    assert len(BAD) >= 30
    document = Path(__file__).parents[3] / "docs" / "robots.md"
    assert f"{len(BAD)} such datasets" in document.read_text()
