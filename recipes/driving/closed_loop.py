"""Driving in closed loop, in jax: a world to `reset` and `step`, and rollouts of all agents inside one program.

The ego car is a kinematic bicycle that a policy accelerates and steers; the other agents replay the log or are moved by
the caller, such as by a model. All functions of the world are for one scene: `jax.vmap` makes them many.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aurora_train.generate.drawing import draw
from driving.agents import Agents, Seen
from driving.scenes import STEP_S
from driving.tokens import TOKEN_STEPS, distances, moved, relative, rotated

# What a car can do: m/s2 along and across, rad of the front wheels; its wheelbase as a share of its length.
HARDEST_BRAKING, HARDEST_ACCELERATION, MOST_SIDEWAYS, MOST_STEERING, WHEELBASE = 8.0, 4.0, 6.0, 0.6, 0.6


class Log(NamedTuple):
    """What was recorded of a scene. The ego is agent 0."""

    states: jax.Array  # float32[A, T, 5]: x, y, heading, vx, vy; 0 where not valid
    valid: jax.Array  # bool[A, T]
    sizes: jax.Array  # float32[A, 2]


class State(NamedTuple):
    """The world at one step."""

    step: jax.Array  # int32: the step of the log
    agents: jax.Array  # float32[A, 5]
    present: jax.Array  # bool[A]
    collided: jax.Array  # bool: whether the ego has touched another agent so far


class Action(NamedTuple):
    """What a policy asks of the ego: m/s2, and radians of the front wheels, to the left."""

    acceleration: jax.Array
    steering: jax.Array


def reset(log: Log, step) -> State:
    """The world as the log has it at `step`. Who touches the ego there already is no fault of a policy."""
    return State(jnp.int32(step), log.states[:, step], log.valid[:, step], jnp.bool_(False))


def step(log: Log, state: State, action: Action, others=None) -> State:
    """The world 0.1 s later. `others`: float32[A, 5] and bool[A] for the agents but the ego; None replays the log."""
    now = state.step + 1
    agents, present = (log.states[:, now], log.valid[:, now]) if others is None else others
    agents = agents.at[0].set(bicycle(state.agents[0], action, log.sizes[0, 0]))
    present = present.at[0].set(state.present[0])
    return State(now, agents, present, state.collided | ego_touches(log, agents, present))


def ego_touches(log: Log, agents, present):
    """bool: whether the ego's box overlaps that of another agent, of agents float32[A, 5] and present bool[A]."""
    return (touching(agents[0], log.sizes[0], agents[1:], log.sizes[1:]) & present[1:]).any() & present[0]


def bicycle(car, action: Action, length):
    """float32[5] after 0.1 s of a kinematic bicycle.

    Kong et al. 2015 ("Kinematic and Dynamic Vehicle Models for Autonomous Driving Control Design"), eq. 1 with l_r = 0:
    what is steered moves where it points, as recorded boxes do. A car does not drive backwards.
    """
    acceleration = jnp.clip(action.acceleration, -HARDEST_BRAKING, HARDEST_ACCELERATION)
    before = jnp.hypot(car[3], car[4])
    grip = jnp.arctan(MOST_SIDEWAYS * WHEELBASE * length / jnp.maximum(jnp.square(before), 1.0))
    most = jnp.minimum(MOST_STEERING, grip)  # with more its tyres would slide
    steering = jnp.clip(action.steering, -most, most)
    after = jnp.maximum(before + acceleration * STEP_S, 0.0)
    way = (before + after) / 2 * STEP_S
    turn = way * jnp.tan(steering) / (WHEELBASE * length)
    course, heading = car[2] + turn / 2, car[2] + turn
    xy = car[:2] + way * jnp.stack([jnp.cos(course), jnp.sin(course)])
    return jnp.concatenate([xy, heading[None], after * jnp.stack([jnp.cos(heading), jnp.sin(heading)])])


