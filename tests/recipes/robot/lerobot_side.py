"""The real LeRobot library, in a Python of its own: writes a dataset from arrays, or opens one and hands out its items.

    python lerobot_side.py write EPISODES.npz FOLDER
    python lerobot_side.py read FOLDER ITEMS.npz

EPISODES.npz: fps, names (JSON), tasks, lengths, and each feature's frames end to end. ITEMS.npz: each feature as
`dataset[i]` gives it, frame by frame (images float32[N, 3, H, W] in 0..1), `task`, `chunk/action` and its padding for
three actions ahead, lengths, and `stats/FEATURE/STATISTIC` as the library loads them.
"""

import json
import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def write(source: str, folder: str) -> None:
    with np.load(source) as file:
        given = {name: file[name] for name in file.files}
    fps, names = int(given.pop("fps")), json.loads(str(given.pop("names")))
    tasks, lengths = given.pop("tasks").tolist(), given.pop("lengths").tolist()
    features = {
        name: {"dtype": "video" if array.ndim == 4 else str(array.dtype), "shape": array.shape[1:],
               "names": ["height", "width", "channels"] if array.ndim == 4 else names.get(name)}
        for name, array in given.items()
    }  # fmt: skip
    dataset = LeRobotDataset.create("local/arm", fps, features, root=folder, robot_type="arm")
    row = 0
    for task, length in zip(tasks, lengths, strict=True):
        for _ in range(length):
            dataset.add_frame({name: array[row] for name, array in given.items()} | {"task": task})
            row += 1
        dataset.save_episode()
    dataset.finalize()


def read(folder: str, items: str) -> None:
    fps = json.loads(Path(folder, "meta/info.json").read_text())["fps"]
    dataset, chunked = (
        LeRobotDataset("local/arm", root=folder, delta_timestamps=ahead, video_backend="pyav")
        for ahead in (None, {"action": [k / fps for k in range(3)]})
    )
    rows, ahead = ([one[i] for i in range(len(one))] for one in (dataset, chunked))
    found = {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
    for name in ("action", "action_is_pad"):
        found[f"chunk/{name}"] = np.stack([np.asarray(row[name]) for row in ahead])
    for feature, statistics in dataset.meta.stats.items():
        found |= {f"stats/{feature}/{name}": np.asarray(value) for name, value in statistics.items()}
    np.savez(items, lengths=np.array(list(dataset.meta.episodes["length"])), **found)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
