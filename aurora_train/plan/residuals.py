"""Computes what one unit of a stack keeps for its backward pass under any save-set, and what it has to recompute.

One abstract trace gives a graph whose outputs are the residuals of the unit with everything kept. A save-set is then
scored without JAX: walk back from the residuals and stop at values whose `checkpoint_name` is saved (those are kept)
and at the unit's inputs; every equation on the way is recomputed. `jax.checkpoint` with `save_only_these_names` gives
the same result by partial evaluation, but needs a trace for each save-set. Names inside a `lax.scan` of the unit are
invisible: its body is one equation here, kept or recomputed as a whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from aurora_train.compat import jaxprs_in_params, open_jaxpr
from aurora_train.nn import lora
from aurora_train.nn.saving import UNIT_INPUT, can_offload, tag_of
from aurora_train.nn.stack import Stack
from aurora_train.nn.tracing import current, tracing
from aurora_train.plan.flops import FREE, PRODUCTS, equation_flops, is_reduction

MOST_MOVED = 10  # every subset of this many of the largest tensors is tried
SETS_AT_ONCE = 4096  # save-sets scored in one walk, which bounds the memory of `points`

INLINED = frozenset(
    ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
)
# XLA fuses these neither with what precedes them nor with what follows: they read and write memory.
UNFUSED = frozenset(
    ("sort", "top_k", "cumsum", "cumprod", "cummax", "cumlogsumexp", "argmax", "argmin", "dynamic_update_slice")
    + ("reduce_window_sum", "reduce_window_max")
)
SELECTING = frozenset(("gather", "dynamic_slice"))  # these read only as much of their operand as they return


@dataclass(frozen=True)
class Score:
    """What a save-set costs one unit; bytes exclude the weights and all other inputs but the carried x.

    `flops` is what the backward pass recomputes: 2 M N K for a product, one for each element of anything else;
    `dot_flops` is the products' part. `moved_bytes`: what the recomputed products, reductions, gathers and loops read
    and write, plus values they or the backward pass need in memory. `used`: the saved names that have an effect, in
    forward order; the others are shadowed by them or not needed. `save` None: no checkpoint, every residual is kept.
    `offload`: names kept in the processor's memory, of `offloaded_bytes`, which are not in `saved_bytes`.
    """

    saved_bytes: int
    flops: int
    moved_bytes: int
    used: tuple[str, ...]
    save: tuple[str, ...] | None = None
    dot_flops: int = 0
    offload: tuple[str, ...] = ()
    offloaded_bytes: int = 0


class _Equation(NamedTuple):
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    name: str | None  # the tag, if the equation is a checkpoint_name
    kept_bytes: int  # bytes kept if that tag is saved
    cost: np.ndarray  # int64[3]: flops, dot_flops, moved_bytes


class UnitGraph:
    """A unit's forward pass as equations over numbered values, pruned to what its residuals need; see `trace_unit`."""

    def __init__(self, equations, residuals: dict[int, int], carried: dict[int, int], common: set[int]):
        """`residuals` and `carried`: bytes by value; inputs other than the carried x are in neither.

        `common`: values that are the same for all units. `shared_bytes` counts those that are kept without a
        checkpoint, once for the whole stack (attention masks, reshaped rotary tables): a scan hoists them.
        """
        self._equations, self._residuals, self._carried = equations, residuals, carried
        self.tags = tuple(dict.fromkeys(e.name for e in equations if e.name is not None))
        self.carried_bytes = sum(carried.values())
        self.shared_bytes = sum(size for value, size in residuals.items() if value in common)
        self._all_bytes = sum(residuals.values()) - self.shared_bytes

    def score(self, save: Iterable[str] | None) -> Score:
        """The score of one save-set; None means no checkpoint. A name that the unit lacks saves nothing, as in JAX.

        Takes about a millisecond. To score many, `points` takes microseconds for each.
        """
        if save is None:
            return Score(self._all_bytes, 0, 0, ())
        save = tuple(save)
        return replace(self._scores([frozenset(save)])[0], save=save)

    def offloads(self, score: Score) -> list[Score]:
        """The score itself, and one score for each subset of its kept tensors moved to the processor's memory."""
        sizes = self.kept_by_name(score.save)
        movable = sorted((tag for tag in sizes if can_offload(tag)), key=sizes.get, reverse=True)
        choices = _subsets(movable[:MOST_MOVED])
        return [offloaded(score, tuple(tag for tag in sizes if tag in chosen), sizes) for chosen in choices]

    def kept_by_name(self, save: tuple[str, ...]) -> dict[str, int]:
        """What a save-set keeps, in bytes by tag; the activation carried between units is under `unit_input`."""
        wanted, kept = set(self._residuals), dict.fromkeys(save, 0)
        for equation in reversed(self._equations):
            if wanted.isdisjoint(equation.outputs):
                continue
            if equation.name in kept:
                kept[equation.name] += equation.kept_bytes
            else:
                wanted.update(equation.inputs)
        kept[UNIT_INPUT] = sum(size for value, size in self._carried.items() if value in wanted)
        return {tag: size for tag, size in kept.items() if size}

    def points(self, max_tags: int = 14) -> list[Score]:
        """Every save-set that differs in what it keeps, scored once: `save` holds only names that have an effect.

        If there are more than `max_tags` tags, all subsets of the `max_tags` that save most recomputation per byte are
        enumerated; each further tag is then added to the frontier so far, which skips some inferior points.
        """
        alone = [score for score in self._scores([frozenset((tag,)) for tag in self.tags]) if score.used]
        nothing = self.score(())
        gain = {s.used[0]: (nothing.flops - s.flops) / max(s.saved_bytes, 1) for s in alone}
        tags = sorted(gain, key=gain.get, reverse=True)
        scores = self._distinct(_subsets(tags[:max_tags]))
        for tag in tags[max_tags:]:
            best = frontier(scores.values())
            scores |= self._distinct([frozenset((*score.save, tag)) for score in best])
        return list(scores.values())

    def _distinct(self, saves: list[frozenset[str]]) -> dict[tuple[str, ...], Score]:
        distinct: dict[tuple[str, ...], Score] = {}
        for start in range(0, len(saves), SETS_AT_ONCE):
            for score in self._scores(saves[start : start + SETS_AT_ONCE]):
                distinct.setdefault(score.used, score)
        return distinct

    def _scores(self, saves) -> list[Score]:
        """All save-sets in one walk: each value has a flag per save-set for whether the backward pass needs it."""
        saved = {tag: np.array([tag in save for save in saves]) for tag in self.tags}
        every = np.ones(len(saves), bool)
        wanted = dict.fromkeys(self._residuals, every)
        used = {tag: ~every for tag in self.tags}
        kept = np.zeros(len(saves), np.int64)
        cost = np.zeros((3, len(saves)), np.int64)
        for equation in reversed(self._equations):
            flags = [wanted.pop(value) for value in equation.outputs if value in wanted]
            met = flags[0] if len(flags) == 1 else np.logical_or.reduce(flags)
            if equation.name is not None:
                hit = met & saved[equation.name]
                used[equation.name] |= hit
                kept += hit * equation.kept_bytes
                met = met & ~hit
            if equation.cost.any():
                cost += equation.cost[:, None] * met
            for value in equation.inputs:
                wanted[value] = wanted[value] | met if value in wanted else met
        for value, size in self._carried.items():
            if value in wanted:
                kept += wanted[value] * size
        hits = np.array([used[tag] for tag in self.tags]).reshape(len(self.tags), len(saves)).T
        names = [tuple(itertools.compress(self.tags, row)) for row in hits.tolist()]
        rows = zip(kept.tolist(), *cost.tolist(), names, strict=True)
        return [Score(size, flops, moved, name, name, dots) for size, flops, dots, moved, name in rows]


