"""A batch of `moves.Moves` as the network and the world take it. Only jax."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.generate.drawing import Knobs
from driving.agents import Agents, Seen
from driving.closed_loop import Cast, Log, in_end_frame, rollout
from driving.relations import Lanes
from driving.scenes import HISTORY, LANE_KINDS, STEPS, UNKNOWN
from driving.tokens import TOKEN_S, TOKEN_STEPS, anchors, relative, rotated, tokenised


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


def rolled_out(model, templates, batch: dict, temperature: float, top_p: float) -> dict:
    """One rollout of the 6 s after the history; see `motion.Motion.predict`."""
    templates, keys = jnp.asarray(templates), batch.get("key")
    seen, _ = seen_of(templates, batch)
    log, agents = log_of(batch), agents_of(batch)
    replayed = batch.get("replayed", jnp.zeros(log.valid.shape[:2], bool))
    steered = batch.get("steered", jnp.zeros(len(replayed), bool))
    if keys is None:
        keys, temperature = jax.random.split(jax.random.key(0), len(replayed)), 0.0
    knobs = Knobs(jnp.float32(temperature), jnp.int32(len(templates)), jnp.float32(top_p))
    past = anchors(HISTORY, HISTORY - 1).size
    seen = seen._replace(**{name: getattr(seen, name)[:, :, :past] for name in ("poses", "motion", "token", "valid")})
    cast, number = Cast(replayed, steered), (STEPS - HISTORY) // TOKEN_STEPS
    states, present, collided = rollout(model, templates, agents, seen, log, cast, keys, knobs, number)
    return {"states": states, "present": present, "collided": collided}
