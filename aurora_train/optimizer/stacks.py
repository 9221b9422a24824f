"""Splits a parameter tree into leaves outside stacks and stacks, whose units are handled one by one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from aurora_train.nn.stack import SEGMENTS, is_stack
from aurora_train.nn.tracing import forms


def partition(params: dict) -> tuple[dict, dict]:
    """(parameters outside stacks, stacks by dotted path). `join` is the inverse."""
    rest, stacks = {}, {}
    for key, node in params.items():
        if is_stack(node):
            stacks[str(key)] = node
        elif isinstance(node, dict):
            inner, inner_stacks = partition(node)
            rest[key] = inner
            stacks.update({f"{key}.{name}": stack for name, stack in inner_stacks.items()})
        else:
            rest[key] = node
    return rest, stacks


def join(rest: dict, stacks: dict) -> dict:
    """Put the stacks back where `partition` took them from."""
    out = dict(rest)
    for name, stack in stacks.items():
        head, _, tail = name.partition(".")
        key = int(head) if head.isdigit() else head
        out[key] = join(out[key], {tail: stack}) if tail else stack
    return out


def segments_of(stack: dict) -> list[tuple[Any, Any]]:
    """(key, segment) of a stack, in the order of its units."""
    return sorted(stack[SEGMENTS].items(), key=lambda item: int(item[0]))


def global_norm(tree) -> Any:
    """L2 norm of a parameter tree, summed per layer in layer order, so that no cut of a stack changes its bits."""
    rest, stacks = partition(tree)
    over_units = forms().over_units(_squared)
    squares = [[over_units(segment) for _, segment in segments_of(stack)] for _, stack in sorted(stacks.items())]
    total = _squared(rest)
    for parts in squares:
        # Without the barrier, XLA would fuse the sum with its parts and vectorise it differently for another cut.
        total = total + jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(parts)))
    return jnp.sqrt(total)


def _squared(tree) -> Any:
    """The squared L2 norm of all leaves, float32."""
    return sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)), jnp.float32(0))
