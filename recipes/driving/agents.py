"""The network that drives: agents x time attention and cross-attention to lanes, all by relative poses.

Every attention sees keys only through their content and through features of the pair (where the key is, seen from the
query), as in Shaw et al. 2018 ("Self-Attention with Relative Position Representations"). The frame of the world never
enters, so that a scene may be turned and shifted (Zhou et al. 2023, "Query-Centric Trajectory Prediction").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aurora_train.nn import param
from aurora_train.nn.linear import linear
from aurora_train.nn.mlp import activate
from aurora_train.nn.norms import Norm
from aurora_train.nn.stack import Stack
from driving.relations import NUM_LANE_FACTS, NUM_RELATION, Lanes, between, lane_facts, to_lanes
from driving.scenes import KINDS


class Seen(NamedTuple):
    """Agents at T anchors, 0.5 s apart. What is not valid is seen by nobody."""

    poses: jax.Array  # float32[B, A, T, 3]: x, y (m), heading (rad)
    motion: jax.Array  # float32[B, A, T, 3]: of the last 0.5 s, in the frame in which it ended
    token: jax.Array  # int32[B, A, T]: the template of that motion; V if there is none
    valid: jax.Array  # bool[B, A, T]
    lights: jax.Array  # int8[B, M, T]: the light of each lane


class Agents(NamedTuple):
    """What does not change in a scene. `kinds`: int32[B, A], indices of KINDS. `sizes`: float32[B, A, 2] in metres."""

    kinds: jax.Array
    sizes: jax.Array
    lanes: Lanes


class Memory(NamedTuple):
    """What a rollout keeps of S anchors: keys and values of every unit, and the poses that they belong to."""

    caches: Any
    poses: jax.Array  # float32[B, A, S, 3]
    motion: jax.Array  # float32[B, A, S, 3]
    valid: jax.Array  # bool[B, A, S]


class Context(NamedTuple):
    """Pairs' features [..., queries, keys, F] and masks [..., queries, keys] of the three attentions of a unit."""

    over_time: tuple[jax.Array, jax.Array]  # [B, A, T, S]
    to_lanes: tuple[jax.Array, jax.Array]  # [B, A T, M]
    to_agents: tuple[jax.Array, jax.Array]  # [B, T, A, A]
    lanes: jax.Array  # [B, M, width]
    start: jax.Array  # int32 scalar: the anchor of the first query, with a cache


class RelativeAttention(nnx.Module):
    """Queries x[..., Q, D] over keys [..., K, H, D / H] and their pairs' features [..., Q, K, F]; [..., Q, D] out.

    The logit of a pair is q . k / sqrt(D / H) + u . f, with u [H, F] a second projection of the query; its weight is
    given to the value and to f. A query without a visible key gets zeros.
    """

    def __init__(self, width: int, heads: int, features: int, gain: float, rngs: nnx.Rngs):
        self.heads = heads
        self.query = param.kernel(rngs, (width, width), ("embed", "heads"))
        self.key = param.kernel(rngs, (width, width), ("embed", "heads"))
        self.value = param.kernel(rngs, (width, width), ("embed", "heads"))
        self.pair = param.kernel(rngs, (width, heads * features), ("embed", "heads"))
        self.out = param.kernel(rngs, (width + heads * features, width), ("heads", "embed"), gain=gain)

    def read(self, source):
        """Keys and values, [..., K, H, D / H] each, of [..., K, D]."""
        split = (*source.shape[:-1], self.heads, -1)
        return linear(source, self.key[...]).reshape(split), linear(source, self.value[...]).reshape(split)

    def __call__(self, x, key, value, pairs):
        features, visible = pairs
        query = linear(x, self.query[...]).reshape(*x.shape[:-1], self.heads, -1)
        wish = linear(x, self.pair[...]).reshape(*x.shape[:-1], self.heads, -1)
        logits = jnp.einsum("...qhd,...khd->...hqk", query, key).astype(jnp.float32) * query.shape[-1] ** -0.5
        logits += jnp.einsum("...qhf,...qkf->...hqk", wish, features).astype(jnp.float32)
        visible = visible[..., None, :, :]
        logits = jnp.where(visible, logits, -1e9)
        weights = jnp.where(visible, jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))), 0)
        weights = (weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)).astype(x.dtype)
        read = jnp.einsum("...hqk,...khd->...qhd", weights, value)
        felt = jnp.einsum("...hqk,...qkf->...qhf", weights, features)
        flat = (*x.shape[:-1], -1)
        return linear(jnp.concatenate([read.reshape(flat), felt.reshape(flat)], -1), self.out[...])


