"""The peak of a program's temporaries, from its jaxpr alone: what XLA stores, when each value dies, how they pack.

A model of XLA:GPU, not a copy of it. Elementwise work is fused into its consumer and never stored; a matrix product,
a loop, a library kernel or a reduction stores what it reads and writes; a fused kernel may write over an input that
dies there; of the kernels that can run, the one that frees most memory runs first. A loop holds its operands and
results throughout, and besides what one iteration holds. Buffers are packed as XLA packs them: largest first, each
in the lowest gap that is free for its whole life, so that fragmentation is part of the answer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from aurora_train.memory.dataflow import Graph, Kernel

ALIGNMENT = 256
SAME = 5e-4  # schedules closer than this are taken to need the same: small buffers are not all known


class Buffer(NamedTuple):
    """`size` bytes from kernel number `start` to `end`, both included. `cause` is one of `CAUSES` or ""."""

    size: int
    start: int
    end: int
    cause: str
    label: str


@dataclass
class Profile:
    """`peak`: bytes of the packed temporaries, or the middle between two schedules (`profile_of`).

    `buffers` in order of birth; `labels` names the kernels by number.
    """

    peak: int
    buffers: list[Buffer]
    labels: list[str] = field(default_factory=list)
    algorithm: str = ""

    def live(self) -> list[int]:
        """Bytes that are live at each kernel, before packing."""
        change = [0] * (len(self.labels) + 1)
        for buffer in self.buffers:
            change[buffer.start] += buffer.size
            change[buffer.end + 1] -= buffer.size
        out, now = [], 0
        for delta in change[:-1]:
            now += delta
            out.append(now)
        return out

    def by_cause(self, moment: int) -> dict[str, int]:
        """Live bytes at one kernel, by cause."""
        out: dict[str, int] = defaultdict(int)
        for buffer in self.buffers:
            if buffer.start <= moment <= buffer.end:
                out[buffer.cause or "workspace"] += buffer.size
        return dict(out)


def profile(closed, *, donated: frozenset = frozenset()) -> Profile:
    """The temporaries of a ClosedJaxpr. `donated`: positions of outputs that are written over an argument."""
    return profile_of(Graph(closed, donated=donated))


def profile_of(graph: Graph) -> Profile:
    """The same for a graph that is already built."""
    least = best = None
    for algorithm in (by_list, depth_first, post_order):
        # XLA compares its schedules before it knows which buffers fused kernels will share.
        guess = _Clock(algorithm, sharing=False)
        _lay_out(graph, guess)
        needed = max(Profile(0, guess.buffers, guess.labels).live(), default=0)
        if least is None or needed < (1 - SAME) * least:
            least, best = needed, algorithm
    return _packed(graph, best)


def _packed(graph: Graph, algorithm) -> Profile:
    clock = _Clock(algorithm)
    _lay_out(graph, clock)
    buffers = [b for b in clock.buffers if b.size]
    return Profile(pack(buffers), buffers, clock.labels, algorithm.__name__)


class _Clock:
    def __init__(self, algorithm, sharing: bool = True):
        self.algorithm, self.sharing, self.labels, self.buffers = algorithm, sharing, [], []


def _lay_out(graph: Graph, clock: _Clock) -> None:
    """Schedule a graph, run its loops inside, and note when each buffer lives."""
    order = clock.algorithm(graph)
    last, ends = {}, set(graph.outputs)
    for position, kernel in enumerate(order):
        for number in (*kernel.reads, *kernel.writes, *kernel.arguments):
            last[number] = position
    open_buffers: dict[int, list] = {}  # value -> [size, start, cause, label]
    if not clock.sharing:
        open_buffers |= {n: [graph.size[n], len(clock.labels), "", "argument"] for n in graph.replaced}
    looped: set[int] = set()  # results of loops: XLA gives their buffers to no fused kernel
    for position, kernel in enumerate(order):
        start = len(clock.labels)
        clock.labels.append(kernel.label)
        dying = [r for r in kernel.reads if r in open_buffers and last[r] == position and r not in ends]
        shares = kernel.in_place and (clock.sharing or kernel.must_share)
        spare = dying if kernel.must_share else [r for r in dying if r not in looped and r not in kernel.kept]
        inherited = _reuse(kernel, spare, graph) if shares else {}
        if kernel.bodies:
            looped.update(kernel.writes)
        for number in kernel.writes:
            if clock.sharing and (number in graph.free or number in graph.donated):
                continue
            if clock.sharing and _follows(graph, kernel, number, last, position):
                continue
            whole = None if clock.sharing else graph.whole.get(number)
            if number in graph.free and whole is None:
                continue
            source = inherited.get(number)
            if source is not None:
                held = open_buffers.pop(source)
                held[2] = graph.cause.get(number, held[2])
                open_buffers[number] = held
            else:
                open_buffers[number] = [whole or graph.size[number], start, graph.cause.get(number, ""), kernel.label]
        for body in kernel.bodies:
            _lay_out(body, clock)
        now = len(clock.labels) - 1
        replaced = [t for t in kernel.arguments if t in graph.replaced and last[t] == position]
        for number in (*dying, *replaced, *(w for w in kernel.writes if last[w] == position and w not in ends)):
            if number in open_buffers:
                _close(open_buffers.pop(number), now, clock)
    now = len(clock.labels) - 1
    for held in open_buffers.values():
        _close(held, max(now, held[1]), clock)


def _follows(graph: Graph, kernel: Kernel, number: int, last, position: int) -> bool:
    """Whether a loop's carry is written where the one of the iteration before was: nothing reads that any more."""
    old = graph.carries.get(number)
    if old is None or graph.size[old] != graph.size[number]:
        return False
    return last.get(old, -1) < position or (last[old] == position and kernel.in_place)