def follow(car, path, left, length) -> Action:
    """The action that takes a car float32[5] along a path float32[TOKEN_STEPS, 3] with `left` poses still ahead.

    The speed is that of the path's next step, and the curvature leads to its last pose (pure pursuit, Coulter 1992).
    """
    index = TOKEN_STEPS - left
    before = jnp.where(index > 0, path[index - 1, :2], car[:2])
    speed = jnp.hypot(*(path[index, :2] - before)) / STEP_S
    ahead = rotated(jnp, path[-1, :2] - car[:2], -car[2])
    distance = jnp.maximum(jnp.square(ahead).sum(), 1.0)
    curvature = jnp.where(ahead[0] > 0.5, 2 * ahead[1] / distance, 0.0)
    acceleration = (speed - jnp.hypot(car[3], car[4])) / STEP_S
    return Action(acceleration, jnp.arctan(curvature * WHEELBASE * length))


def touching(box, size, others, sizes):
    """bool[N]: which boxes, states [N, 3 or more] and sizes [N, 2], overlap one box (separating axes)."""

    def reaches(frame, frame_size, pose, pose_size):  # neither axis of `frame` separates the two boxes
        seen = relative(jnp, frame[..., :3], pose[..., :3])
        cos, sin = jnp.abs(jnp.cos(seen[..., 2])), jnp.abs(jnp.sin(seen[..., 2]))
        half = jnp.stack([pose_size[..., 0] * cos + pose_size[..., 1] * sin,
                          pose_size[..., 0] * sin + pose_size[..., 1] * cos], -1)  # fmt: skip
        return (jnp.abs(seen[..., :2]) < (half + frame_size) / 2).all(-1)

    box, size = jnp.broadcast_to(box, others.shape), jnp.broadcast_to(size, sizes.shape)
    return reaches(box, size, others, sizes) & reaches(others, sizes, box, size)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def drive(policy, log: Log, first: int, steps: int):
    """Scenes [B, ...] in which `policy(state, log) -> Action` drives and the others replay the log.

    Returns the ego's states float32[B, steps, 5] after `first`, and whether it collided, bool[B].
    """

    def one(log):
        def on(state, _):
            state = step(log, state, policy(state, log))
            return state, state.agents[0]

        last, path = jax.lax.scan(on, reset(log, first), None, length=steps)
        return path, last.collided

    return jax.vmap(one)(log)


def straight_on(state: State, log: Log) -> Action:
    """The policy that changes nothing: constant velocity."""
    return Action(jnp.float32(0), jnp.float32(0))


class Cast(NamedTuple):
    """Who moves whom in a rollout. Agents that are in neither follow the model's templates."""

    replayed: jax.Array  # bool[B, A]: agents that replay the log
    steered: jax.Array  # bool[B]: whether the ego follows its templates as a car that is steered


class Turn(NamedTuple):
    """What a rollout carries from one token to the next."""

    state: State  # of B scenes
    seen: Seen  # the last anchor, T = 1
    logits: jax.Array  # float32[B, A, V]: of the next templates
    memory: Any


def rollout(model, templates, agents: Agents, seen: Seen, log: Log, cast: Cast, keys, knobs, number: int):
    """`number` tokens of all agents together, drawn one after the other from the model.

    Args:
        seen: the history's anchors, with the lights of the future as well; log: the recording, [B, ...], which ends
            `number` tokens after the last anchor, and whose future is read for replayed agents alone.
        keys: key[B]; knobs: `aurora_train.generate.drawing.Knobs`.

    Returns the states float32[B, A, 5 number, 5], whether each agent is there bool[B, A, 5 number], and whether the ego
    collided bool[B].
    """
    history = seen.poses.shape[2]
    first = log.states.shape[2] - number * TOKEN_STEPS - 1  # the step of the last anchor
    begin = jax.vmap(lambda one: reset(one, first))(log)
    past = seen._replace(lights=seen.lights[:, :, :history])
    logits, memory = model.extend(agents, past, model.empty(agents, history + number), 0)
    last = Seen(*(part[:, :, -1:] for part in past))

    def on(turn: Turn, count):
        taken = _drawn(turn.logits, keys, count, knobs)
        state, path, present = _moved(turn, templates, agents, log, cast, taken)
        lights = jax.lax.dynamic_slice_in_dim(seen.lights, history + count, 1, axis=2)
        now = _seen(templates, turn.seen, state, taken, cast, lights)
        logits, memory = model.extend(agents, now, turn.memory, history + count)
        return Turn(state, now, logits[:, :, -1], memory), (path, present)

    start = Turn(begin, last, logits[:, :, -1], memory)
    end, (path, present) = jax.lax.scan(on, start, jnp.arange(number))
    joined = [jnp.moveaxis(part, 0, 2).reshape(*part.shape[1:3], -1, *part.shape[4:]) for part in (path, present)]
    return *joined, end.state.collided


