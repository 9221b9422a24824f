"""`Stack`: n identical units with stacked parameters. Only this module knows how they are kept in memory.

A unit may be a period of different layers (Gemma 2: local, then global). A plan cuts the stack into segments, stored
separately because slicing one stored stack would copy it; each segment is scanned or unrolled, and keeps, offloads or
recomputes its activations. Nothing outside sees segments: the optimizer vmaps over them, and `checkpoint/layout.py`
names their contents by the absolute index of the unit.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aurora_train.errors import UserError
from aurora_train.nn import fp8
from aurora_train.nn.plain import entry
from aurora_train.nn.saving import UNIT_INPUT, policy
from aurora_train.nn.tracing import by_rows, forms, tracing

SEGMENTS = "segments"  # the key that marks a nested dict of parameters as a stack
UNITS = "units"  # its canonical counterpart, with one entry per unit


class Segment(NamedTuple):
    """Units [start, stop). `save`: names kept for the backward pass; None keeps all, () recomputes everything.

    `offload`: names kept in the processor's memory instead (`nn.saving`); they need a `save` that is not None.
    """

    start: int
    stop: int
    save: tuple[str, ...] | None = None
    unroll: bool = False
    offload: tuple[str, ...] = ()


class Stack(nnx.Module):
    """`num_units` units made by `make_unit(rngs) -> nnx.Module`, called in order.

    Every unit is called as `x, cache = unit(x, context, index, keys, cache)`; `index` is its absolute number (int32
    scalar, traced where scanned). Parameters of unit i come from `fold_in(key, i)`: no cut moves an initial value.

    A unit may return a third value, its sums: float32 arrays by name, each either one number per sequence ([B, ...]) or
    a count over all sequences. Both add up over units, microbatches and devices; a mean or a maximum does not, and must
    not be reported there.
    """

    def __init__(self, make_unit, num_units: int, rngs: nnx.Rngs):
        self.num_units = num_units
        key = rngs.params()
        unit_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_units))
        unit = nnx.eval_shape(lambda: make_unit(nnx.Rngs(params=jax.random.key(0))))
        self.tags = tuple(getattr(unit, "tags", ()))  # the names that a plan may use; JAX itself does not check names
        graph, abstract = nnx.split(unit)
        # Units that are encoded when drawn are drawn one at a time: a whole unencoded stack may not fit.
        coded = any(not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(abstract))
        each = (lambda draw: functools.partial(jax.lax.map, draw)) if coded else jax.vmap
        arrays = each(lambda k: nnx.to_pure_dict(nnx.split(make_unit(nnx.Rngs(params=k)))[1]))(unit_keys)
        self.segments = nnx.List([_merge(graph, _named_over_layers(abstract), arrays)])
        self.plan = (Segment(0, num_units),)

    def cut(self, plan: tuple[Segment, ...], ends: int = 0) -> None:
        """Apply a plan, before the model is split and its optimizer is made. Raises AssertionError on a gap.

        `ends`: units at either end that become separate segments, to stay in bfloat16 while others use 8 bits
        (`nn.fp8`).
        """
        assert [s.start for s in plan] == [0, *(s.stop for s in plan[:-1])] and plan[-1].stop == self.num_units, plan
        graph, state = nnx.split(self.segments[0])
        assert len(self.segments) == 1, "cut once"
        whole = nnx.to_pure_dict(state)
        plan = tuple(part for segment in plan for part in _cut_at(segment, fp8.without_ends(self.num_units, ends)))
        self.segments = nnx.List(
            [_merge(graph, state, jax.tree.map(lambda a, s=s: a[s.start : s.stop], whole)) for s in plan]
        )
        self.plan = plan

    def cut_into_units(self) -> None:
        """Cut every segment into units that are unrolled, for decoding, whose weights and caches a scan would copy for
        each token. The units' arrays are copies of the segments'."""
        take = jax.jit(lambda tree, i: jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), tree))
        modules = []
        for segment, module in self._parts():
            graph, state = nnx.split(module)
            whole = nnx.to_pure_dict(state)
            modules += [_merge(graph, state, take(whole, i)) for i in range(segment.stop - segment.start)]
        self.segments = nnx.List(modules)
        self.plan = tuple(Segment(i, i + 1, unroll=True) for i in range(self.num_units))

    def __call__(self, x, context, keys=None, caches=None):
        """Run x through all units. `keys`: key[B] or None. `caches`: one pytree for each segment, with a leading axis
        for its units, or None.

        Returns (x, caches, sums). `sums`: the units' reports, added over all units, with gradients; {} if there are
        none. UserError for sums that are not float32.
        """
        calls = _calls.get()
        if calls is not None and caches is None:
            calls.append((self, x, context, keys))
        outs, reports = [], []
        for number, (segment, module) in enumerate(self._parts()):
            part = None if caches is None else caches[number]
            x, (out, report) = _run(segment, module, x, context, keys, part, self._is_quantized(segment))
            outs.append(out)
            reports.append(report)
        return by_rows(x), None if caches is None else outs, _added(reports)

    def outputs(self, x, context, keys=None):
        """Run x through the units one by one, and yield the absolute index and the output of each."""
        for segment, module in self._parts():
            graph, state = nnx.split(module)
            body = _unit(segment._replace(save=None, offload=()), graph, context, keys, self._is_quantized(segment))
            for index in range(segment.start, segment.stop):
                x, _ = body(x, (entry(state, index - segment.start), jnp.int32(index), None))
                yield index, x

    def _parts(self):
        return zip(self.plan, self.segments, strict=True)

    def _is_quantized(self, segment: Segment) -> bool:
        """Whether a segment's units multiply in 8 bits."""
        first, last = fp8.quantized_units(self.num_units)
        outside = segment.stop <= first or last <= segment.start
        assert outside or first <= segment.start < segment.stop <= last, "cut() was not called"
        return not outside