def offloaded(score: Score, tags: tuple[str, ...], sizes: dict[str, int]) -> Score:
    """The score with the tensors of these tags moved to the processor's memory. `sizes`: its `kept_by_name`."""
    moved = sum(sizes.get(tag, 0) for tag in tags)
    save = tuple(tag for tag in score.save if tag not in tags)
    return replace(score, saved_bytes=score.saved_bytes - moved, save=save, offload=tags, offloaded_bytes=moved)


def _subsets(names: list[str]) -> list[frozenset[str]]:
    sizes = range(len(names) + 1)
    return [frozenset(s) for size in sizes for s in itertools.combinations(names, size)]


def frontier(points: Iterable[Score]) -> list[Score]:
    """The scores that no other beats in both saved_bytes and flops, by rising bytes and strictly falling flops."""
    best: list[Score] = []
    for point in sorted(points, key=lambda p: (p.saved_bytes, p.flops, len(p.used))):
        if not best or point.flops < best[-1].flops:
            best.append(point)
    return best


def trace_unit(fun: Callable, x: Any, weights: Any, *others: Any, shared: Sequence[int] = ()) -> UnitGraph:
    """The graph of `fun(x, weights, *others)` -> pytree, differentiated in x and weights only; nothing is computed.

    `x` is the activation carried from unit to unit. `others` (index, context, keys) get no gradient, as in a training
    step; those at the positions `shared` are the same for all units. All are pytrees of arrays or ShapeDtypeStructs.
    For another machine, call within `tracing(target=...)`.
    """

    def residuals(x, weights, *others):
        return jax.tree.leaves(jax.vjp(lambda x, w: fun(x, w, *others), x, weights)[1])

    jaxpr = jax.make_jaxpr(residuals)(x, weights, *others).jaxpr
    flat = _Flattened(jaxpr)
    parts = [len(jax.tree.leaves(part)) for part in (x, weights, *others)]
    owners = [number for number, size in enumerate(parts) for _ in range(size)]
    carried = {flat.ids[v]: num_bytes(v.aval) for v in jaxpr.invars[: parts[0]]}
    given = {flat.ids[v] for v in (*jaxpr.invars, *jaxpr.constvars)} - carried.keys()
    wanted = {i: num_bytes(aval) for i, aval in flat.outputs(jaxpr) if i not in given}
    own = {flat.ids[v] for v, owner in zip(jaxpr.invars, owners, strict=True) if owner - 2 not in shared}
    common = _independent(flat.equations, own) if shared else set()
    return UnitGraph(_costed(_needed(flat.equations, wanted), wanted), wanted, carried, common)


