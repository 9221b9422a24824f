"""The compiled programs of the engine: a chunk of prompts, and one token of every slot.

All are functions of plain arrays with a static `Form`, so that engines of one model and shape share a compilation.
`counts` int32[rows] says how many of a row's tokens are real: 0 leaves its caches as they are.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aurora_train.generate.weights import Form
from aurora_train.nn.tracing import tracing


def _decoding(program):
    """The program, traced with the forms of decoding (`nn.tracing`)."""

    @functools.wraps(program)
    def traced(*arguments):
        with tracing(decoding=True):
            return program(*arguments)

    return traced


class Rows(NamedTuple):
    """Where the tokens of each row stand, int32[rows] each."""

    starts: jax.Array  # the position of the first token
    counts: jax.Array  # how many tokens are real
    lengths: jax.Array  # of the row's whole text, of which these tokens are a part
    prefixes: jax.Array  # of the prompt: what all tokens see, if the model's mask is "prefix"


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
@_decoding
def read_all(form: Form, length: int, weights, caches, logits, tokens, rows: Rows):
    """A chunk of the prompts of all slots, tokens[S, C] -> (caches, logits[S, V] with those after each row's last
    token). `length`: the positions of a slot."""
    model = form.model(weights)
    last, caches = _extend(model, length, caches, tokens, rows)
    return form.by_slot(caches, jnp.where(rows.counts[:, None] > 0, model.logits(last), logits))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
@_decoding
def read_one(form: Form, length: int, of_own_kind: bool, weights, caches, logits, slot, tokens, rows: Rows):
    """A chunk of one slot's prompt, tokens[1, C], the same way. `of_own_kind`: see `step`."""
    model = form.model(weights)
    if of_own_kind:
        own = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, slot, 1, 1), caches)
        last, own = _extend(model, length, _begun(own, rows), tokens, rows)
        caches = jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, slot, 1), caches, own)
    else:
        last, caches = _extend(model, length, caches, tokens, rows, slots=slot[None])
    return form.by_slot(caches, jax.lax.dynamic_update_slice_in_dim(logits, model.logits(last), slot, 0))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
@_decoding
def step(form: Form, length: int, of_own_kind: bool, weights, caches, logits, tokens, rows: Rows):
    """One more token of every slot, tokens[S] -> (caches, logits[S, V]). `of_own_kind`: whether there
    are layers of a recipe's own kind, which know neither idle rows nor that caches have others."""
    model, before = form.model(weights), caches
    last, caches = _extend(model, length, caches, tokens[:, None], rows)
    busy = rows.counts > 0
    if of_own_kind:
        caches = jax.tree.map(lambda new, old: jnp.where(_over_rows(busy, new), new, old), caches, before)
    return form.by_slot(caches, jnp.where(busy[:, None], model.logits(last), logits))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def erased(form: Form, caches, logits, slot):
    """(caches, logits) with zeros in one slot."""

    def without(axis, leaf):
        empty = jnp.zeros_like(jax.lax.dynamic_slice_in_dim(leaf, slot, 1, axis))
        return jax.lax.dynamic_update_slice_in_dim(leaf, empty, slot, axis)

    return form.by_slot(jax.tree.map(functools.partial(without, 1), caches), without(0, logits))


def _extend(model, length, caches, tokens, rows: Rows, slots=None):
    """(hidden states of each row's last real token [rows, D], or a tree of such arrays; caches)."""
    order = jnp.arange(tokens.shape[1])
    prefix = jnp.arange(length) < rows.prefixes[:, None] if model.mask == "prefix" else None
    hidden, caches = model.extend(
        tokens, rows.starts[:, None] + order, caches, prefix=prefix, real=order < rows.counts[:, None],
        lasts=rows.lengths - 1, rows=slots,
    )  # fmt: skip
    last = jnp.maximum(rows.counts - 1, 0)
    return jax.tree.map(lambda a: jnp.take_along_axis(a, last[:, None, None], axis=1)[:, 0], hidden), caches


def _begun(caches, rows: Rows):
    """The caches, emptied for texts that begin."""
    begins = (rows.starts == 0) & (rows.counts > 0)
    return jax.tree.map(lambda a: jnp.where(_over_rows(begins, a), jnp.zeros((), a.dtype), a), caches)


def _over_rows(flags, leaf):
    """bool[rows] as it broadcasts over a cache [units, rows, ...]."""
    return flags.reshape(1, -1, *[1] * (leaf.ndim - 2))