_calls = contextvars.ContextVar("stack_calls", default=None)


@contextlib.contextmanager
def watched():
    """In this context, Stack calls without caches are recorded in a list of (stack, x, context, keys), as traced."""
    token = _calls.set([])
    try:
        yield _calls.get()
    finally:
        _calls.reset(token)


def _unit(segment: Segment, graph, context, keys, quantized: bool):
    """One unit as a function (x, (state, index, cache)) -> (x, (cache, sums)) that keeps what its segment specifies.

    `quantized`: whether the unit multiplies in 8 bits.
    """

    def body(x, unit_inputs):
        state, index, cache = unit_inputs
        x = by_rows(x)
        state = jax.tree.map(summed, state)
        unit_keys = None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
        if UNIT_INPUT in segment.offload:
            x = jax.tree.map(lambda a: checkpoint_name(a, UNIT_INPUT), x)
        with tracing(in_8_bits=quantized):
            x, cache, *reported = nnx.merge(graph, state)(x, context, index, unit_keys, cache)
        return x, (cache, _checked(reported[0]) if reported else {})

    if segment.save is None:
        assert not segment.offload, segment
        return body
    return jax.checkpoint(body, policy=policy(segment.save, segment.offload), prevent_cse=segment.unroll)


def _checked(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The sums that a unit reports. UserError if one is not float32."""
    for name, value in sums.items():
        if value.dtype != jnp.float32:
            raise UserError(
                f"the units of a Stack report the sum `{name}` in {value.dtype}", where="model",
                why="sums are added over units, microbatches and devices: fewer bits would lose precision, and "
                "integers have no gradient",
                hint=f"jnp.float32({name})",
            )  # fmt: skip
    return sums


def _added(reports: list[dict]) -> dict[str, jax.Array]:
    """The sums over all units of the segments' reports, each by name [units, ...].

    They are concatenated before they are added, so that no cut changes the order of the additions.
    """
    return jax.tree.map(lambda *parts: jnp.concatenate(parts).sum(0), *reports)


def _cut_at(segment: Segment, places: tuple[int, ...]) -> list[Segment]:
    """The segments into which a segment is cut at some units."""
    edges = [segment.start, *sorted({p for p in places if segment.start < p < segment.stop}), segment.stop]
    return [segment._replace(start=a, stop=b) for a, b in itertools.pairwise(edges)]


def _run(segment: Segment, module, x, context, keys, caches, quantized):
    graph, state = nnx.split(module)
    body = _unit(segment, graph, context, keys, quantized)
    indices = jnp.arange(segment.start, segment.stop)
    if not segment.unroll:
        return jax.lax.scan(body, x, (state, indices, caches))
    body = jax.jit(body)  # traced once for all identical units
    outs, count = [], segment.stop - segment.start
    for j, unit_state in enumerate(forms().units(state, count)):
        x, out = body(x, (unit_state, *entry((indices, caches), j)))
        outs.append(out)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


@jax.custom_vjp
def summed(x):
    """x, whose cotangent is summed over all its uses before it is added to an accumulator.

    This keeps the order of additions of plain gradients, and keeps slices of x away from the accumulator: jax 0.10
    cannot transpose a slice into one.
    """
    return x


summed.defvjp(lambda x: (x, None), lambda _, g: (g,))


def _merge(graph, like, arrays):
    state = jax.tree.map(lambda leaf: leaf, like)
    nnx.replace_by_pure_dict(state, arrays)
    return nnx.merge(graph, state)


def _named_over_layers(state):
    """The abstract state of one unit with the logical axis `layers` before each parameter's own names."""

    def prefixed(variable):
        names = variable.get_metadata().get("out_sharding")
        return variable.replace(out_sharding=("layers", *names)) if names else variable

    return jax.tree.map(prefixed, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def stacks(model) -> dict[tuple, Stack]:
    """Every Stack in a model by its path."""
    return {path: node for path, node in nnx.iter_graph(model) if isinstance(node, Stack)}


def named_stacks(model) -> dict[str, Stack]:
    """Every Stack in a model by its dotted path, as in plans and parameter trees."""
    return {".".join(map(str, path)): stack for path, stack in stacks(model).items()}


def is_stack(node: Any) -> bool:
    """Whether a node of a nested parameter dict is a segmented stack."""
    return isinstance(node, dict) and SEGMENTS in node
