"""Scenes as `driving/motion` trains on them: some arrays of `scene_batches`, and the templates. Only numpy."""

from __future__ import annotations

import numpy as np

from driving.scene_batches import PIECE_POINTS, SceneBatches
from driving.scenes import HISTORY, STEPS
from driving.tokens import learn, motions_of

SCENES_LOOKED_AT = 400  # for the templates


class Moves(SceneBatches):
    """A `Source`; `located` has what `take` leaves out: "agents" and "origin", to find agents in their scene again."""

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays of `take`."""
        return tuple(shapes(*self.shape))

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        found = self.located(indices)
        return {name: found[name] for name in self.names}

    def located(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """All arrays of `SceneBatches.take`."""
        return super().take(np.asarray(indices))


def shapes(agents: int, pieces: int, lights: int) -> dict[str, tuple]:
    """(shape, dtype) of one scene's arrays by name."""
    return {
        "states": ((agents, STEPS, 5), "float32"), "valid": ((agents, STEPS), "bool"),
        "sizes": ((agents, 2), "float32"), "kinds": ((agents,), "int8"),
        "pieces": ((pieces, PIECE_POINTS, 2), "float32"), "pieces_valid": ((pieces,), "bool"),
        "pieces_kind": ((pieces,), "int8"), "pieces_about": ((pieces, 2), "float32"),
        "pieces_light": ((pieces,), "int8"), "lights": ((lights, STEPS), "int8"),
    }  # fmt: skip


def blind(batch: dict) -> dict:
    """The batch as it is known at the last step of the history: nobody is seen later, and the lights stay."""
    valid, lights = batch["valid"].copy(), batch["lights"].copy()
    valid[:, :, HISTORY:] = False
    lights[..., HISTORY:] = lights[..., HISTORY - 1 : HISTORY]
    return batch | {"states": np.where(valid[..., None], batch["states"], 0), "valid": valid, "lights": lights}


def templates_of(source: Moves, count: int) -> np.ndarray:
    """`count` templates, float32[count, 5, 3], of scenes spread evenly over a split."""
    number = min(len(source), SCENES_LOOKED_AT)
    batch = source.take(np.arange(number) * len(source) // max(number, 1))
    return learn(motions_of(batch["states"], batch["valid"], HISTORY - 1), count)
