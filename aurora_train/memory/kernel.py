"""One launch of a GPU, and which launches XLA makes one of: its MultiOutputFusion, in short."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

ONE_ELEMENT = 8  # bytes at most: that much in common is no reason to fuse


@dataclass
class Kernel:
    """One launch. `in_place`: an output may take the place of an input that dies; `bodies`: of a loop or branch."""

    reads: frozenset[int]
    writes: tuple[int, ...]
    label: str
    order: int
    in_place: bool = False
    bodies: list = field(default_factory=list)
    must_share: bool = False  # a loop, a scatter: XLA knows from the start that it works in place
    shunned: bool = False  # writes into a whole stack or carries one: XLA's list scheduler counts all of it as new
    members: int = 0  # orders of what it was made of, a bit each
    touches: frozenset[int] = frozenset()  # of a fused launch: all it reads, arguments and slices included
    operands: tuple[int, ...] = ()  # `reads` in the order in which they are written in the program
    elements: int = 0  # of a fused launch: of what it runs over, the operand of a reduction or else the result
    axes: tuple[int, ...] | None = None  # of a reduction
    arguments: frozenset[int] = frozenset()  # what it reads of its program's arguments
    after: tuple[int, ...] = ()  # orders of launches that must run before it, though it reads nothing of theirs
    adds_parts: bool = False  # of a product whose contraction was split
    rows: bool = False  # of a reduction: over the last axis alone
    kept: frozenset[int] = frozenset()  # inputs whose place it cannot take


def with_siblings(kernels: list[Kernel], size: dict[int, int], custom: set[int]) -> list[Kernel]:
    """Fused launches that read one array in common and run over as many elements become one with several outputs.

    XLA's MultiOutputFusion, siblings: reductions over the same axes, and elementwise results beside them. An
    elementwise result and what reads it too, where nothing else is needed in between. Never for what a kernel in
    `custom` made.
    """
    needs = needs_of(kernels)
    size = {number: nbytes for number, nbytes in size.items() if number not in custom and nbytes > ONE_ELEMENT}
    out, by_elements = [], defaultdict(list)
    for k in kernels:
        k.members = 1 << k.order
        fused = k.in_place and k.touches and len(k.writes) == 1
        twin = next((o for o in by_elements[k.elements] if _are_siblings(o, k, needs, size)), None) if fused else None
        if twin is None:
            out.append(k)
            if k.in_place and k.touches and k.writes:
                by_elements[k.elements].append(k)
            continue
        twin.operands += tuple(o for o in k.operands if o not in twin.reads and o not in twin.writes)
        twin.reads |= k.reads - set(twin.writes)
        twin.writes += k.writes
        twin.touches |= k.touches
        twin.arguments |= k.arguments
        twin.axes = k.axes if twin.axes is None else twin.axes
        twin.members |= k.members
        members = list(orders(twin.members))
        for later in needs:
            if needs[later] & twin.members:
                needs[later] |= twin.members
                for member in members:
                    needs[later] |= needs[member]
    return out


def join_parts(kernels: list[Kernel]) -> list[Kernel]:
    """Where one elementwise kernel alone reads the sum of a product's parts, it adds them itself."""
    readers = defaultdict(list)
    for k in kernels:
        for number in k.reads:
            readers[number].append(k)
    gone = set()
    for k in kernels:
        if not k.adds_parts or len(k.writes) != 1 or len(readers[k.writes[0]]) != 1:
            continue
        (reader,) = readers[k.writes[0]]
        if not (reader.in_place and reader.touches) or reader.axes not in (None, k.axes) or reader.bodies:
            continue
        (partial,) = k.reads
        swap = {k.writes[0]: partial}
        reader.operands = tuple(swap.get(o, o) for o in reader.operands)
        reader.reads = frozenset(swap.get(r, r) for r in reader.reads)
        reader.touches = frozenset(swap.get(r, r) for r in reader.touches)
        reader.elements, reader.axes, reader.adds_parts = k.elements, k.axes, True
        readers[partial] = [reader]
        gone.add(k.order)
    return [k for k in kernels if k.order not in gone]


def mark_tiled(kernels: list[Kernel]) -> None:
    """Mark what is normalised by sums or maxima of its own rows, such as a softmax.

    XLA's SoftmaxRewriterTriton makes one tiled kernel of such a diamond, and that never writes over what it reads.
    """
    reductions = {w: k for k in kernels if k.rows for w in k.writes}
    for k in kernels:
        if not k.in_place or k.axes is not None or k.bodies:
            continue
        summed = [reductions[r] for r in k.operands if r in reductions]
        k.kept = frozenset().union(*(s.touches for s in summed)) & k.touches


def _are_siblings(one: Kernel, other: Kernel, needs, size) -> bool:
    if one.axes is not None and other.axes is not None and one.axes != other.axes:
        return False
    between = needs[other.order] & one.members
    if between:  # a result and what reads it: no third may be needed in between
        return one.axes is None and not any(
            needs[n] & one.members for n in orders(needs[other.order] & ~one.members)
        )
    return not size.keys().isdisjoint(one.touches & other.touches)


def needs_of(kernels: list[Kernel]) -> dict[int, int]:
    """Kernel -> all kernels that must run before it, a bit for each order: sets of them took most of a simulation.

    They may come in any order; in the program's it takes one pass.
    """
    made_by = {w: k.order for k in kernels for w in k.writes}
    direct = {k.order: {made_by[r] for r in k.reads if r in made_by} - {k.order} for k in kernels}
    needs = {order: bits(before) for order, before in direct.items()}
    grown = True
    while grown:
        grown = False
        for order, before in direct.items():
            known = needs[order]
            for n in before:
                needs[order] |= needs[n]
            grown |= needs[order] != known
    return needs


def bits(numbers: Iterable[int]) -> int:
    """A set of small numbers as one integer."""
    out = 0
    for n in numbers:
        out |= 1 << n
    return out


def orders(mask: int) -> Iterator[int]:
    """The numbers of such a set, the largest first."""
    while mask:
        n = mask.bit_length() - 1
        yield n
        mask ^= 1 << n
