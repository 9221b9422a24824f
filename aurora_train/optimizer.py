"""Config -> one optimizer: an optax transformation for the direction, a schedule for the length of the step.

Everything works on one layer at a time with its own index: the stacked parameters of a stack are vmapped over, and
the global norm is summed per layer in layer order. Stacked as one leaf, Adafactor's factors, Muon's orthogonal
update and an `ndim` mask would each be wrong, and the norm would change bits with the cut of the stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aurora_train.nn.stack import SEGMENTS, is_stack


class Optimizer(NamedTuple):
    """`init(params) -> state`; `update(grads, state, params, step) -> (params, state, info)`.

    `info` has `grad_norm` (before clipping) and `lr`, float32 scalars.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, Any], tuple[Any, Any, dict]]
    schedule: Callable[[Any], Any]


def build(config, total_steps: int) -> Optimizer:
    """The optimizer of `config.optimizer` for a run of `total_steps` updates."""
    schedule = make_schedule(config.lr, config.schedule, total_steps)
    direction = _direction(config)

    def start(params):
        return direction(params).init(params)

    def init(params):
        rest, stacks = partition(params)
        return {
            "rest": start(rest),
            "stacks": {
                name: {SEGMENTS: {i: jax.vmap(start)(segment) for i, segment in stack[SEGMENTS].items()}}
                for name, stack in stacks.items()
            },
        }

    def update(grads, state, params, step):
        norm = global_norm(grads)
        scale = jnp.float32(1.0)
        if config.clip is not None:
            scale = jnp.minimum(1.0, config.clip / (norm + 1e-6))
        lr = schedule(step)

        def apply(grads, state, params):
            grads = jax.tree.map(lambda g: g * scale, grads)
            updates, state = direction(params).update(grads, state, params)
            return jax.tree.map(lambda p, u: (p - lr * u).astype(p.dtype), params, updates), state

        (rest, stacks), (rest_grads, stack_grads) = partition(params), partition(grads)
        rest, rest_state = apply(rest_grads, state["rest"], rest)
        new_stacks, new_states = {}, {}
        for name, stack in stacks.items():
            both = {
                i: jax.vmap(apply)(stack_grads[name][SEGMENTS][i], state["stacks"][name][SEGMENTS][i], segment)
                for i, segment in stack[SEGMENTS].items()
            }
            new_stacks[name] = {SEGMENTS: {i: new for i, (new, _) in both.items()}}
            new_states[name] = {SEGMENTS: {i: new for i, (_, new) in both.items()}}
        return join(rest, new_stacks), {"rest": rest_state, "stacks": new_states}, {"grad_norm": norm, "lr": lr}

    return Optimizer(init, update, schedule)


def make_schedule(peak: float, config, total_steps: int) -> Callable[[Any], Any]:
    """Learning rate as a float32 function of the step (0-based).

    Linear warm-up over `warmup` steps, then: constant; cosine or linear to `final * peak` at the last step; or
    WSD (Hu et al. 2024, MiniCPM, section 4.2): constant, then linear to `final * peak` over the last `decay` share.
    """
    warmup, end = config.warmup, max(total_steps, 1)
    floor = config.final

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum(1.0, (step + 1) / max(warmup, 1)) if warmup else jnp.float32(1.0)
        progress = jnp.clip((step - warmup) / max(end - warmup, 1), 0.0, 1.0)
        if config.name == "constant":
            shape = jnp.float32(1.0)
        elif config.name == "cosine":
            shape = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.name == "linear":
            shape = 1 - (1 - floor) * progress
        else:
            start = end * (1 - config.decay)
            shape = 1 - (1 - floor) * jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)
        return (peak * ramp * shape).astype(jnp.float32)

    return schedule


def _direction(config) -> Callable[[Any], optax.GradientTransformation]:
    """A function of a (per-layer) parameter tree, because Muon has to know which leaves are hidden matrices."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=lambda p: jax.tree.map(lambda a: a.ndim >= 2, p))
    adam = optax.chain(optax.scale_by_adam(config.beta1, config.beta2, config.eps), decay)
    if config.name == "adamw":
        return lambda params: adam
    if config.name == "lion":
        lion = optax.chain(optax.scale_by_lion(config.beta1, config.beta2), decay)
        return lambda params: lion
    if config.name == "adafactor":
        # Shazeer & Stern 2018: factored second moment, update clipping at RMS 1, step relative to the parameter's RMS.
        factored = optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms(), decay
        )
        return lambda params: factored
    # Muon (Jordan et al. 2024) scaled to AdamW's update RMS of 0.2 (Liu et al. 2025, Moonlight, eq. 4), so that one
    # learning rate serves hidden matrices and, by Adam, all that is not one: embeddings, heads, norms, biases.
    orthogonal = optax.contrib.scale_by_muon(
        beta=config.momentum,
        weight_dimension_numbers=lambda p: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), p),
    )
    muon = optax.chain(orthogonal, optax.stateless(_as_adamw_rms), decay)
    adam_rate = 1.0 if config.adam_lr is None else config.adam_lr / config.lr
    rates = {"muon": muon, "adam": optax.chain(adam, optax.scale(adam_rate))}
    return lambda params: optax.partition(rates, jax.tree_util.tree_map_with_path(_muon_label, params))


def _as_adamw_rms(updates, params):
    """An orthogonal matrix [m, n] has RMS 1 / sqrt(max(m, n)); AdamW's updates have about 0.2."""
    return jax.tree.map(lambda u: u * (0.2 * max(u.shape) ** 0.5), updates)


def _muon_label(path, leaf) -> str:
    names = {str(getattr(key, "key", key)) for key in path}
    return "muon" if leaf.ndim == 2 and not names & {"embedding", "positions", "head"} else "adam"


def partition(params: dict) -> tuple[dict, dict]:
    """(parameters outside stacks, stacks by dotted path). `join` is the inverse."""
    rest, stacks = {}, {}
    for key, node in params.items():
        if is_stack(node):
            stacks[str(key)] = node
        elif isinstance(node, dict):
            inner, found = partition(node)
            rest[key] = inner
            stacks.update({f"{key}.{name}": stack for name, stack in found.items()})
        else:
            rest[key] = node
    return rest, stacks


def join(rest: dict, stacks: dict) -> dict:
    """Put the stacks back where `partition` found them."""
    out = dict(rest)
    for name, stack in stacks.items():
        head, _, tail = name.partition(".")
        key = int(head) if head.isdigit() else head
        out[key] = join(out[key], {tail: stack}) if tail else stack
    return out


def global_norm(tree) -> Any:
    """L2 norm of a parameter tree, summed per layer in layer order, so that no cut of a stack changes its bits."""
    rest, stacks = partition(tree)

    def square(leaf, axes=None):
        return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)

    total = sum((square(leaf) for leaf in jax.tree.leaves(rest)), jnp.float32(0))
    for _, stack in sorted(stacks.items()):
        segments = [
            sum(square(leaf, tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(segment))
            for _, segment in sorted(stack[SEGMENTS].items())
        ]
        total = total + jnp.sum(jnp.concatenate(segments))
    return jnp.sqrt(total)
