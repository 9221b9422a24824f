"""The step in which each unit of a stack is updated as soon as its gradient is known (`memory.fuse_update`).

This limits what it can do: the norm of all gradients is known only after every unit has been updated, so it cannot be
used to clip or to refuse an update. A loss that is not finite still changes nothing, because it is known before the
first gradient; a gradient that is not finite leaves its own unit unchanged.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.errors import UserError
from aurora_train.nn.fused import Update, disguised, undisguised, updating
from aurora_train.nn.stack import SEGMENTS, named_stacks
from aurora_train.optimizer import join, norm_of, partition, segments_of, squared


def make_fused(blueprint, optimizer, loss_of):
    """`(state, batch) -> (params, opt_state, aux, info)`; `loss_of(model, state, batch) -> (total, aux)`.

    `aux` is the (Loss, state beside the parameters) of the step. UserError for a model with frozen parameters.
    """
    if jax.tree.leaves(blueprint.state.frozen):
        raise UserError(
            "an update fused into the backward pass trains every parameter, but some of this model's are frozen",
            where="memory.fuse_update", hint="memory.fuse_update=false",
        )  # fmt: skip

    def advance(state, batch):
        rest, held = partition(state.params)
        kept = {name: _in_order(stack) for name, stack in state.opt_state["stacks"].items()}
        norms = {name: [jnp.zeros(_units(s), jnp.float32) for s in _in_order(stack)] for name, stack in held.items()}

        def total_of(rest, held, kept_as_floats, norms):
            model = blueprint.merge(join(rest, held), state.rest, state.frozen)
            updates = {
                id(stack): Update(kept_as_floats[name], kept[name], norms[name], _rule(optimizer, name, state.step))
                for name, stack in named_stacks(model).items()
            }
            with updating(updates) as now:
                total, aux = loss_of(model, state, batch)
            _refuse_strange_calls(named_stacks(model), now.called)
            return (total, now.taps), (aux, now)

        (total, taps), backward, (aux, now) = jax.vjp(total_of, rest, held, disguised(kept), norms, has_aux=True)
        weight = jnp.maximum(aux[0].weight, 1e-9)
        mean = total / weight
        # NaN if the loss is not finite: then every gradient is NaN, and no unit is updated.
        divisor = jnp.where(jnp.isfinite(mean), weight, jnp.nan).astype(jnp.float32)
        rest_grads, held, moved, squares = backward((jnp.ones_like(total), [divisor for _ in taps]))
        _refuse_other_uses(held, now.made)
        rest_grads = jax.tree.map(lambda g: (g / divisor).astype(g.dtype), rest_grads)
        moved = undisguised(moved, kept)
        norm = norm_of(squared(rest_grads), squares)
        rest, opt_state, info = optimizer.update(
            rest_grads, {"rest": state.opt_state["rest"], "stacks": {}}, rest, state.step, good=jnp.isfinite(norm)
        )
        opt_state["stacks"] = {name: {SEGMENTS: _numbered(parts, state.opt_state["stacks"][name])}
                               for name, parts in moved.items()}  # fmt: skip
        return join(rest, held), opt_state, aux, info | {"grad_norm": norm, "loss": mean}

    return advance


def _rule(optimizer, name: str, step):
    def rule(grads, weight, kept, params, index):
        grads = jax.tree.map(lambda g: (g / weight).astype(g.dtype), grads)
        square = squared(grads)
        new = optimizer.rule(name, step, good=jnp.isfinite(square))(grads, kept, params, index.astype(jnp.uint32))
        return *new, square

    return rule


def _refuse_strange_calls(by_name, called) -> None:
    for name, stack in by_name.items():
        times = called.count(id(stack))
        if times != 1:
            raise UserError(
                f"the loss calls the stack {name!r} of its model {times} times", where="memory.fuse_update",
                why="an update fused into the backward pass needs each stack called once",
                hint="memory.fuse_update=false",
            )  # fmt: skip


def _refuse_other_uses(held, made: set[int]) -> None:
    """UserError if a returned parameter was not made by the rules: it was used outside its stack's call."""
    for name, stack in held.items():
        if any(id(leaf) not in made for leaf in jax.tree.leaves(stack)):
            raise UserError(
                f"the loss uses parameters of the stack {name!r} outside its call", where="memory.fuse_update",
                why="their gradient is known only after they have been updated", hint="memory.fuse_update=false",
            )  # fmt: skip


def _in_order(stack: dict) -> list:
    return [part for _, part in segments_of(stack)]


def _numbered(parts: list, like: dict) -> dict:
    return {key: part for (key, _), part in zip(segments_of(like), parts, strict=True)}


def _units(segment) -> int:
    return jax.tree.leaves(segment)[0].shape[0]