class SceneUnit(nnx.Module):
    """x[B, A, T, D]: each agent's past, the lanes, the other agents at the same time, then an MLP; norms before."""

    tags = ("time_out", "lane_out", "agent_out", "mlp_up", "mlp_act")

    def __init__(self, width: int, heads: int, features: int, layers: int, rngs: nnx.Rngs):
        gain = (8 * layers) ** -0.5  # four sums into the residual stream in each unit (GPT-2)
        self.time_norm, self.lane_norm, self.agent_norm, self.mlp_norm = (Norm(width) for _ in range(4))
        self.time, self.lane, self.agent = (RelativeAttention(width, heads, features, gain, rngs) for _ in range(3))
        self.up = param.kernel(rngs, (width, 4 * width), ("embed", "mlp"))
        self.down = param.kernel(rngs, (4 * width, width), ("mlp", "embed"), gain=gain)

    def __call__(self, x, context: Context, index, keys=None, cache=None):
        normed = self.time_norm(x)
        key, value = self.time.read(normed)
        if cache is not None:
            at = (0, 0, context.start, 0, 0)
            cache = tuple(jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
                          for old, new in zip(cache, (key, value), strict=True))  # fmt: skip
            key, value = cache
        x = x + checkpoint_name(self.time(normed, key, value, context.over_time), "time_out")
        flat = self.lane_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        seen = self.lane(flat, *self.lane.read(context.lanes), context.to_lanes)
        x = x + checkpoint_name(seen.reshape(x.shape), "lane_out")
        normed = self.agent_norm(x).swapaxes(1, 2)
        seen = self.agent(normed, *self.agent.read(normed), context.to_agents)
        x = x + checkpoint_name(seen.swapaxes(1, 2), "agent_out")
        hidden = checkpoint_name(linear(self.mlp_norm(x), self.up[...]), "mlp_up")
        hidden = checkpoint_name(activate("gelu", hidden), "mlp_act")
        return x + linear(hidden, self.down[...]), cache


class Small(nnx.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, rngs: nnx.Rngs):
        self.first = param.kernel(rngs, (inputs, hidden), ("inputs", "embed"))
        self.bias = param.zeros(hidden, "embed")
        self.second = param.kernel(rngs, (hidden, outputs), ("embed", "outputs"))

    def __call__(self, x):
        return linear(activate("gelu", linear(x, self.first[...], self.bias[...])), self.second[...])


