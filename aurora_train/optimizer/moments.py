"""The formats in which an optimizer's moments (optax's `mu` and `nu`) are stored between steps.

A stored state is optax's own with each moment's tree in its format. Each array, apart from the scales, keeps its
parameter's name and shape, so that moments are sharded and cut exactly as their parameters are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aurora_train.optimizer import codes, rounding

SMALLEST = 4096  # fewest elements of a unit's leaf that are coded in 8 bits; bitsandbytes' `min_8bit_size`
NARROWEST = 64  # shortest last axis that is coded: below it the scales would take more than the codes save
# Looked up by row: 32 bits, as in Dettmers et al. 2022, section 2.3.
TABLES = {"embedding", "embedding_lora_a", "positions"}

CODES = {"mu": jnp.int8, "nu": jnp.uint8}  # the first moment has a sign


class Coded(NamedTuple):
    """A moment in 8 bits. `values`: codes, or float32 for a leaf that is not coded, whose `scales` are None."""

    values: Any
    scales: Any


class Format(NamedTuple):
    """`empty(state)`: a fresh optax state as stored. `advance(step, state, noise)`: one step from stored to stored.

    `step` maps a float32 state to (updates, state), and may be traced twice. `noise(names)` is called at most once
    and gives each name, of the form `mu.a.b`, its `rounding.words`.
    """

    empty: Callable[[Any], Any]
    advance: Callable[[Callable, Any, Callable], tuple[Any, Any]]


def make_format(name: str) -> Format:
    """The format `float32`, `bfloat16` or `int8`."""
    return {
        "float32": Format(lambda state: state, lambda step, state, noise: step(state)),
        "bfloat16": Format(_empty_half, _advance_half),
        "int8": Format(_empty_coded, _advance_coded),
    }[name]


def is_coded(path, leaf) -> bool:
    """Whether the moment of this parameter (of one unit) takes 8 bits. Tables, vectors, small leaves stay float32."""
    names = {entry_name(entry) for entry in path}
    big = leaf.ndim >= 2 and leaf.size >= SMALLEST and leaf.shape[-1] >= NARROWEST
    return big and not names & TABLES


def entry_name(entry) -> str:
    """One entry of a tree path as text."""
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def dotted(path) -> str:
    """A tree path as `a.b.c`."""
    return ".".join(map(entry_name, path))


def _moments(change: Callable[[str, Any], Any], state):
    """The state with each moment's tree replaced by `change(field, tree)`."""

    def visit(node):
        if not _has_moments(node):
            return node
        return node._replace(**{field: change(field, getattr(node, field)) for field in CODES if field in node._fields})

    return jax.tree.map(visit, state, is_leaf=_has_moments)


def _has_moments(node) -> bool:
    return bool(CODES.keys() & set(getattr(node, "_fields", ())))


def _names(state) -> list[str]:
    """`field.path` of every leaf of every moment."""
    names: list[str] = []
    _moments(lambda field, tree: names.extend(_paths(field, tree)), state)
    return names


def _paths(field: str, tree) -> list[str]:
    return [f"{field}.{dotted(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _empty_half(state):
    return _moments(lambda _, tree: jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.bfloat16), tree), state)


def _advance_half(step, state, noise):
    updates, new = step(_moments(lambda _, tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree), state))
    words = noise(_names(new))

    def write(field, tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, a: rounding.to_bfloat16(a, rounding.bits(words[f"{field}.{dotted(path)}"], a.shape)), tree
        )

    return updates, _moments(write, new)


def _empty_coded(state):
    def empty(field, tree):
        def values(path, a):
            return jnp.zeros(a.shape, CODES[field] if is_coded(path, a) else jnp.float32)

        def scales(path, a):
            return jnp.zeros((*a.shape[:-1], codes.blocks(a.shape[-1])), jnp.float32) if is_coded(path, a) else None

        return Coded(*(jax.tree_util.tree_map_with_path(make, tree) for make in (values, scales)))

    return _moments(empty, state)


def _advance_coded(step, state, noise):
    """Computes the new moments twice, once for their scales and once for their codes, because one kernel cannot do
    both: if they were kept in between, the float32 moments of a whole stack would be in memory. The barrier keeps the
    compiler from merging the two computations. This is also faster: reading codes again beats writing float32."""
    scales = _moments(_measure, step(_moments(_read_coded, state))[1])
    state, scales = jax.lax.optimization_barrier((state, scales))
    updates, new = step(_moments(_read_coded, state))
    words = noise(_names(new))
    scales = iter(_each_moment(scales))

    def write(field, tree):
        def one(path, a, scale):
            if scale is None:
                return a
            return codes.pack(a, scale, CODES[field], rounding.bits(words[f"{field}.{dotted(path)}"], a.shape))

        own = next(scales)
        return Coded(jax.tree_util.tree_map_with_path(one, tree, own, is_leaf=_is_none), own)

    return updates, _moments(write, new)


def _read_coded(_, stored: Coded):
    return jax.tree.map(
        lambda scales, values: values if scales is None else codes.unpack(values, scales),
        stored.scales, stored.values, is_leaf=_is_none,
    )


def _measure(_, tree):
    return jax.tree_util.tree_map_with_path(lambda path, a: codes.measure(a) if is_coded(path, a) else None, tree)


def _each_moment(state) -> list:
    trees: list = []
    _moments(lambda _, tree: trees.append(tree), state)
    return trees


def _is_none(leaf) -> bool:
    return leaf is None