def _drawn(logits, keys, count, knobs):
    """Templates int32[B, A]: agent a of a scene draws with the scene's key folded with a, then with the count."""
    batch, number, vocabulary = logits.shape
    each = jax.vmap(lambda key: jax.vmap(lambda a: jax.random.fold_in(key, a))(jnp.arange(number)))(keys)
    return draw(logits.reshape(-1, vocabulary), each.reshape(-1), count, knobs).reshape(batch, number)


def _moved(turn: Turn, templates, agents: Agents, log: Log, cast: Cast, taken):
    """The worlds after a token: (states, path float32[B, A, TOKEN_STEPS, 5], present bool[B, A, TOKEN_STEPS])."""
    now = turn.seen.poses[:, :, 0]
    wanted = moved(jnp, now[:, :, None], templates[taken])  # [B, A, TOKEN_STEPS, 3]
    whole = jnp.concatenate([now[:, :, None], wanted], 2)
    planned = jnp.concatenate([wanted, (whole[:, :, 1:, :2] - whole[:, :, :-1, :2]) / STEP_S], -1)
    there = jnp.broadcast_to(turn.state.present[..., None], planned.shape[:-1])

    def one(log, state, planned, there, replayed, steered):
        def on(state, k):
            at = state.step + 1
            others = (jnp.where(replayed[:, None], log.states[:, at], planned[:, k]),
                      jnp.where(replayed, log.valid[:, at], there[:, k]))  # fmt: skip
            action = follow(state.agents[0], planned[0, :, :3], TOKEN_STEPS - k, log.sizes[0, 0])
            after = step(log, state, action, others)
            free = State(at, *others, state.collided | ego_touches(log, *others))
            after = jax.tree.map(lambda a, b: jnp.where(steered, a, b), after, free)
            return after, (after.agents, after.present)

        state, (path, present) = jax.lax.scan(on, state, jnp.arange(TOKEN_STEPS))
        return state, jnp.moveaxis(path, 0, 1), jnp.moveaxis(present, 0, 1)

    return jax.vmap(one)(log, turn.state, planned, there, cast.replayed, cast.steered)


def _seen(templates, before: Seen, state: State, taken, cast: Cast, lights) -> Seen:
    """What the model sees of the worlds: who follows the templates did the one that was taken, for others the nearest
    one counts."""
    pose = state.agents[..., :3]
    went = relative(jnp, before.poses[:, :, 0], pose)
    ends = templates[:, -1]
    nearest = distances(jnp, went[:, :, None], ends).argmin(-1).astype(jnp.int32)
    other = cast.replayed.at[:, 0].set(cast.replayed[:, 0] | cast.steered)
    goes_on = before.valid[:, :, 0] & state.present
    token = jnp.where(goes_on, jnp.where(other, nearest, taken), len(ends))
    new = jnp.concatenate([rotated(jnp, state.agents[..., 3:], -pose[..., 2]) * STEP_S * TOKEN_STEPS,
                           jnp.zeros_like(pose[..., 2:])], -1)  # fmt: skip
    motion = jnp.where(goes_on[..., None], in_end_frame(went), new)
    return Seen(pose[:, :, None], motion[:, :, None], token[:, :, None], state.present[:, :, None], lights)


def in_end_frame(went):
    """A motion [..., 3] given in the frame of its beginning, in the frame of its end."""
    return jnp.concatenate([rotated(jnp, went[..., :2], -went[..., 2]), went[..., 2:]], -1)
