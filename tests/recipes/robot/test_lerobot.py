"""LeRobot datasets, written and read again: values, types, several files, embedded images, an interrupted reading."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaging import DATA, FILM, TOP, column, feature
from PIL import Image
from recorded_episodes import episodes

from aurora_train.errors import UserError
from robot import lerobot, lerobot_statistics, lerobot_write
from robot.episodes import Episode, Episodes
from robot.lerobot_meta import TASKS
from robot.video import Video

pytest.importorskip("av")

FEATURES = ["observation.state", "action", TOP]


def test_what_is_written_is_read_again(tmp_path):
    made = episodes(4)
    lerobot_write.write(made, tmp_path / "arm", robot="arm")
    steps = []
    read = lerobot.read(tmp_path / "arm", tmp_path, list(made.arrays), lambda *step: steps.append(step))
    assert read.tasks == made.tasks and read.names == made.names and read.fps == made.fps
    assert all(np.array_equal(read.arrays[name], made.arrays[name]) for name in made.arrays if name != TOP)
    apart = np.abs(read.arrays[TOP].astype(int) - made.arrays[TOP])
    assert apart.mean() < 6 and np.median(apart) <= 2  # AV1 loses at edges, the more the smaller the image
    assert steps[-1] == (4, 4, "reading episodes")
    steps.clear()
    again = lerobot.read(tmp_path / "arm", tmp_path, list(made.arrays), lambda *step: steps.append(step))
    assert again.fingerprint == read.fingerprint
    assert {what for _, _, what in steps} == {"hashing the dataset"}  # nothing was decoded again
    with pytest.raises(UserError, match="this folder exists"):
        lerobot_write.write(made, tmp_path / "arm")


def test_frames_are_in_their_places_whatever_episode_is_asked_first(tmp_path):
    made = episodes(4)
    lerobot_write.write(made, tmp_path / "arm", codec="libx264")
    video = Video(tmp_path / "arm" / FILM, (16, 16), 10.0)
    whole = video.take(0.0, 26, 0)
    for e in (3, 0, 2, 1, 1):
        start, length = int(made.starts[e]), int(made.lengths[e])
        assert np.array_equal(video.take(start / 10, length, e), whole[start : start + length])


def test_a_dataset_of_several_files_is_read_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_write, "DATA_MB", 0)
    monkeypatch.setattr(lerobot_write, "_RAW_VIDEO_BYTES", 10_000)  # 13 frames
    monkeypatch.setattr(lerobot_write, "FILES_IN_CHUNK", 3)
    made = episodes(5)
    lerobot_write.write(made, tmp_path / "arm")
    files = sorted(path.relative_to(tmp_path / "arm").as_posix() for path in (tmp_path / "arm/data").rglob("*.parquet"))
    assert files == [f"data/chunk-00{k // 3}/file-00{k % 3}.parquet" for k in range(5)]
    assert len(list((tmp_path / "arm/videos").rglob("*.mp4"))) == 4
    monkeypatch.undo()
    lerobot_write.write(made, tmp_path / "once")  # AV1: x264 does not always encode images this small alike
    read, once = (lerobot.read(tmp_path / name, tmp_path / "cache", FEATURES) for name in ("arm", "once"))
    assert read.digests == once.digests


def test_instructions_are_found_under_every_name_of_their_index(tmp_path):
    """lerobot 0.6 calls it `task`, as we do; 0.4 gives it no name."""
    made = episodes(2, camera=False)
    lerobot_write.write(made, tmp_path / "arm")
    pd.DataFrame({"task_index": [0, 1]}, index=list(made.tasks)).to_parquet(tmp_path / "arm" / TASKS)
    assert pq.read_schema(tmp_path / "arm" / TASKS).names == ["task_index", "__index_level_0__"]
    assert lerobot.read(tmp_path / "arm", tmp_path, ["action"]).tasks == made.tasks


def test_descriptions_of_older_releases_are_understood(tmp_path):
    made = episodes(2)
    lerobot_write.write(made, tmp_path / "arm", codec="libx264")
    feature(TOP, shape=[3, 16, 16], names=["channels", "height", "width"])(tmp_path / "arm")
    feature("action", names={"motors": ["left", "right"]})(tmp_path / "arm")
    read = lerobot.read(tmp_path / "arm", tmp_path, FEATURES)
    assert read.arrays[TOP].shape == (11, 16, 16, 3) and read.names["action"] == ("left", "right")


def test_doubles_integers_and_truth_values_become_float32(tmp_path):
    lerobot_write.write(episodes(2, camera=False), tmp_path / "arm")
    wide = pa.list_(pa.float64())
    column(DATA, "action", lambda found: pa.array(found, wide))(tmp_path / "arm")
    table = pq.read_table(tmp_path / "arm" / DATA)
    table = table.append_column("next.done", pa.array([k % 2 == 0 for k in range(len(table))]))
    pq.write_table(table.append_column("next.count", pa.array(range(len(table)))), tmp_path / "arm" / DATA)
    for name, dtype in (("next.done", "bool"), ("next.count", "int64")):
        add_feature(tmp_path / "arm", name, dtype, [1])
    read = lerobot.read(tmp_path / "arm", tmp_path, ["action", "next.done", "next.count"])
    assert {array.dtype for array in read.arrays.values()} == {np.dtype("float32")}
    assert np.array_equal(read.arrays["action"], episodes(2, camera=False).arrays["action"])
    assert read.arrays["next.done"][:3].tolist() == [[1], [0], [1]] and read.arrays["next.count"][-1] == 10


def add_feature(folder, name: str, dtype: str, shape: list[int]) -> None:
    path = folder / "meta/info.json"
    content = json.loads(path.read_text())
    content["features"][name] = {"dtype": dtype, "shape": shape, "names": None}
    path.write_text(json.dumps(content))


def test_embedded_images_are_read_as_they_are(tmp_path):
    """A dataset recorded with `use_videos=False` has PNG files in its data."""
    made = episodes(3)
    lerobot_write.write(episodes(3, camera=False), tmp_path / "arm")
    cells = [{"bytes": png(image), "path": f"frame-{k}.png"} for k, image in enumerate(made.arrays[TOP])]
    table = pq.read_table(tmp_path / "arm" / DATA)
    pq.write_table(table.append_column(TOP, pa.array(cells)), tmp_path / "arm" / DATA)
    add_feature(tmp_path / "arm", TOP, "image", [16, 16, 3])
    read = lerobot.read(tmp_path / "arm", tmp_path, FEATURES)
    assert np.array_equal(read.arrays[TOP], made.arrays[TOP])

    good = cells[7]["bytes"]
    huge = b"IHDR" + struct.pack(">II", 60_000, 60_000) + good[24:29]
    for bad in (b"PNG", good[:60], good.replace(b"IDAT", b"I\xffAT"),
                good[:12] + huge + struct.pack(">I", zlib.crc32(huge)) + good[33:]):  # fmt: skip
        cells[7] = {"bytes": bad, "path": None}
        pq.write_table(table.append_column(TOP, pa.array(cells)), tmp_path / "arm" / DATA)
        with pytest.raises(UserError, match=rf"{DATA}: row 7 \(episode 1, frame 2\): `{TOP}` is not an image"):
            lerobot.read(tmp_path / "arm", tmp_path, FEATURES)
    feature(TOP, shape=[8, 16, 3])(tmp_path / "arm")
    with pytest.raises(UserError, match=r"row 0 \(.*\): .* the shape \[16, 16, 3\], info.json says \[8, 16, 3\]"):
        lerobot.read(tmp_path / "arm", tmp_path, FEATURES)


def test_a_feature_may_be_seen_and_predicted(tmp_path):
    lerobot_write.write(episodes(2, camera=False), tmp_path / "arm")
    read = lerobot.read(tmp_path / "arm", tmp_path, ["observation.state", "action", "observation.state"])
    assert np.array_equal(read.arrays["observation.state"], episodes(2).arrays["observation.state"])


def test_what_the_format_has_no_place_for_is_not_left_out_silently(tmp_path):
    one = Episode({"observation.state": np.zeros((3, 2), np.float32), "action": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"`action` is float32\[3\]"):
        lerobot_write.write(Episodes.of([one], 10.0), tmp_path / "arm")


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def test_pictures_are_resized_while_they_are_read(tmp_path):
    lerobot_write.write(episodes(2), tmp_path / "arm", codec="libx264")
    whole, small = (lerobot.read(tmp_path / "arm", tmp_path, [TOP], edge=edge).arrays[TOP] for edge in (None, 8))
    means = whole.reshape(-1, 8, 2, 8, 2, 3).mean(axis=(2, 4))
    assert small.shape == (11, 8, 8, 3) and np.abs(small - means).max() <= 1


def test_the_first_episodes_can_be_read_alone(tmp_path):
    lerobot_write.write(episodes(4, camera=False), tmp_path / "arm")
    assert len(lerobot.read(tmp_path / "arm", tmp_path, ["action"], episodes=2)) == 2
    with pytest.raises(UserError, match="data.episodes: 9 episodes are wanted, and .* has 4"):
        lerobot.read(tmp_path / "arm", tmp_path, ["action"], episodes=9)


def test_what_cannot_be_written_is_said(tmp_path):
    made = episodes(2)
    with pytest.raises(UserError, match="unknown codec 'gif'\n  one of: libsvtav1, libx264"):
        lerobot_write.write(made, tmp_path / "arm", codec="gif")
    made.arrays[TOP] = made.arrays[TOP][:, :15]
    with pytest.raises(UserError, match="have 15 x 16 pixels"):
        lerobot_write.write(made, tmp_path / "arm")
    assert list(tmp_path.iterdir()) == []


def test_the_statistics_of_a_dataset_are_those_of_its_frames():
    """Mean, deviation and extremes of the whole follow exactly from the episodes'; quantiles within a bin of 1/5000."""
    made = episodes(5)
    for name, array in made.arrays.items():
        parts = [lerobot_statistics.of_episode(one.arrays[name]) for one in made]
        found = lerobot_statistics.of_all(parts)
        frames = array.reshape(-1, 3) / 255 if name == TOP else array.astype(np.float64)
        for number in ("mean", "std", "min", "max"):
            wanted = getattr(frames, number)(0)
            np.testing.assert_allclose(found[number].reshape(-1), wanted, rtol=1e-6, atol=1e-7, err_msg=number)
        assert found["count"].tolist() == [35]
        first = frames[: made.lengths[0] * (256 if name == TOP else 1)]
        low = np.quantile(first, 0.5, axis=0, method="inverted_cdf")
        assert np.all(np.abs(parts[0]["q50"].reshape(-1) - low) <= np.ptp(first, axis=0) / 5000 + 1e-9)


