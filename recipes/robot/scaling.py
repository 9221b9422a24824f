"""The scale of what a policy sees and does, from the statistics of training frames that the run keeps as facts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

STILL = 1e-4  # an entry with a smaller deviation is centred and not stretched: it did not move in training


class Scaling:
    """`facts`: those of `policy.Policy`. Values become (value - mean) / deviation, colours of pictures among them."""

    def __init__(self, facts: dict):
        scale = facts["scale"]
        self.mean = np.concatenate([np.float32(scale[name]["mean"]) for name in facts["state"]] or [np.zeros(0)])
        self.deviation = np.concatenate([moving(scale[name]["std"]) for name in facts["state"]] or [np.ones(0)])
        self.action = np.float32(scale["action"]["mean"]), moving(scale["action"]["std"])
        self.bounds = tuple(tuple(((np.float32(scale["action"][end]) - self.action[0]) / self.action[1]).tolist())
                            for end in ("min", "max"))  # fmt: skip
        self.pictures = {f"image.{name}": (np.float32(scale[name]["mean"]), moving(scale[name]["std"]))
                         for name in facts["cameras"]}  # fmt: skip

    def seen(self, batch: dict) -> dict:
        """The scaled inputs of a batch: `state` float32[B, S], and `image.NAME` float32[B, H, W, 3] of uint8."""
        scaled = {}
        if len(self.mean):
            scaled["state"] = (batch["state"] - self.mean) / self.deviation
        for name, (mean, deviation) in self.pictures.items():
            scaled[name] = (jnp.asarray(batch[name], jnp.float32) / 255 - mean) / deviation
        return scaled

    def scaled(self, action):
        return (action - self.action[0]) / self.action[1]

    def raw(self, action):
        """The inverse of `scaled`."""
        return action * self.action[1] + self.action[0]


def moving(deviation) -> np.ndarray:
    """What values are divided by, float32: the deviation, or 1 for an entry that stood still."""
    deviation = np.float32(deviation)
    return np.where(deviation < STILL, np.float32(1), deviation)
