"""Motion tokens: half a second of motion is one of a few hundred templates, which are learned from the training data.

The templates come from k-disks (Philion et al. 2023, "Trajeglish", section 3.1): a motion drawn from the data becomes a
template, all motions within a radius of it are discarded, and so on. Tracks are tokenised step by step from where the
previous templates have led, so that errors do not add up (the same, section 3.2). To learn needs only numpy.
"""

from __future__ import annotations

import numpy as np

from aurora_train.errors import UserError

TOKEN_STEPS = 5  # of 0.1 s in a token
TOKEN_S = 0.1 * TOKEN_STEPS
# RMS distance of a car's corners (4.6 m by 1.9 m) from its centre: what a radian of heading weighs against a metre.
LEVER_M = float(np.sqrt(4.6**2 + 1.9**2) / 2)
CANDIDATES = 20_000  # motions that are looked at to learn templates
HALVINGS = 14  # of the interval in which the radius is searched


def learn(motions: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` templates of motions, float32[count or N, TOKEN_STEPS, 3] in the frame of their beginning.

    The radius of the disks is the largest at which the motions still yield `count` of them, found by bisection: the
    templates then cover rare motions as well as frequent ones. UserError if the motions differ too little.
    """
    order = np.random.default_rng(seed).permutation(len(motions))[:CANDIDATES]
    motions = motions[order]
    ends = motions[:, -1].astype(np.float64)
    if len(np.unique(ends, axis=0)) < count:
        raise UserError(
            f"the training data hold only {len(np.unique(ends, axis=0))} different motions of {TOKEN_S:g} s",
            where="model.tokens", hint="a smaller number, or more scenes",
        )  # fmt: skip
    small, large = 0.0, 50.0
    for _ in range(HALVINGS):
        middle = (small + large) / 2
        small, large = (middle, large) if len(_disks(ends, middle, count)) == count else (small, middle)
    return motions[_disks(ends, small, count)].astype(np.float32)


def _disks(ends: np.ndarray, radius: float, most: int) -> np.ndarray:
    """Indices of at most `most` motions, none of which ends within `radius` of another's end."""
    chosen, left = [], np.arange(len(ends))
    while len(left) and len(chosen) < most:
        chosen.append(left[0])
        left = left[distances(np, ends[left[0]], ends[left]) > radius]
    return np.array(chosen)


def distances(xp, poses, others):
    """RMS distance in metres between the corners of a car's box at poses and others [..., 3] (x, y, heading).

    With corners c_k that lie around the centre and their mean square LEVER_M^2 this is, exactly,
    sqrt(|p - q|^2 + 2 LEVER_M^2 (1 - cos(difference of headings))). `xp`: numpy or jax.numpy.
    """
    shift = poses[..., :2] - others[..., :2]
    turn = 2 * LEVER_M**2 * (1 - xp.cos(poses[..., 2] - others[..., 2]))
    return xp.sqrt(xp.square(shift).sum(-1) + xp.maximum(turn, 0))


def motions_of(states: np.ndarray, valid: np.ndarray, last: int) -> np.ndarray:
    """All motions of tracks float32[..., T, 5], valid bool[..., T], between anchors; float32[N, TOKEN_STEPS, 3].

    The anchors are the steps `last`, `last` - 5, `last` + 5, and so on (`anchors`).
    """
    found = []
    at = anchors(states.shape[-2], last)
    for begin in at[:-1]:
        whole = valid[..., begin : begin + TOKEN_STEPS + 1].all(-1)
        path = states[whole][..., begin : begin + TOKEN_STEPS + 1, :3].astype(np.float64)
        found.append(relative(np, path[:, :1], path[:, 1:]))
    return np.concatenate(found).astype(np.float32)


def anchors(steps: int, last: int) -> np.ndarray:
    """The steps at which tokens begin and end: every fifth, so that `last` is one of them."""
    return np.arange(last % TOKEN_STEPS, steps, TOKEN_STEPS)


# Poses, [..., 3] of x, y, heading; `xp` is numpy or jax.numpy


def relative(xp, frame, poses):
    """Poses seen from `frame`; the heading lies in [-pi, pi)."""
    shift, turn = poses[..., :2] - frame[..., :2], poses[..., 2] - frame[..., 2]
    turn = (turn + np.pi) % (2 * np.pi) - np.pi
    return xp.concatenate([rotated(xp, shift, -frame[..., 2]), turn[..., None]], axis=-1)


def moved(xp, frame, poses):
    """Poses given in `frame`, in the frame in which `frame` is given: the inverse of `relative`."""
    shift = rotated(xp, poses[..., :2], frame[..., 2])
    return xp.concatenate([frame[..., :2] + shift, (frame[..., 2] + poses[..., 2])[..., None]], axis=-1)


def rotated(xp, points, angle):
    """Points [..., 2] turned by angles [...]."""
    cos, sin = xp.cos(angle), xp.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return xp.stack([x * cos - y * sin, x * sin + y * cos], axis=-1)


# In jax


def tokenised(templates, poses, valid, noise=0.0, keys=None):
    """Tracks as tokens, step by step from where the previous ones have led.

    Args:
        templates: float32[V, TOKEN_STEPS, 3].
        poses: float32[B, A, T, 3] at the anchors; valid: bool[B, A, T].
        noise: metres. With `keys` (key[B]), the template of a step is drawn with weights exp(-distance / noise), so
            that a model learns to come back to the road from where its own errors would lead.

    Returns:
        reached: float32[B, A, T, 3], where the templates led; the pose itself where a track begins.
        taken: int32[B, A, T], the template that led there; V where a track begins or is not observed.
        nearest: int32[B, A, T], the template that would have come nearest to the true pose; V likewise.
    """
    import jax
    import jax.numpy as jnp

    ends, count = jnp.asarray(templates)[:, -1], len(templates)

    def step(before, now):
        reached, was_valid = before
        pose, is_valid, key = now
        off = distances(jnp, relative(jnp, reached, pose)[..., None, :], ends)  # [B, A, V]
        nearest = taken = off.argmin(-1).astype(jnp.int32)
        if keys is not None and noise:
            taken = jax.vmap(lambda k, d: jax.random.categorical(k, -d / noise))(key, off).astype(jnp.int32)
        goes_on = was_valid & is_valid
        reached = jnp.where(goes_on[..., None], moved(jnp, reached, ends[taken]), pose)
        taken, nearest = (jnp.where(goes_on, token, count) for token in (taken, nearest))
        return (reached, is_valid), (reached, taken, nearest)

    poses, valid = jnp.moveaxis(poses, 2, 0), jnp.moveaxis(valid, 2, 0)
    steps = jnp.arange(len(poses))
    every = None if keys is None else jax.vmap(lambda t: jax.vmap(lambda k: jax.random.fold_in(k, t))(keys))(steps)
    start = (poses[0], jnp.zeros_like(valid[0]))
    _, found = jax.lax.scan(step, start, (poses, valid, every))
    return tuple(jnp.moveaxis(each, 0, 2) for each in found)