READS = """
import os, signal, sys
from robot import lerobot, video
taken = video.Video.take
def take(self, first_s, length, episode, fit):
    if episode == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return taken(self, first_s, length, episode, fit)
video.Video.take = take
lerobot.read(sys.argv[1], sys.argv[2], ["observation.state", "action", "observation.images.top"])
"""


def test_a_decoding_that_was_killed_goes_on_with_the_episode_it_was_at(tmp_path, monkeypatch):
    lerobot_write.write(episodes(5), tmp_path / "arm", codec="libx264")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for at in ("1", "3"):
        command = [sys.executable, "-c", READS, str(tmp_path / "arm"), str(tmp_path / "cache"), at]
        assert subprocess.run(command, env=environment, timeout=60).returncode == -signal.SIGKILL
    asked, taken = [], Video.take

    def take(self, first_s, length, episode, fit):
        asked.append(episode)
        return taken(self, first_s, length, episode, fit)

    monkeypatch.setattr(Video, "take", take)
    killed = lerobot.read(tmp_path / "arm", tmp_path / "cache", FEATURES)
    assert asked == [3, 4]
    assert killed.fingerprint == lerobot.read(tmp_path / "arm", tmp_path / "other", FEATURES).fingerprint
    assert asked == [3, 4, 0, 1, 2, 3, 4]
