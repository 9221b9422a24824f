"""Where things are, seen from an agent: the features of pairs that the network's attentions read. Only jax.

All are functions of one thing's pose in another's frame, in units in which they lie around 1, and saturate with
distance.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from driving.scenes import GREEN, RED, YELLOW
from driving.tokens import relative, rotated

NUM_RELATION = 18  # features of a pair, of whatever things; unused ones are 0
NUM_LANE_FACTS = 9


class Lanes(NamedTuple):
    """M lanes as polylines of P points each, equally spaced."""

    points: jax.Array  # float32[B, M, P, 2]
    valid: jax.Array  # bool[B, M]
    # float32[B, M, 5]: speed limit / 10 m/s, is it known, is it in an intersection, is it for bicycles, for buses
    facts: jax.Array


def _place(poses, heading: bool = True):
    """Features [..., 6 or 4] of poses [..., 3] in the frame of who looks."""
    xy = poses[..., :2]
    distance = jnp.sqrt(jnp.square(xy).sum(-1, keepdims=True) + 1e-6)
    parts = [jnp.clip(xy / 10, -3, 3), xy / (distance + 3)]
    if heading:
        parts += [jnp.cos(poses[..., 2:]), jnp.sin(poses[..., 2:])]
    return jnp.concatenate(parts, -1)


def between(poses, motion, others, their_motion, step):
    """Features [..., NUM_RELATION] of `others` with their last motion, [..., 3] each, seen from `poses` likewise.

    `step`: int32, broadcast: by how many anchors the other is later (below 0: earlier).
    """
    seen = relative(jnp, poses, others)
    # A motion is given in the frame in which it ended.
    speed = rotated(jnp, their_motion[..., :2], seen[..., 2]) - motion[..., :2]
    distance = jnp.sqrt(jnp.square(seen[..., :2]).sum(-1, keepdims=True) + 1e-6)
    nearing = -(seen[..., :2] * speed).sum(-1, keepdims=True) / (distance + 1)
    when = jnp.broadcast_to(jnp.asarray(step, jnp.float32)[..., None], distance.shape)
    parts = [_place(seen), jnp.log1p(distance) / 3, speed / 5, nearing / 5, when / 10, jnp.exp(when / 2)]
    return _padded(jnp.concatenate(parts, -1))


def to_lanes(poses, lanes: Lanes, lights):
    """Features [B, A, T, M, NUM_RELATION] of lanes seen from poses [B, A, T, 3]: the nearest point with the lane's
    direction there, the lane's end with its direction, the way left to it, and the light, int8[B, M, T]."""
    begin, end = lanes.points[:, :, :-1], lanes.points[:, :, 1:]
    edge = end - begin  # [B, M, P - 1, 2]
    length = jnp.sqrt(jnp.square(edge).sum(-1) + 1e-9)
    heading = jnp.arctan2(edge[..., 1], edge[..., 0])
    left = jnp.cumsum(length[..., ::-1], -1)[..., ::-1]  # from the beginning of each edge to the lane's end

    def from_edge(begin, edge, length):  # how far along an edge the nearest point lies, from 0 to 1, and where
        before = poses[:, :, :, None, :2] - begin
        share = jnp.clip((before * edge).sum(-1) / jnp.square(length), 0, 1)
        return share, begin + share[..., None] * edge, jnp.square(before - share[..., None] * edge).sum(-1)

    here = [(part[:, None, None, :, k] for part in (begin, edge, length)) for k in range(edge.shape[2])]
    away = jnp.stack([from_edge(*parts)[2] for parts in here], -1)  # [B, A, T, M, P - 1]
    number = away.argmin(-1)[..., None]
    edges = jnp.concatenate([begin, edge, length[..., None], left[..., None], heading[..., None]], -1)
    mine = jnp.take_along_axis(edges[:, None, None], number[..., None], axis=-2)[..., 0, :]
    share, foot, _ = from_edge(mine[..., :2], mine[..., 2:4], mine[..., 4])
    nearest = jnp.concatenate([foot, mine[..., 6:]], -1)
    last = jnp.concatenate([end[:, :, -1], heading[:, :, -1:]], -1)[:, None, None]
    way = (mine[..., 5] - share * mine[..., 4])[..., None]
    state = jnp.moveaxis(lights, 1, 2)[:, None, ..., None] == jnp.array([GREEN, YELLOW, RED], lights.dtype)
    state = jnp.broadcast_to(state, (*way.shape[:-1], 3)).astype(jnp.float32)
    here = poses[:, :, :, None]
    parts = [_place(relative(jnp, here, nearest)), _place(relative(jnp, here, last)), jnp.clip(way / 20, 0, 3),
             jnp.exp(-way / 5), state, state[..., 2:] * jnp.exp(-way / 10)]  # fmt: skip
    return _padded(jnp.concatenate(parts, -1))


def lane_facts(lanes: Lanes):
    """float32[B, M, NUM_LANE_FACTS]: what a lane is by itself: its length, its turn in all, its end from its
    beginning, and its facts."""
    edge = lanes.points[:, :, 1:] - lanes.points[:, :, :-1]
    heading = jnp.arctan2(edge[..., 1], edge[..., 0])
    length = jnp.sqrt(jnp.square(edge).sum(-1) + 1e-9).sum(-1, keepdims=True)
    turn = heading[..., -1:] - heading[..., :1]
    across = rotated(jnp, lanes.points[:, :, -1] - lanes.points[:, :, 0], -heading[..., 0])
    return jnp.concatenate([length / 50, jnp.sin(turn), across / 50, lanes.facts], -1)


def _padded(features):
    short = NUM_RELATION - features.shape[-1]
    return jnp.pad(features, [(0, 0)] * (features.ndim - 1) + [(0, short)])
