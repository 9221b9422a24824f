"""Updates the units of a stack as the backward pass reaches them, so that no gradient of the whole stack ever exists.

The reverse scan carries the stacked parameters and their optimizer state, and overwrites those of unit i once its
gradient is known (LOMO, Lv et al. 2023, for any optimizer that works unit by unit). To automatic differentiation this
is a custom backward rule that returns the *new* values where cotangents are expected. Nothing may be added to them on
the way, so a stack must be called exactly once and its parameters used nowhere else; the caller that differentiates
must check this (`Updating.called` and `made`).

`jax.vjp` inside a scan returns its residuals; those that are the unit's own inputs (mainly its weights) are not stacked
but taken from the carry again.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.compat import get_opaque_trace_state, open_jaxpr
from aurora_train.errors import UserError

_DISGUISES = {1: jnp.float8_e4m3fn, 2: jnp.float16, 4: jnp.float32}  # by bytes
_updates = contextvars.ContextVar("stack_updates", default=None)


class Update(NamedTuple):
    """The update of each unit of one stack.

    `state`: the optimizer's state by segment, `disguised`; `dtypes`: the undisguised state, only for its dtypes.
    `norms`: float32[units] by segment, any values; each unit's squared gradient norm comes back as its cotangent.
    `rule(grads, weight, state, params, index) -> (params, state, squared norm)` works on nested dicts of one unit.
    """

    state: list
    dtypes: list
    norms: list
    rule: Callable[..., tuple[Any, Any, Any]]


class Updating:
    """Records what `updating` called. `taps`: a float32 zero for each segment, which must be an output of the
    differentiated function: its cotangent is the `weight` passed to the rule. `made`: ids of arrays made by rules."""

    def __init__(self, updates: dict[int, Update]):
        self.updates, self.called, self.taps, self.made = updates, [], [], set()
        self.trace = get_opaque_trace_state(convention="nnx")


@contextlib.contextmanager
def updating(updates: dict[int, Update]):
    """In this context, a Stack whose `id` is a key is updated in its backward pass. Yields an `Updating`."""
    record = Updating(updates)
    token = _updates.set(record)
    try:
        yield record
    finally:
        _updates.reset(token)


def update_of(stack) -> Update | None:
    """The update of a stack, or None; records the stack as called. UserError inside a transformation."""
    now = _updates.get()
    if now is None or id(stack) not in now.updates:
        return None
    if get_opaque_trace_state(convention="nnx") != now.trace:
        raise UserError(
            "the loss calls a stack inside jit, vmap, scan, cond, grad or checkpoint", where="memory.fuse_update",
            why="an update fused into the backward pass needs each stack called once, by the loss itself",
            hint="memory.fuse_update=false",
        )  # fmt: skip
    now.called.append(id(stack))
    return now.updates[id(stack)]


def disguised(tree):
    """Integers as floats with the same bits, because only floats have cotangents. They are never computed with."""
    return jax.tree.map(lambda a: a if _is_float(a) else jax.lax.bitcast_convert_type(a, _DISGUISES[a.itemsize]), tree)


def undisguised(tree, like):
    """The inverse of `disguised`; `like` gives the dtypes."""
    return jax.tree.map(
        lambda a, b: a if a.dtype == b.dtype else jax.lax.bitcast_convert_type(a, b.dtype), tree, like
    )


def run(unit, update: Update, segment: int, indices, module, x, context):
    """Run x through the units of one segment of a stack, with the sums they report.

    `unit(state, index, x, context) -> (x, sums)`.

    Args:
        segment: the segment's number in `update`.
        indices: int32[units], absolute.
        module: the segment's stacked parameters, an nnx.State.

    Returns (x, sums), the latter with a leading axis of units.
    """
    floats, rest = _split_floats(context)
    call = _Call(unit, update.rule, update.dtypes[segment], indices, rest, _updates.get().made)

    @jax.custom_vjp
    def through(module, state, norms, x, floats):
        def body(x, inputs):
            return unit(*inputs, x, _join_floats(floats, rest))

        return *jax.lax.scan(body, x, (module, indices)), jnp.float32(0)

    through.defvjp(
        lambda module, state, norms, x, floats: call.forward(module, state, x, floats),
        lambda residuals, cotangents: call.backward(*residuals, *cotangents),
    )
    x, sums, tap = through(module, update.state[segment], update.norms[segment], x, floats)
    _updates.get().taps.append(tap)
    return x, sums


class _Call:
    """One call of `run`: what its forward rule passes to its backward rule besides arrays."""

    def __init__(self, unit, rule, dtypes, indices, rest, made):
        self.unit, self.rule, self.dtypes, self.indices, self.rest = unit, rule, dtypes, indices, rest
        self.made = made

    def forward(self, module, state, x, floats):
        first = jax.tree.map(lambda a: a[0], (module, self.indices))
        self._classify(*first, x, floats)

        def body(x, inputs):
            (y, sums), leaves = self._differentiated(*inputs, x, floats)
            return y, (sums, [leaves[k] for k in self.kept])

        y, (sums, kept) = jax.lax.scan(body, x, (module, self.indices))
        return (y, sums, jnp.float32(0)), (kept, module, state, floats)

    def backward(self, kept, module, state, floats, dy, dsums, weight):
        def body(carry, inputs):
            module, state, dx, dfloats = carry
            kept, index, i, dsum = inputs
            unit_module, unit_state = jax.tree.map(
                lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), (module, state)
            )
            back = self._refilled(kept, (unit_module, index, floats))
            grads, dx, more = back((dx, dsum))
            square, new_module, new_state = self._updated(grads, weight, unit_state, unit_module, index)
            module, state = jax.tree.map(
                lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, i, 0),
                (module, state), (new_module, new_state),
            )  # fmt: skip
            return (module, state, dx, jax.tree.map(jnp.add, dfloats, more)), square

        state = undisguised(state, self.dtypes)
        start = (module, state, dy, jax.tree.map(jnp.zeros_like, floats))
        number = jnp.arange(self.indices.shape[0])
        given = (kept, self.indices, number, dsums)
        (module, state, dx, dfloats), squares = jax.lax.scan(body, start, given, reverse=True)
        self.made.update(map(id, jax.tree.leaves(module)))
        self.alive = module  # kept alive so that no id is reused
        return module, disguised(state), squares, dx, dfloats

    def _updated(self, grads, weight, state, module, index):
        # The barrier separates a unit's backward pass from its update, as in the step without fusion.
        plain = jax.lax.optimization_barrier(nnx.to_pure_dict(grads))
        params, state, square = self.rule(plain, weight, state, nnx.to_pure_dict(module), index)
        new = jax.tree.map(lambda leaf: leaf, module)
        nnx.replace_by_pure_dict(new, params)
        return square, new, state

    def _differentiated(self, module, index, x, floats):
        def of(module, x, floats):
            return self.unit(module, index, x, _join_floats(floats, self.rest))

        y, back = jax.vjp(of, module, x, floats)
        leaves, self.tree = jax.tree.flatten(back)
        return y, leaves

    def _classify(self, *inputs):
        """Determine which residuals are stacked (`kept`) and which are unit inputs (`given`: residual -> input)."""
        closed = jax.make_jaxpr(lambda *inputs: self._differentiated(*inputs)[1])(*inputs)
        jaxpr = open_jaxpr(closed)
        before = len(jax.tree.leaves(inputs[:2]))
        own = len(jax.tree.leaves(inputs[2]))  # x changes from unit to unit and is not in the carry
        place = {v: i for i, v in enumerate(jaxpr.invars) if not before <= i < before + own}
        constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))  # closed over: keys, masks
        self.given, self.constant, self.kept = {}, {}, []
        for k, v in enumerate(jaxpr.outvars):
            if not hasattr(v, "val") and v in place:
                self.given[k] = place[v] - (own if place[v] >= before else 0)
            elif not hasattr(v, "val") and v in constants:
                self.constant[k] = constants[v]
            else:
                self.kept.append(k)

    def _refilled(self, kept, inputs):
        flat = jax.tree.leaves(inputs)
        residuals = dict(zip(self.kept, kept, strict=True)) | self.constant
        residuals |= {k: flat[place] for k, place in self.given.items()}
        return jax.tree.unflatten(self.tree, [residuals[k] for k in range(len(residuals))])


def _is_float(a) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def _split_floats(context):
    """(the leaves that have cotangents, the context without them); `_join_floats` is the inverse."""
    leaves, tree = jax.tree.flatten(context)
    keep = [hasattr(a, "dtype") and _is_float(a) for a in leaves]
    floats = [a for a, is_float in zip(leaves, keep, strict=True) if is_float]
    return floats, (tree, keep, [None if is_float else a for a, is_float in zip(leaves, keep, strict=True)])


def _join_floats(floats, rest):
    tree, keep, others = rest
    given = iter(floats)
    return jax.tree.unflatten(tree, [next(given) if k else a for k, a in zip(keep, others, strict=True)])