def trace_stack_unit(stack: Stack, x: Any, context: Any, keys: Any = None) -> UnitGraph:
    """`trace_unit` of one unit of a Stack. `x`, `context`, `keys`: as the Stack takes them, abstract or not."""
    fun, weights, others = stack_unit(stack)
    return trace_unit(fun, x, weights, *others, context, keys, shared=(len(others),))


def stack_unit(stack: Stack) -> tuple[Callable, nnx.State, tuple]:
    """(fun, weights, others) such that the Stack runs `fun(x, weights, *others, context, keys)` for each unit.

    `stack` may be abstract and may be cut. If a stack has adapters, only these are `weights`; its frozen parameters
    and the unit's index are among the others.
    """
    graph, state = nnx.split(stack.segments[0])
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    trained, frozen = lora.split(state)

    def fun(x, trained, frozen, index, context, keys):
        unit_keys = None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
        with tracing(in_8_bits=current().fp8_ends is not None):
            return nnx.merge(graph, trained, frozen)(x, context, index, unit_keys, None)

    return fun, trained, (frozen, jax.ShapeDtypeStruct((), jnp.int32))


def kept_bytes(closed) -> int:
    """Bytes of the results of a closed jaxpr that are not its own arguments, each once."""
    jaxpr = open_jaxpr(closed)
    results = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    return sum(num_bytes(v.aval) for v in results - {*jaxpr.invars, *jaxpr.constvars})


