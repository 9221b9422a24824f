"""Which matrix products XLA:GPU makes one of, before anything else: its DotMerger, in short.

Small products that read one matrix in common, such as query, key and value of a layer, become one product with the
other matrices side by side; what read their results reads slices of its result.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

LARGEST = 32 << 20  # bytes that a product which is merged reads and writes: XLA's xla_gpu_dot_merger_threshold_mb


class Equation(NamedTuple):
    """What of a jaxpr's equation is looked at."""

    primitive: Any
    params: dict
    invars: list
    outvars: list
    effects: frozenset = frozenset()


def merge_products(program) -> None:
    """Merge the small products of a `Program` in place."""
    groups = defaultdict(list)
    for index in sorted(program.live):
        for side in (0, 1):
            key = _key(program, index, side)
            if key is not None:
                groups[key].append(index)
    merged: set[int] = set()
    for (_, _, side, *_), indices in groups.items():
        chosen: list[int] = []
        others: set[int] = set()  # the same product twice is not merged
        for index in indices:
            other = program.equations[index][1][1 - side]
            if index not in merged and other not in others and not _needs_any(program, index, chosen):
                chosen.append(index)
                others.add(other)
        if len(chosen) > 1:
            merged.update(chosen)
            _merge(program, chosen, side)


def _key(program, index: int, side: int) -> tuple | None:
    """What products that can be merged have in common; `side` is of the matrix that they share."""
    equation, reads, writes = program.equations[index]
    if equation.primitive.name != "dot_general" or len(reads) != 2 or reads[0] == reads[1]:
        return None
    contracted, batched = equation.params["dimension_numbers"]
    other = equation.invars[1 - side].aval
    if any(batched) or len(other.shape) - len(contracted[1 - side]) != 1:
        return None
    if sum(program.size[n] for n in (*reads, *writes)) > LARGEST:
        return None
    result = equation.outvars[0].aval.dtype
    turned = program.turned.get(equation.invars[side])
    return reads[side], turned, side, str(contracted), str(other.dtype), str(result)


def _needs_any(program, index: int, others: list[int]) -> bool:
    """Whether an equation needs the result of one of these, which come before it."""
    pending, seen, first = [index], set(), min(others, default=index)
    while pending:
        for number in program.equations[pending.pop()][1]:
            maker = program.producer.get(number)
            if maker in others:
                return True
            if maker is not None and maker > first and maker not in seen:
                seen.add(maker)
                pending.append(maker)
    return False


def _merge(program, indices: list[int], side: int) -> None:
    """One product in the place of the last of several, and a slice of its result for each."""
    whole = program.new()
    program.size[whole] = sum(program.size[program.equations[i][2][0]] for i in indices)
    equation, reads, _ = program.equations[indices[-1]]
    shared, others = reads[side], [program.equations[i][1][1 - side] for i in indices]
    variables = [program.equations[i][0].invars[1 - side] for i in indices]
    contracted = equation.params["dimension_numbers"][0][1 - side]
    other = _side_by_side(variables, next(d for d in range(len(variables[0].aval.shape)) if d not in contracted))
    free = len(equation.outvars[0].aval.shape) - 1 if side == 0 else 0
    result = _side_by_side([program.equations[i][0].outvars[0] for i in indices], free)
    operands = [equation.invars[0], other] if side == 0 else [other, equation.invars[1]]
    order = [shared, others[0]] if side == 0 else [others[0], shared]
    product = Equation(equation.primitive, equation.params, operands, [result])
    for index in indices:
        for number in program.equations[index][1]:
            program.users[number] = program.users[number] - {index} | {indices[-1]}
    results = [(program.equations[i][0].outvars, program.equations[i][2]) for i in indices]
    program.live.difference_update(indices)
    program.equations[indices[-1]] = (product, [*order, *others[1:]], [whole])
    program.live.add(indices[-1])
    program.producer[whole] = indices[-1]
    for outvars, writes in results:
        at = len(program.equations)
        program.equations.append((Equation(_SLICE, {}, [result], outvars), [whole], writes))
        program.producer[writes[0]] = at
        program.live.add(at)
        program.users[whole].add(at)


_SLICE = SimpleNamespace(name="slice")


def _side_by_side(variables, dimension: int):
    """A variable of the arrays of several, concatenated."""
    avals = [v.aval for v in variables]
    shape = list(avals[0].shape)
    shape[dimension] = sum(a.shape[dimension] for a in avals)
    return SimpleNamespace(aval=avals[0].update(shape=tuple(shape)))
