"""A policy's answers to the observations of one robot: checked, predicted, and held to the bound of its actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from aurora_train.errors import UserError, nearest
from robot.chunks import CAMERA, inputs

# How far outside the training data an entry is reported: in widths of their range, and of their size.
FAR, STILL = 1.0, 1e-3


class Answers:
    """Answers {feature: value} by {"action": float32[K, A], "execute": int}, with "warnings" if there are any.

    Features have the names of the training data; further ones that begin with "observation." are left unread. `task` is
    needed if the policy knows several instructions. `execute` is how many actions of a chunk were carried out when the
    policy was scored. An action beyond `bound` is cut to it, which a warning says.

    Args:
        facts: those of `policy.Policy`.
        predict: as in `Recipe.score`.
        execute: as above.
        bound: float32[A] or None, the largest size of each entry of an action.
        key: from which the policy's draws follow; the n-th answer has the n-th draw.
    """

    def __init__(self, facts: dict, predict: Callable[[dict], Any], execute: int, bound, key):
        self._facts, self._predict, self._execute, self._bound, self._key = facts, predict, execute, bound, key
        cameras = [CAMERA + name for name in facts["cameras"]]
        of = dict(zip([*facts["state"], *cameras], [*facts["state"], *facts["cameras"]], strict=True))
        self._shapes = {feature: tuple(facts["shapes"][name]) for feature, name in of.items()}
        self._asked = 0

    def compile(self) -> None:
        """Ask the policy once, so that no client waits for its compilation."""
        self._act({feature: np.zeros(shape, _dtype(feature)) for feature, shape in self._shapes.items()}, 0)
        self._asked = 0

    def __call__(self, request: dict) -> dict:
        """The answer to one observation. UserError, which says what was expected, for one that is not valid."""
        task, request = self._task(request), {name: one for name, one in request.items() if name != "task"}
        unknown = [name for name in request if name not in self._shapes and not name.startswith("observation.")]
        missing = [name for name in self._shapes if name not in request]
        if unknown or missing:
            what = f"there is no `{missing[0]}`" if missing else f"`{unknown[0]}` is not known"
            hint = None if missing else nearest(unknown[0], [*self._shapes, "task"])
            raise UserError(what, where="observation", why=self.expected(), hint=hint)
        observation = {name: self._array(name, request[name]) for name in self._shapes}
        warnings = [line for name in self._facts["state"] if (line := self._far(name, observation[name]))]
        chunk = self._act(observation, task)
        if not np.isfinite(chunk).all():
            raise UserError("the policy's action is not a finite number", where="action", hint="do not move on it")
        chunk, cut = self._within(chunk)
        answer = {"action": chunk, "execute": self._execute}
        return answer | ({"warnings": warnings + cut} if warnings or cut else {})

    def expected(self) -> str:
        """What an observation has to hold, as one line."""
        parts = [f"`{name}` {_dtype(name)}{list(shape)}" for name, shape in self._shapes.items()]
        tasks = self._facts["tasks"]
        parts += [f"`task`, one of {', '.join(map(repr, tasks))}"] if len(tasks) > 1 else []
        return f"expected: {', '.join(parts)}"

    def _task(self, request: dict) -> int:
        tasks, task = self._facts["tasks"], request.get("task")
        if task is None and len(tasks) == 1:
            return 0
        if not isinstance(task, str) or task not in tasks:
            what = "there is no `task`" if task is None else f"the policy does not know the task {task!r}"
            raise UserError(what, where="observation", why=self.expected(), hint=nearest(task, tasks))
        return tasks.index(task)

    def _array(self, name: str, value) -> np.ndarray:
        shape, dtype = self._shapes[name], _dtype(name)
        try:
            given = np.asarray(value)
        except ValueError:  # rows of unequal length
            given = np.empty(0, object)
        if given.dtype.kind not in "fiu" or given.shape != shape:
            found = f"{given.dtype}{list(given.shape)}" if given.dtype.kind in "fiub" else "not an array of numbers"
            raise UserError(f"`{name}` is {found}", where="observation", why=self.expected())
        if dtype == "uint8" and (given.dtype.kind == "f" or given.min() < 0 or given.max() > 255):
            raise UserError(f"`{name}` has values that are no bytes", where="observation", why=self.expected(),
                            hint="a picture has whole numbers from 0 to 255")  # fmt: skip
        with np.errstate(over="ignore"):
            array = given.astype(dtype)
        if not np.isfinite(array).all():
            entry = int(np.flatnonzero(~np.isfinite(array))[0])
            raise UserError(f"{self._entry(name, entry)} is {given.reshape(-1)[entry]}", where="observation",
                            why="a policy cannot act on a value that is not a finite float32")  # fmt: skip
        return array

    def _far(self, name: str, value: np.ndarray) -> str | None:
        """A warning if an entry is far outside the training data: another unit, say, or a broken sensor."""
        low, high = (np.float32(self._facts["scale"][name][end]).reshape(-1) for end in ("min", "max"))
        value = value.reshape(-1)
        # What never moved in training may differ a little: by a rounding, or a bolt.
        allowed = FAR * (high - low) + STILL * np.maximum(np.maximum(np.abs(low), np.abs(high)), 1)
        outside = np.maximum(low - value, value - high) - allowed
        worst = int(outside.argmax())
        if outside[worst] <= 0:
            return None
        return (f"observation far from the training data: {self._entry(name, worst)} is {value[worst]:.4g}, and there "
                f"it was {low[worst]:.4g} to {high[worst]:.4g}")  # fmt: skip

    def _within(self, chunk: np.ndarray) -> tuple[np.ndarray, list[str]]:
        if self._bound is None:
            return chunk, []
        bound = np.broadcast_to(self._bound, chunk.shape)
        beyond = np.abs(chunk) > bound
        if not beyond.any():
            return chunk, []
        row, entry = np.unravel_index((np.abs(chunk) / bound).argmax(), chunk.shape)
        return np.clip(chunk, -bound, bound), [
            f"action cut to limits.action_bound: {beyond.sum()} of {beyond.size} values; the largest was "
            f"{chunk[row, entry]:.4g} in {self._entry('action', entry)}, whose bound is {bound[row, entry]:.4g}"
        ]

    def _entry(self, name: str, entry: int) -> str:
        """An entry of a feature as a text: `action[3]`, with its name if it has one."""
        names = self._facts["names"].get(name, ())
        return f"`{name}[{entry}]`" + (f" ({names[entry]})" if entry < len(names) else "")

    def _act(self, observation: dict, task: int) -> np.ndarray:
        import jax

        keys = jax.random.split(jax.random.fold_in(self._key, self._asked), 1)
        self._asked += 1
        seen = inputs({name: array[None] for name, array in observation.items()}, self._facts["state"],
                      self._facts["cameras"])  # fmt: skip
        return np.asarray(self._predict(seen | {"task": np.int32([task]), "key": keys})[0])


def probe(facts: dict, examples: int) -> dict:
    """A batch for `Policy.predict` from the facts alone: states within the range of the training data, random pictures,
    every instruction in turn."""
    rng, scale = np.random.default_rng(0), facts["scale"]
    batch: dict[str, np.ndarray] = {"task": np.arange(examples, dtype=np.int32) % len(facts["tasks"])}
    for name in facts["cameras"]:
        batch[f"image.{name}"] = rng.integers(0, 256, (examples, *facts["shapes"][name]), np.uint8)
    if facts["state"]:
        low, high = (np.concatenate([np.float32(scale[name][end]).reshape(-1) for name in facts["state"]])
                     for end in ("min", "max"))  # fmt: skip
        batch["state"] = rng.uniform(low, high, (examples, len(low))).astype(np.float32)
    return batch


def _dtype(feature: str) -> str:
    return "uint8" if feature.startswith(CAMERA) else "float32"
