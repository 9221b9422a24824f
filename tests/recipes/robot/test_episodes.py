"""Episodes in memory and in their store, splits, chunks of actions, and statistics held to numpy."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from recorded_episodes import episode, episodes

from aurora_train.errors import UserError
from robot import statistics
from robot.chunks import Chunks, split_of
from robot.episodes import Episodes, kept


def test_a_store_gives_back_what_was_written(tmp_path):
    made = episodes(5)
    made.write(tmp_path / "store")
    read = Episodes.read(tmp_path / "store")
    assert read.fingerprint == made.fingerprint and read.tasks == made.tasks and read.names == made.names
    assert read.source == made.source and read.fps == made.fps and read.notes == made.notes
    assert all(np.array_equal(read.arrays[name], made.arrays[name]) for name in made.arrays)
    made.write(tmp_path / "store")  # again: nothing happens
    with pytest.raises(UserError, match="other episodes"):
        episodes(4).write(tmp_path / "store")


def test_the_fingerprint_is_that_of_the_content():
    made = episodes(3)
    assert made.fingerprint == episodes(3).fingerprint
    other = episodes(3)
    other.arrays["action"][-1, 0] += 1e-3
    assert other.fingerprint != made.fingerprint and other.digests[:2] == made.digests[:2]
    assert Episodes.of(list(episodes(3)), fps=11.0, names=made.names).fingerprint != made.fingerprint


def test_a_changed_store_is_refused(tmp_path):
    episodes(3).write(tmp_path / "store")
    path = tmp_path / "store" / "action.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    from aurora_train.data import prepared

    prepared._verified.clear()  # as in a new process
    with pytest.raises(UserError, match="action.bin has other contents"):
        Episodes.read(tmp_path / "store")


GROWS = """
import os, signal, sys
from pathlib import Path
from robot.episodes import kept
from recorded_episodes import episode
def grow(notes):
    for number in range(len(notes), 6):
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield episode(number)
kept(Path(sys.argv[1]), {"a": 1}, grow, fps=10.0)
"""


def test_a_recording_that_was_killed_goes_on_after_its_last_whole_episode(tmp_path):
    store, environment = tmp_path / "store", os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", GROWS, str(store), "4"], env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL and not store.exists()
    growing = tmp_path / "store.growing"
    with (growing / "action.bin").open("ab") as file:  # half an episode that no line of the journal names
        file.write(b"12345")
    with (growing / "episodes.jsonl").open("a") as file:
        file.write('{"length": 3, "ta')
    state = bytearray((growing / "observation.state.bin").read_bytes())
    state[-1] ^= 1  # as after a power cut: the bytes of episode 3 are not those that were hashed
    (growing / "observation.state.bin").write_bytes(state)
    asked = []

    def grow(notes):
        asked.extend(notes)
        yield from (episode(number) for number in range(len(notes), 6))

    found = kept(store, {"a": 1}, grow, fps=10.0)
    assert [note["number"] for note in asked] == [0, 1, 2]
    assert found.digests == episodes(6).digests and not growing.exists()
    assert found.digests == tuple(Episodes.of(list(found), 10.0).digests)  # of the bytes that are there


def test_a_store_of_other_data_is_not_continued(tmp_path):
    def stops(notes):
        yield episode(0)
        raise UserError("the arm is gone")

    with pytest.raises(UserError, match="the arm is gone"):
        kept(tmp_path / "store", {"a": 1}, stops, fps=10.0)
    found = kept(tmp_path / "store", {"a": 2}, lambda notes: iter([episode(7)] if not notes else []), fps=10.0)
    assert len(found) == 1 and found.notes == ({"number": 7},)


def test_chunks_repeat_the_last_action_of_the_episode_and_say_so():
    made = episodes(4)
    source = Chunks(made, "train", chunk=3, test=0.25, validation=0.25, cameras=("top",),
                    state=("observation.state", "observation.environment_state"))  # fmt: skip
    which = split_of(made, 0.25, 0.25)["train"]
    assert len(source) == made.lengths[which].sum()
    batch = source.take(np.arange(len(source)))
    assert batch["state"].shape == (len(source), 5) and batch["image.top"].dtype == np.uint8
    at = 0
    for e in which:
        one = made[e]
        for frame in range(len(one.arrays["action"])):
            wanted = [min(frame + k, len(one.arrays["action"]) - 1) for k in range(3)]
            assert np.array_equal(batch["action"][at], one.arrays["action"][wanted])
            assert batch["padded"][at].tolist() == [frame + k >= len(one.arrays["action"]) for k in range(3)]
            assert np.array_equal(batch["state"][at, :3], one.arrays["observation.state"][frame])
            assert source.tasks[batch["task"][at]] == one.task
            at += 1
    some = source.take(np.array([4, 1]))
    assert all(np.array_equal(some[name], batch[name][[4, 1]]) for name in batch)
    json.dumps(source.describe())


def test_an_episode_stays_in_its_split_when_others_are_added():
    few, many = episodes(30), episodes(60)
    of_few, of_many = split_of(few, 0.3, 0.2), split_of(many, 0.3, 0.2)
    for name in ("train", "validation", "test"):
        assert set(of_few[name]) == {e for e in of_many[name] if e < 30} and len(of_few[name])
    twice = Episodes.of([*few, *few], few.fps)
    assert all(set(at % 30) == set(of_few[name]) for name, at in split_of(twice, 0.3, 0.2).items())
    tiny = split_of(episodes(3), 0.01, 0.01)
    assert sorted(map(len, tiny.values())) == [1, 1, 1]
    with pytest.raises(UserError, match="no episode is left for training: there are 2"):
        split_of(Episodes.of([episode(0), episode(0)], 10.0), 0.1, 0.0)


def test_runs_that_see_other_features_hold_the_same_episodes_out():
    whole = episodes(30)
    blind = [one._replace(arrays={name: one.arrays[name] for name in ("observation.state", "action")}) for one in whole]
    assert whole.digests != Episodes.of(blind, whole.fps).digests
    for name, which in split_of(Episodes.of(blind, whole.fps), 0.3, 0.2).items():
        assert which.tolist() == split_of(whole, 0.3, 0.2)[name].tolist()


def test_statistics_are_those_of_the_chosen_frames():
    made = episodes(6)
    which = np.array([4, 1])
    found = statistics.of(made, which)
    for name, array in made.arrays.items():
        frames = array[made.rows(which)].astype(np.float64)
        frames = frames.reshape(-1, 3) / 255 if array.dtype == np.uint8 else frames
        wanted = {"mean": frames.mean(0), "std": frames.std(0), "min": frames.min(0), "max": frames.max(0),
                  "q01": np.quantile(frames, 0.01, axis=0), "q99": np.quantile(frames, 0.99, axis=0)}  # fmt: skip
        for statistic, value in wanted.items():
            assert found[name][statistic].dtype == np.float32
            np.testing.assert_allclose(found[name][statistic], value, rtol=1e-6, atol=1e-7, err_msg=name)


def test_an_unknown_feature_or_instruction_is_named():
    made = episodes(4)
    shares = {"chunk": 2, "test": 0.0, "validation": 0.0}
    with pytest.raises(UserError, match="data.cameras: .*no feature `observation.images.tip`\n.*images.top"):
        Chunks(made, "train", cameras=("tip",), **shares)
    with pytest.raises(UserError, match="episode 0 has the instruction 'Move to 0.'"):
        Chunks(made, "train", tasks=("Wave.",), **shares)
    with pytest.raises(UserError, match="no feature `actoin`"):
        Chunks(made, "train", action="actoin", **shares)

