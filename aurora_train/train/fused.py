"""The step in which each unit of a stack is updated as soon as its gradient is known (`memory.fuse_update`).

What it cannot do follows from that: a norm of all gradients is known only when every unit has been updated, so there
is no clipping by it, and no second look before the update. A loss that is not finite still changes nothing, because it
is known before the first gradient; a gradient that is not finite leaves its own unit as it was.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.errors import UserError
from aurora_train.nn.fused import Update, disguised, undisguised, updating
from aurora_train.nn.stack import SEGMENTS, stacks
from aurora_train.optimizer import join, norm_of, partition, squared


def refuse_fused(config) -> None:
    """UserError where a config asks for `memory.fuse_update` beside what needs all gradients at once."""
    if not config.memory.fuse_update:
        return
    where = "memory.fuse_update"
    if config.optimizer.clip is not None:
        raise UserError(
            "an update fused into the backward pass cannot clip by the norm of all gradients", where=where,
            why="the norm is known only after the last unit has been updated", hint="optimizer.clip=null",
        )  # fmt: skip
    if config.memory.accumulation not in ("auto", 1):
        raise UserError(
            "an update fused into the backward pass sees one microbatch", where=where,
            why="the gradients of several would have to be kept, which is what it is there to avoid",
            hint="memory.accumulation=1, or memory.fuse_update=false",
        )  # fmt: skip
    if getattr(getattr(config, "model", None), "lora", None) is not None:
        raise UserError(
            "adapters have gradients too small to be worth fusing their update", where=where,
            hint="memory.fuse_update=false",
        )  # fmt: skip


def make_fused(blueprint, optimizer, loss_of):
    """`(state, batch) -> (params, opt_state, loss, info)`; `loss_of(model, state, batch) -> (total, Loss)`."""

    def advance(state, batch):
        rest, held = partition(state.params)
        kept = {name: _in_order(stack) for name, stack in state.opt_state["stacks"].items()}
        norms = {name: [jnp.zeros(_units(s), jnp.float32) for s in _in_order(stack)] for name, stack in held.items()}

        def total_of(rest, held, kept_as_floats, norms):
            model = blueprint.merge(join(rest, held), state.rest, state.frozen)
            updates = {
                id(stack): Update(kept_as_floats[name], kept[name], norms[name], _rule(optimizer, name, state.step))
                for name, stack in _by_name(model).items()
            }
            with updating(updates) as called:
                total, loss = loss_of(model, state, batch)
            _refuse_strange_calls(_by_name(model), called)
            return total, loss

        total, backward, loss = jax.vjp(total_of, rest, held, disguised(kept), norms, has_aux=True)
        mean = total / jnp.maximum(loss.weight, 1e-9)
        # Not a number where the loss is none: then every gradient is none, and no unit is updated.
        seed = jnp.where(jnp.isfinite(mean), 1 / jnp.maximum(loss.weight, 1e-9), jnp.nan).astype(total.dtype)
        rest_grads, held, moved, squares = backward(seed)
        moved = undisguised(moved, kept)
        norm = norm_of(squared(rest_grads), squares)
        rest, opt_state, info = optimizer.update(
            rest_grads, {"rest": state.opt_state["rest"], "stacks": {}}, rest, state.step, good=jnp.isfinite(norm)
        )
        opt_state["stacks"] = {name: {SEGMENTS: _numbered(parts, state.opt_state["stacks"][name])}
                               for name, parts in moved.items()}  # fmt: skip
        return join(rest, held), opt_state, loss, info | {"grad_norm": norm, "loss": mean}

    return advance


def _rule(optimizer, name: str, step):
    def rule(grads, kept, params, index):
        square = squared(grads)
        new = optimizer.rule(name, step, good=jnp.isfinite(square))(grads, kept, params, index.astype(jnp.uint32))
        return *new, square

    return rule


def _refuse_strange_calls(by_name, called) -> None:
    for name, stack in by_name.items():
        times = called.count(id(stack))
        if times != 1:
            raise UserError(
                f"the loss calls the stack {name!r} {times} times", where="memory.fuse_update",
                why="an update fused into the backward pass needs each stack called once",
                hint="memory.fuse_update=false",
            )  # fmt: skip


def _by_name(model) -> dict:
    return {".".join(map(str, path)): stack for path, stack in stacks(model).items()}


def _in_order(stack: dict) -> list:
    return [part for _, part in sorted(stack[SEGMENTS].items(), key=lambda item: int(item[0]))]


def _numbered(parts: list, like: dict) -> dict:
    return dict(zip(sorted(like[SEGMENTS], key=int), parts, strict=True))


def _units(segment) -> int:
    return jax.tree.leaves(segment)[0].shape[0]
