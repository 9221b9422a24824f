"""Chunks of actions: each frame of an episode is an example, with what the robot saw then and its next K actions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence

import numpy as np

from aurora_train.errors import UserError, nearest
from robot.episodes import Episode, Episodes, digest
from robot.settings import VECTORS, DataConfig

CAMERA = "observation.images."


class Chunks:
    """A `Source` of the frames of one split: "train", "validation" or "test". Values are raw, as recorded.

    `take` returns
        state: float32[B, S], the state features end to end;
        image.NAME: uint8[B, H, W, 3] for each camera NAME, the feature "observation.images.NAME";
        action: float32[B, K, A], the actions of this frame and of the next; past the end of the episode the last one
            is repeated;
        padded: bool[B, K], true for those repetitions;
        task: int32[B], the place of the episode's instruction in `tasks`.

    Args:
        test, validation: the shares of episodes held out for these splits.
        chunk: K.
        state, cameras, action: features to take; cameras by NAME.
        tasks: the instructions that the model knows; by default all that occur, in alphabetical order.
    """

    def __init__(self, episodes: Episodes, split: str, *, chunk: int, test: float, validation: float,
                 state: Sequence[str] = ("observation.state",), cameras: Sequence[str] = (), action: str = "action",
                 tasks: Sequence[str] | None = None):  # fmt: skip
        self.episodes, self.chunk, self.state, self.cameras = episodes, chunk, tuple(state), tuple(cameras)
        self.split, self.which = split, split_of(episodes, test, validation, action)[split]
        self.tasks = tuple(sorted(set(episodes.tasks)) if tasks is None else tasks)
        self.rows = episodes.rows(self.which)
        self._last = np.repeat(episodes.starts[self.which] + episodes.lengths[self.which] - 1,
                               episodes.lengths[self.which])  # fmt: skip
        self._task = np.repeat(self._task_of(), episodes.lengths[self.which])
        for name in (*self.state, *(CAMERA + one for one in self.cameras)):
            episodes.feature(name, "data.cameras" if name.startswith(CAMERA) else "data.state")
        self._action = episodes.feature(action, "data.action")
        decisive = [2, episodes.fingerprint, split, self.which.tolist(), chunk, state, cameras, action, self.tasks]
        self.fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def _task_of(self) -> np.ndarray:
        place = {task: k for k, task in enumerate(self.tasks)}
        for e in self.which:
            if self.episodes.tasks[e] not in place:
                raise UserError(
                    f"episode {e} has the instruction {self.episodes.tasks[e]!r}, which the model does not know",
                    where="data.source", hint=f"it knows: {', '.join(map(repr, self.tasks))}",
                )  # fmt: skip
        return np.array([place[self.episodes.tasks[e]] for e in self.which], np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = self.rows[indices]
        ahead = rows[:, None] + np.arange(self.chunk)
        last = self._last[indices][:, None]
        seen = inputs({name: array[rows] for name, array in self._seen()}, self.state, self.cameras)
        action = np.asarray(self._action[np.minimum(ahead, last)])
        return seen | {"action": action, "padded": ahead > last, "task": self._task[indices]}

    def _seen(self):
        names = (*self.state, *(CAMERA + one for one in self.cameras))
        return [(name, self.episodes.arrays[name]) for name in names]

    def describe(self) -> dict:
        episodes = self.episodes
        return episodes.source | {
            "split": self.split, "episodes": len(self.which), "frames": len(self), "fps": episodes.fps,
            "chunk": self.chunk, "tasks": list(self.tasks), "sha256": episodes.fingerprint,
        }  # fmt: skip


def state_features(data: DataConfig, there: Collection[str]) -> list[str]:
    """The vector features that a policy sees, of those that are `there`.

    Raises UserError if one that the config names is missing, or if the policy would see nothing.
    """
    for name in data.state or ():
        _check_there(name, there, "data.state")
    state = list(data.state) if data.state is not None else [name for name in VECTORS if name in there]
    if not state and not data.cameras:
        raise UserError("the policy would see nothing", where="data.state",
                        hint=f"data.state=[...] or data.cameras=[...] of: {', '.join(there)}")  # fmt: skip
    return state


def used_features(data: DataConfig, there: Collection[str]) -> dict[str, str]:
    """What a model calls its inputs and its output -> their features: state features, NAME of cameras, "action"."""
    cameras = {name: CAMERA + name for name in data.cameras}
    for feature in cameras.values():
        _check_there(feature, there, "data.cameras")
    _check_there(data.action, there, "data.action")
    return {name: name for name in state_features(data, there)} | cameras | {"action": data.action}


def _check_there(name: str, there: Collection[str], where: str) -> None:
    if name not in there:
        raise UserError(f"the episodes have no feature `{name}`", where=where,
                        hint=nearest(name, there, f"they have: {', '.join(there)}"))  # fmt: skip


def inputs(observation: dict[str, np.ndarray], state: Sequence[str], cameras: Sequence[str]) -> dict[str, np.ndarray]:
    """What a policy sees: `state` float32[B, S] and `image.NAME` uint8[B, H, W, 3], from features [B, ...] by name.

    `Chunks`, rollouts and a server share it, so that a policy is asked in the form in which it was trained.
    """
    parts = [np.asarray(observation[name], np.float32) for name in state]
    seen = {f"image.{one}": np.asarray(observation[CAMERA + one]) for one in cameras}
    if parts:
        seen["state"] = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    return seen


def split_of(episodes: Episodes, test: float, validation: float, action: str = "action") -> dict[str, np.ndarray]:
    """int64 numbers of the episodes of "train", "validation" and "test"; a hash of what was done decides the split.

    It is the hash of an episode's instruction and of its `action`, so an episode stays where it is when others are
    added, and whatever else of it is read: runs with other cameras hold the same episodes out. Equal episodes are in
    one split. A split with a share above 0 that would be empty takes the training episode with the smallest hash.
    UserError if none is left for training.
    """
    array = episodes.feature(action, "data.action")
    done = [digest(Episode({"action": array[start : start + length]}, task)) for start, length, task in zip(
        episodes.starts, episodes.lengths, episodes.tasks, strict=True)]  # fmt: skip
    draws = np.array([int(one[:13], 16) / 16**13 for one in done])
    of = np.where(draws < test, "test", np.where(draws < test + validation, "validation", "train"))
    for name, share in (("test", test), ("validation", validation)):
        if share > 0 and not (of == name).any() and (of == "train").any():
            of[draws == draws[of == "train"].min()] = name
    if not (of == "train").any():
        raise UserError(
            f"no episode is left for training: there are {len(draws)}, {len(set(done))} of them different",
            where="data.source", hint="give more episodes, or hold smaller shares out",
        )  # fmt: skip
    return {name: np.flatnonzero(of == name) for name in ("train", "validation", "test")}
