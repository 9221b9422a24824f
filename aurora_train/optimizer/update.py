"""Builds one optimizer from the config: an optax transformation for the direction, a schedule for the step's length.

Everything works on one layer at a time with its own index: the stacked parameters of a stack are vmapped over, and the
global norm is summed per layer in layer order. If a stack were treated as one leaf, Adafactor's factors, Muon's
orthogonal update and an `ndim` mask would each be wrong, and the norm would change bits with the cut of the stack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aurora_train.errors import UserError
from aurora_train.learning_rate import rate
from aurora_train.nn.stack import SEGMENTS
from aurora_train.optimizer import rounding
from aurora_train.optimizer.directions import make_direction
from aurora_train.optimizer.moments import dotted, make_format
from aurora_train.optimizer.stacks import global_norm, join, partition, segments_of
from aurora_train.random import stream


class Optimizer(NamedTuple):
    """`init(params) -> state`; `update(grads, state, params, step, good=None) -> (params, state, info)`.

    `info` has `grad_norm` (before clipping) and `lr`, float32 scalars. If `good` (bool scalar) is given and false, or
    is given and the norm is not finite, parameters and state stay as they were. A guard inside the update costs
    nothing; one around it would keep the old state alive beside the new one if units are updated in turn.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any, dict]]
    schedule: Callable[[Any], Any]  # the learning rate of a step (0-based), float32
    stored: Callable[[Any], Any] = lambda params: params  # freshly drawn parameters in the format of `optimizer.master`


def build(config, total_steps: int, seed: int = 0) -> Optimizer:
    """The optimizer of `config.optimizer` for a run of `total_steps` updates. `seed` moves stochastic rounding only.

    Raises UserError for a format of moments that the rule cannot use.
    """
    _refuse_nonsense(config)
    schedule = functools.partial(rate, peak=config.lr, config=config.schedule, total_steps=total_steps, numbers=jnp)
    direction, stored_as = make_direction(config), make_format(config.moments)
    over_units = _in_turn if config.name == "muon" else jax.vmap

    def start(params):
        return stored_as.empty(direction(params).init(_wide(params)))

    @jax.jit  # so that arrays of which only the shape is read are never allocated
    def init(params):
        rest, stacks = partition(params)
        stacks = {name: _each_segment(jax.vmap(start), stack) for name, stack in stacks.items()}
        return {"rest": start(rest), "stacks": stacks}

    def update(grads, state, params, step, good=None):
        norm = global_norm(grads)
        scale = jnp.float32(1.0) if config.clip is None else jnp.minimum(1.0, config.clip / (norm + 1e-6))
        good = None if good is None else good & jnp.isfinite(norm)

        def rule_of(stack: str):
            noise = functools.partial(_noise, seed, stack, step)
            return _make_rule(direction, stored_as, schedule(step), scale, good, noise)

        (rest, stacks), (rest_grads, stack_grads) = partition(params), partition(grads)
        rest, rest_state = rule_of("")(rest_grads, state["rest"], rest, jnp.uint32(0))
        new_stacks, new_states = {}, {}
        for name, stack in stacks.items():
            run = over_units(rule_of(name))
            both = _each_segment(run, stack_grads[name], state["stacks"][name], stack, _numbers(stack))[SEGMENTS]
            new_stacks[name] = {SEGMENTS: {i: new for i, (new, _) in both.items()}}
            new_states[name] = {SEGMENTS: {i: new for i, (_, new) in both.items()}}
        info = {"grad_norm": norm, "lr": schedule(step)}
        return join(rest, new_stacks), {"rest": rest_state, "stacks": new_states}, info

    return Optimizer(init, update, schedule, functools.partial(stored, config=config))


def _make_rule(direction, stored_as, lr, scale, good, noise):
    """The update of one unit, `(grads, state, params, index) -> (params, state)`; index is uint32 and absolute.

    `noise(index)` gives the unit's key words by leaf name; they are traced only if something is rounded with them.
    """

    def apply(grads, state, params, index):
        grads, wide = jax.tree.map(lambda g: g * scale, grads), _wide(params)
        updates, new_state = stored_as.advance(
            lambda state: direction(params).update(grads, state, wide), state, noise(index)
        )
        new = _rounded_like(params, jax.tree.map(lambda p, u: p - lr * u, wide, updates), noise(index))
        return (new, new_state) if good is None else _chosen(good, (new, new_state), (params, state))

    return apply


def _noise(seed: int, stack: str, step, index):
    key = jax.random.fold_in(stream(seed, f"rounding.{stack}"), step)
    return lambda names: rounding.words(jax.random.fold_in(key, index), names)


def stored(params, config):
    """Freshly drawn parameters in the format that `config.master` asks for."""
    return jax.tree.map(lambda p: p.astype(config.master), params)


def _refuse_nonsense(config) -> None:
    if config.name == "adafactor" and config.moments != "float32":
        raise UserError(
            f"adafactor has no full moments to store as {config.moments}", where="optimizer.moments",
            why="its second moment is two vectors for each matrix, and it has no first",
            hint="leave out optimizer.moments, or use adamw, muon or lion",
        )


def _each_segment(function, *stacks: dict) -> dict:
    """`function` of each segment of some stacks with the same segments, as a stack."""
    return {SEGMENTS: {i: function(*(stack[SEGMENTS][i] for stack in stacks)) for i, _ in segments_of(stacks[0])}}


def _numbers(stack: dict) -> dict:
    """The absolute index of each unit, uint32[units], by segment, as a stack."""
    numbers, first = {}, 0
    for i, segment in segments_of(stack):
        count = jax.tree.leaves(segment)[0].shape[0]
        numbers[i] = jnp.arange(first, first + count, dtype=jnp.uint32)
        first += count
    return {SEGMENTS: numbers}


def _in_turn(apply):
    """Like `jax.vmap(apply)`, but one unit after another and in place: the Newton-Schulz iterates of a whole stack are
    larger than its moments. A scan would write its results beside the stack that it reads. The barrier separates a
    unit's kernels as a loop would, whatever the number of iterations.
    """

    def run(grads, state, params, indices):
        def one(i, carry):
            unit = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), (grads, *carry, indices))
            new_params, new_state = jax.lax.optimization_barrier(apply(*unit))
            return jax.tree.map(
                lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, i, 0), carry,
                (new_state, new_params),
            )

        state, params = jax.lax.fori_loop(0, indices.shape[0], one, (state, params))
        return params, state

    return run


def _wide(params):
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def _rounded_like(params, new, noise):
    """float32 results in the format of the parameters, bfloat16 ones rounded with a mean error of zero."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    half = [f"param.{dotted(path)}" for path, p in leaves if p.dtype == jnp.bfloat16]
    words = noise(half) if half else {}

    def one(path, p, value):
        if p.dtype != jnp.bfloat16:
            return value.astype(p.dtype)
        return rounding.to_bfloat16(value, rounding.bits(words[f"param.{dotted(path)}"], p.shape))

    return jax.tree_util.tree_map_with_path(one, params, new)


def _chosen(good, new, old):
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
