"""The round trip with the real LeRobot library: it opens what we write, frame for frame, and we read what it writes.

It lives in a Python of its own, because it pins other versions of packages than constraints.txt does:

    AURORA_LEROBOT_PYTHON=/path/to/venv/bin/python pytest -m release tests/recipes/robot/test_lerobot_real.py
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from recorded_episodes import episodes

from robot import lerobot, lerobot_write, statistics
from robot.chunks import Chunks
from robot.episodes import Episodes

PYTHON = os.environ.get("AURORA_LEROBOT_PYTHON")
TOP = "observation.images.top"
pytestmark = [
    pytest.mark.release,
    pytest.mark.skipif(PYTHON is None, reason="AURORA_LEROBOT_PYTHON names no Python that has lerobot"),
]


def their(*arguments) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    side = Path(__file__).with_name("lerobot_side.py")
    result = subprocess.run([PYTHON, side, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def enlarged() -> Episodes:
    """Images of 64 x 64 pixels, as the library's own encoder settings suit them better than 16 x 16."""
    made = episodes(4)
    made.arrays[TOP] = made.arrays[TOP].repeat(4, axis=1).repeat(4, axis=2)
    return made


def items(folder: Path, place: Path) -> dict[str, np.ndarray]:
    their("read", str(folder), str(place))
    with np.load(place) as file:
        return {name: file[name] for name in file.files}


def check_items(found: dict[str, np.ndarray], read: Episodes) -> float:
    """Their items against our reading of the same files; the largest difference of a pixel in levels of 255."""
    assert found["lengths"].tolist() == read.lengths.tolist()
    assert found["task"].tolist() == np.repeat(read.tasks, read.lengths).tolist()
    for name in ("observation.state", "observation.environment_state", "action"):
        assert np.array_equal(found[name], read.arrays[name]), name
    chunks = Chunks(read, "train", chunk=3, test=0, validation=0)
    batch = chunks.take(np.arange(len(chunks)))
    assert np.array_equal(found["chunk/action"], batch["action"])
    assert np.array_equal(found["chunk/action_is_pad"], batch["padded"])
    return float(np.abs(found[TOP].transpose(0, 2, 3, 1) * 255 - read.arrays[TOP]).max())


@pytest.mark.parametrize("codec", ["libsvtav1", "libx264"])
def test_the_library_opens_what_we_write_frame_for_frame(codec, tmp_path):
    made = enlarged()
    lerobot_write.write(made, tmp_path / "ours", codec=codec, robot="arm")
    found = items(tmp_path / "ours", tmp_path / "items.npz")
    read = lerobot.read(tmp_path / "ours", tmp_path, list(made.arrays))
    print(codec, "pixels differ by", check_items(found, read), "levels between the libraries")
    assert check_items(found, read) <= 1


def test_our_statistics_are_those_that_the_library_writes_and_we_read_its_dataset(tmp_path):
    made = enlarged()
    np.savez(tmp_path / "made.npz", fps=int(made.fps), names=json.dumps(made.names), tasks=made.tasks,
             lengths=made.lengths, **made.arrays)  # fmt: skip
    their("write", str(tmp_path / "made.npz"), str(tmp_path / "theirs"))
    lerobot_write.write(made, tmp_path / "ours", robot="arm")
    theirs, ours = (json.loads((tmp_path / name / "meta/stats.json").read_text()) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    furthest = {}
    for name in ours:
        assert theirs[name].keys() == ours[name].keys()
        for number, value in ours[name].items():
            if (name, number) == (TOP, "std"):
                continue  # release 0.4.4 squares in uint8
            assert np.shape(theirs[name][number]) == np.shape(value), (name, number)
            apart = np.abs(np.array(theirs[name][number], np.float64) - np.array(value, np.float64)).max()
            furthest[number] = max(furthest.get(number, 0.0), float(apart))
    print("statistics differ by at most", furthest)
    assert max(furthest.values()) < 2e-6

    own = statistics.of(made, np.arange(len(made)))
    for name in ("observation.state", "action"):  # the numbers that are exact on both sides
        for number in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(theirs[name][number], own[name][number], rtol=1e-5, atol=1e-6)

    read = lerobot.read(tmp_path / "theirs", tmp_path, list(made.arrays))
    assert check_items(items(tmp_path / "theirs", tmp_path / "items.npz"), read) <= 1
    assert all(np.array_equal(read.arrays[name], made.arrays[name]) for name in made.arrays if name != TOP)
    away = np.abs(read.arrays[TOP].astype(int) - made.arrays[TOP])
    mine = lerobot.read(tmp_path / "ours", tmp_path, [TOP])
    print("pixels after their encoder differ by", away.mean(), "levels on average; after ours by",
          np.abs(mine.arrays[TOP].astype(int) - made.arrays[TOP]).mean())  # fmt: skip
    assert away.mean() < 4
    for folder in ("theirs", "ours"):
        info = json.loads((tmp_path / folder / "meta/info.json").read_text())
        assert info["total_frames"] == made.lengths.sum()
    same_layout(tmp_path / "theirs", tmp_path / "ours")


def same_layout(theirs: Path, ours: Path) -> None:
    """The same files with the same columns and types, the index of the instructions' table aside, and statistics of
    whole numbers, which release 0.4.4 has as floats and 0.6.1 as integers."""
    import pyarrow.parquet as pq

    files = [sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file())
             for folder in (theirs, ours)]  # fmt: skip
    assert files[0] == files[1]
    for file in files[0]:
        if file.endswith(".parquet") and "tasks" not in file:
            schemas = [pq.read_schema(folder / file) for folder in (theirs, ours)]
            columns = [{field.name: str(field.type) for field in schema} for schema in schemas]
            columns = [{name: kind.replace("int64", "double") if name.startswith("stats/") else kind
                        for name, kind in one.items()} for one in columns]  # fmt: skip
            assert columns[0] == columns[1]
            assert pq.ParquetFile(ours / file).num_row_groups == pq.ParquetFile(theirs / file).num_row_groups
    infos = [json.loads((folder / "meta/info.json").read_text()) for folder in (theirs, ours)]
    videos = [info["features"][TOP].pop("info") for info in infos]
    assert infos[0] == infos[1]
    print("of a video theirs says beside what ours says:", {k: v for k, v in videos[0].items() if k not in videos[1]},
          "and not:", {k: v for k, v in videos[1].items() if videos[0].get(k) != v})  # fmt: skip
    assert {"video.height", "video.width", "video.fps", "video.codec"} <= {
        name for name, value in videos[1].items() if videos[0].get(name) == value
    }