def num_bytes(aval) -> int:
    """Bytes of an abstract value; PRNG keys count their own size."""
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def _is_fused(equation) -> bool:
    name = equation.primitive.name
    bodies = next(jaxprs_in_params(equation.params), None)
    kernel = bodies is not None or "call" in name or name.startswith("dot_product_attention")
    return not (name in PRODUCTS or name in UNFUSED or name.startswith("scatter") or kernel)


class _Flattened:
    """The equations of a jaxpr with called jaxprs inlined; `ids` numbers the values of the outermost one."""

    def __init__(self, jaxpr):
        self._next = itertools.count()
        self.ids = {v: next(self._next) for v in (*jaxpr.invars, *jaxpr.constvars)}
        self.equations: list[tuple[Any, tuple, tuple]] = []  # (equation, ids in or None for a literal, ids out)
        self._inline(jaxpr, self.ids)

    def outputs(self, jaxpr) -> list[tuple[int, Any]]:
        return [(self.ids[v], v.aval) for v in jaxpr.outvars if not isinstance(v, core.Literal)]

    def _inline(self, jaxpr, ids) -> None:
        for equation in jaxpr.eqns:
            inputs = tuple(None if isinstance(v, core.Literal) else ids[v] for v in equation.invars)
            body = next(jaxprs_in_params(equation.params), None)
            if equation.primitive.name in INLINED and body is not None:
                inner = {v: next(self._next) for v in body.constvars}
                # No equation produces a literal argument, so it costs and keeps nothing.
                inner |= {v: next(self._next) if i is None else i for v, i in zip(body.invars, inputs, strict=True)}
                self._inline(body, inner)
                made = [next(self._next) if isinstance(v, core.Literal) else inner[v] for v in body.outvars]
                ids |= dict(zip(equation.outvars, made, strict=True))
            else:
                ids |= {v: next(self._next) for v in equation.outvars}
                self.equations.append((equation, inputs, tuple(ids[v] for v in equation.outvars)))


def _needed(equations, wanted) -> list:
    """The equations that the `wanted` values depend on, in forward order."""
    wanted, kept = set(wanted), []
    for equation, inputs, outputs in reversed(equations):
        if not wanted.isdisjoint(outputs):
            wanted.update(i for i in inputs if i is not None)
            kept.append((equation, inputs, outputs))
    return kept[::-1]


def _independent(equations, values: set[int]) -> set[int]:
    """The values that do not depend on any of `values`."""
    dependent, independent = set(values), set()
    for _, inputs, outputs in equations:
        (independent if dependent.isdisjoint(inputs) else dependent).update(outputs)
    return independent


def _costed(equations, residuals) -> list[_Equation]:
    """The equations with their costs. A fused chain writes only what the backward pass or an unfused equation needs,
    and is taken to read as much."""
    stored = set(residuals).union(*(inputs for equation, inputs, _ in equations if not _is_fused(equation)))
    costed = []
    for equation, inputs, outputs in equations:
        name = tag_of(equation.primitive.name, equation.params)
        sizes = [num_bytes(v.aval) for v in equation.outvars]
        if not _is_fused(equation):
            moved = sum(sizes) + sum(num_bytes(v.aval) for v in equation.invars)
        elif equation.primitive.name in SELECTING:
            moved = 2 * sum(sizes)
        elif is_reduction(equation.primitive.name):
            moved = sum(sizes) + num_bytes(equation.invars[0].aval)
        elif equation.primitive.name in FREE:
            moved = 0
        else:
            moved = 2 * sum(size for size, i in zip(sizes, outputs, strict=True) if i in stored)
        flops, dots = equation_flops(equation)
        cost = np.array([flops, dots, moved], np.int64)
        costed.append(_Equation(tuple(i for i in inputs if i is not None), outputs, name, sum(sizes), cost))
    return costed
