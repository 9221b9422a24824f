"""A batch of `scene_batches.SceneBatches` as the network and the world take it. Only jax."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from driving.agents import Agents, Seen
from driving.closed_loop import Log, in_end_frame
from driving.relations import Lanes
from driving.scenes import HISTORY, LANE_KINDS, UNKNOWN
from driving.tokens import TOKEN_S, anchors, relative, rotated, tokenised

READ = ("states", "valid", "sizes", "kinds", "pieces", "pieces_valid", "pieces_kind", "pieces_about", "pieces_light",
        "lights")  # fmt: skip


def blind(batch: dict) -> dict:
    """The batch (numpy) as it is known at the last step of the history: nobody is seen later, the lights stay."""
    valid, lights = batch["valid"].copy(), batch["lights"].copy()
    valid[:, :, HISTORY:] = False
    lights[..., HISTORY:] = lights[..., HISTORY - 1 : HISTORY]
    return batch | {"states": np.where(valid[..., None], batch["states"], 0), "valid": valid, "lights": lights}


def agents_of(batch: dict) -> Agents:
    """Who is in the scenes, and the lanes."""
    about = jnp.stack([batch["pieces_about"][..., 0] / 10, batch["pieces_about"][..., 0] > 0], -1)
    kinds = batch["pieces_kind"][..., None] == jnp.arange(1, len(LANE_KINDS))
    facts = jnp.concatenate([about, batch["pieces_about"][..., 1:], kinds], -1)
    return Agents(batch["kinds"], batch["sizes"], Lanes(batch["pieces"], batch["pieces_valid"], facts))


def log_of(batch: dict) -> Log:
    """What the world replays."""
    return Log(batch["states"], batch["valid"], batch["sizes"])


def seen_of(templates, batch: dict, noise: float = 0.0, keys=None) -> tuple[Seen, object]:
    """(the tracks at all anchors as templates, the template that leads on from each anchor int32[B, A, T]).

    `noise`, `keys`: as in `tokens.tokenised`. The second is V where a track does not go on.
    """
    count, at = len(templates), anchors(batch["states"].shape[2], HISTORY - 1)
    states, valid = batch["states"][:, :, at], batch["valid"][:, :, at]
    reached, taken, nearest = tokenised(templates, states[..., :3], valid, noise, keys)
    went = relative(jnp, jnp.concatenate([reached[:, :, :1], reached[:, :, :-1]], 2), reached)
    ahead = rotated(jnp, states[..., 3:], -states[..., 2]) * TOKEN_S
    new = jnp.concatenate([ahead, jnp.zeros_like(ahead[..., :1])], -1)
    motion = jnp.where((taken < count)[..., None], in_end_frame(went), new)
    motion = jnp.where(valid[..., None], motion, 0)
    governed = jnp.take_along_axis(batch["lights"][:, :, at], jnp.maximum(batch["pieces_light"], 0)[..., None], axis=1)
    lights = jnp.where((batch["pieces_light"] >= 0)[..., None], governed, UNKNOWN)
    following = jnp.concatenate([nearest[:, :, 1:], jnp.full_like(nearest[:, :, :1], count)], 2)
    return Seen(reached, motion, taken, valid, lights), following