class Driver(nnx.Module):
    """Agents so far -> scores of each agent's next template, float32[B, A, T, V]. Causal in time."""

    def __init__(self, *, width: int, layers: int, heads: int, relation: int, tokens: int, dtype: str, rngs: nnx.Rngs):
        self.num_tokens, self.heads, self.dtype = tokens, heads, dtype
        self.templates = param.table(rngs, (tokens + 1, width), ("vocab", "embed"))
        self.kinds = param.table(rngs, (len(KINDS), width), ("kinds", "embed"))
        self.enter = Small(5, width, width, rngs)
        self.lane = Small(NUM_LANE_FACTS, width, width, rngs)
        self.relate = nnx.List([Small(NUM_RELATION, 2 * relation, relation, rngs) for _ in range(3)])
        self.stack = Stack(lambda rngs: SceneUnit(width, heads, relation, layers, rngs), layers, rngs)
        self.final_norm = Norm(width)
        self.head = param.kernel(rngs, (width, tokens), ("embed", "vocab"))
        self.head_bias = param.zeros(tokens, "vocab")

    def __call__(self, agents: Agents, seen: Seen):
        """All anchors at once, as in training."""
        causal = jnp.tril(jnp.ones((seen.poses.shape[2],) * 2, bool))
        x, _, _ = self.stack(self._entered(agents, seen), self._context(agents, seen, seen, causal, 0))
        return self._left(x)

    def empty(self, agents: Agents, length: int) -> Memory:
        """A memory for `length` anchors."""
        shape = (*agents.kinds.shape, length)
        one = (*shape, self.heads, self.head.shape[0] // self.heads)
        caches = [jnp.zeros((part.stop - part.start, *one), self.dtype) for part in self.stack.plan]
        poses = jnp.zeros((*shape, 3))
        return Memory([(cache, cache) for cache in caches], poses, poses, jnp.zeros(shape, bool))

    def extend(self, agents: Agents, seen: Seen, memory: Memory, start):
        """T more anchors, of which the first is number `start`. Returns (scores, memory)."""

        def written(name):
            new, old = getattr(seen, name), getattr(memory, name)
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, start, 0)[: old.ndim])

        memory = memory._replace(**{name: written(name) for name in ("poses", "motion", "valid")})
        number, length = seen.poses.shape[2], memory.valid.shape[2]
        causal = jnp.arange(length) <= start + jnp.arange(number)[:, None]
        context = self._context(agents, seen, memory, causal, start)
        x, caches, _ = self.stack(self._entered(agents, seen), context, caches=memory.caches)
        return self._left(x), memory._replace(caches=caches)

    def _entered(self, agents, seen):
        size = jnp.broadcast_to((agents.sizes / 5)[:, :, None], (*seen.token.shape, 2))
        moving = jnp.concatenate([seen.motion[..., :2] / 5, 3 * seen.motion[..., 2:], size], -1).astype(self.dtype)
        x = self.enter(moving) + self.templates[...][seen.token].astype(self.dtype)
        return x + self.kinds[...][agents.kinds][:, :, None].astype(self.dtype)

    def _left(self, x):
        return linear(self.final_norm(x).astype(jnp.float32), self.head[...], self.head_bias[...])

    def _context(self, agents, seen, past, causal, start) -> Context:
        batch, count, number = seen.valid.shape
        step = jnp.arange(past.valid.shape[2]) - (start + jnp.arange(number))[:, None]  # anchors ago, below 0
        over_time = between(seen.poses[:, :, :, None], seen.motion[:, :, :, None], past.poses[:, :, None],
                            past.motion[:, :, None], step)  # fmt: skip
        now = [jnp.swapaxes(part, 1, 2) for part in (seen.poses, seen.motion)]  # [B, T, A, 3]
        to_agents = between(now[0][:, :, :, None], now[1][:, :, :, None], now[0][:, :, None], now[1][:, :, None], 0)
        raw = to_lanes(seen.poses, agents.lanes, seen.lights).reshape(batch, count * number, -1, NUM_RELATION)
        features = [small(part.astype(self.dtype))
                    for small, part in zip(self.relate, (over_time, raw, to_agents), strict=True)]  # fmt: skip
        valid = jnp.swapaxes(seen.valid, 1, 2)[:, :, None]
        others = jnp.broadcast_to(valid & ~jnp.eye(count, dtype=bool), to_agents.shape[:-1])
        lanes = jnp.broadcast_to(agents.lanes.valid[:, None], raw.shape[:-1])
        before = jnp.broadcast_to(past.valid[:, :, None] & causal, over_time.shape[:-1])
        static = self.lane(lane_facts(agents.lanes).astype(self.dtype))
        pairs = [(f, mask) for f, mask in zip(features, (before, lanes, others), strict=True)]
        return Context(*pairs, static, jnp.int32(start))