def _close(held, now, clock):
    size, start, cause, label = held
    clock.buffers.append(Buffer(size, start, now, cause, label))


def _reuse(kernel: Kernel, dying, graph: Graph) -> dict[int, int]:
    """Outputs that take over the buffer of an input of the same size that dies here."""
    spare = defaultdict(list)
    for number in dying:
        spare[graph.size[number]].append(number)
    out = {}
    for number in kernel.writes:
        if number not in graph.free and spare[graph.size[number]]:
            out[number] = spare[graph.size[number]].pop()
    return out


def by_list(graph: Graph) -> list[Kernel]:
    """XLA's list scheduler: of the kernels that can run, the one that frees most, or allocates least, comes first."""
    kernels = {k.order: k for k in graph.kernels}
    made = {w for k in graph.kernels for w in k.writes}
    readers, missing = defaultdict(set), {}
    for k in graph.kernels:
        missing[k.order] = {r for r in k.reads if r in made}
        for r in k.reads:
            readers[r].add(k.order)
    followers = defaultdict(set)
    for k in graph.kernels:
        missing[k.order] |= {("after", o) for o in k.after}
        for o in k.after:
            followers[o].add(k.order)
    left = {number: set(orders) for number, orders in readers.items()}
    keep = set(graph.outputs)

    def gain(order: int) -> int:
        k = kernels[order]
        dying = [r for r in k.reads if r in made and r not in keep and left[r] == {order}]
        written = k.writes  # all of them: what is donated or written in place counts as new too
        if k.in_place and k.bodies:
            dying, written = _without_reused(dying, written, graph.size)
        return sum(graph.size[r] for r in dying) - sum(graph.size[w] for w in written)

    read_by = {o: len(set().union(*(readers[w] for w in k.writes))) for o, k in kernels.items()}

    def rank(order: int) -> tuple:
        k, freed = kernels[order], gain(order)
        # A stack counts as new with all its bytes; the parts that are added into it may be more.
        outweighs = k.adds_parts and freed > sum(graph.whole.get(w, 0) for w in k.writes)
        return outweighs or not k.shunned, freed, read_by[order], -order

    out = []
    ready = {o for o, needs in missing.items() if not needs}
    while ready:
        order = max(ready, key=rank)
        ready.remove(order)
        k = kernels[order]
        out.append(k)
        for r in k.reads:
            left[r].discard(order)
        done = [(w, reader) for w in k.writes for reader in readers[w]]
        for what, reader in [*done, *((("after", order), follower) for follower in followers[order])]:
            missing[reader].discard(what)
            if not missing[reader]:
                ready.add(reader)
    assert len(out) == len(graph.kernels), "a cycle"
    return out


def depth_first(graph: Graph) -> list[Kernel]:
    """XLA's depth-first scheduler: operands first, those with most other users, then largest, before the others."""
    maker = {w: k for k in graph.kernels for w in k.writes}
    users = defaultdict(set)
    for k in graph.kernels:
        for r in k.reads:
            users[r].add(k.order)
    operands = {
        k.order: {maker[r].order: maker[r] for r in sorted(k.reads) if r in maker} for k in graph.kernels
    }
    weight: dict[int, tuple[int, int]] = {}
    for k in _topological(graph.kernels, operands):
        others = max(len(set().union(*(users[w] for w in k.writes))) - 1, 0) if k.writes else 0
        total = sum(graph.size[w] for w in k.writes if w not in graph.free)
        below = [weight[o] for o in operands[k.order]]
        weight[k.order] = (others + sum(b[0] for b in below), total + sum(b[1] for b in below))
    def ordered(found):
        return sorted(found, key=lambda o: (-weight[o.order][0], -weight[o.order][1]))

    return _visit(graph, maker, ordered, graph.outputs)


def post_order(graph: Graph) -> list[Kernel]:
    """XLA's post-order scheduler: operands first, as they are written.

    A loop's counter is its first result, and what reads the old one, each write into a stack, comes before it. So it
    was in the backward loops that were compiled; in forward loops the carry came first.
    """
    maker = {w: k for k in graph.kernels for w in k.writes}
    outputs = list(graph.outputs)
    if graph.loop is not None and graph.loop.reverse:
        outputs = [o for o in reversed(outputs) if o in graph.whole] + [o for o in outputs if o not in graph.whole]
    return _visit(graph, maker, lambda found: found, outputs)


def _visit(graph, maker, ordered, outputs) -> list[Kernel]:
    """Post-order from `outputs`; `ordered(operands)` says which of a kernel's operands is made first."""
    out, seen, by_order = [], set(), {k.order: k for k in graph.kernels}
    roots = ordered(list({maker[o].order: maker[o] for o in outputs}.values()))
    pending = [(k, False) for k in reversed(roots)]
    while pending:
        k, expanded = pending.pop()
        if expanded:
            out.append(k)
        elif k.order not in seen:
            seen.add(k.order)
            pending.append((k, True))
            operands = list({maker[r].order: maker[r] for r in k.operands if r in maker}.values())
            operands = [by_order[o] for o in reversed(k.after)] + operands
            pending.extend((o, False) for o in reversed(ordered(operands)))
    return out


def _topological(kernels, operands) -> list[Kernel]:
    index, state, out = {k.order: k for k in kernels}, {}, []
    for k in kernels:
        pending = [(k.order, False)]
        while pending:
            order, expanded = pending.pop()
            if expanded:
                out.append(index[order])
            elif order not in state:
                state[order] = True
                pending.append((order, True))
                pending.extend((o, False) for o in operands[order] if o not in state)
    return out


def _without_reused(dying, written, size):
    """What really dies and is really allocated by a kernel whose outputs may take the place of its inputs."""
    spare, new = defaultdict(list), []
    for r in dying:
        spare[size[r]].append(r)
    for w in written:
        if spare[size[w]]:
            spare[size[w]].pop()
        else:
            new.append(w)
    return [r for rest in spare.values() for r in rest], new


def pack(buffers: list[Buffer]) -> int:
    """Height of the heap: largest buffer first, each at the lowest offset that fits best beside those it meets.

    XLA's GlobalDecreasingSizeBestFitHeap (xla/service/heap_simulator).
    """
    placed: list[tuple[int, int, int, int]] = []  # offset, top, start, end
    height = 0
    # By whole units of the alignment, so that equal buffers are equal whatever order they come in.
    whole = [buffer._replace(size=-(-buffer.size // ALIGNMENT) * ALIGNMENT) for buffer in buffers]
    for buffer in sorted(whole, key=lambda b: (-b.size, -(b.end - b.start), b.start)):
        size = buffer.size
        meets = sorted(p for p in placed if p[2] <= buffer.end and buffer.start <= p[3])
        best, offset, floor = None, 0, 0
        for low, top, _, _ in meets:
            gap = low - floor
            if gap >= size and (best is None or gap < best):
                best, offset = gap, floor
            floor = max(floor, top)
        if best is None:
            offset = floor
        placed.append((offset, offset + size, buffer.start, buffer.end))
        height = max(height, offset + size)
    return height
