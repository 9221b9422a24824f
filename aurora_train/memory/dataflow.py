"""A program as the kernels that XLA would make of it: elementwise chains fused, loops with a body each."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from aurora_train.compat import scan_parts
from aurora_train.memory.kernel import Kernel, bits, join_parts, mark_tiled, needs_of, with_siblings
from aurora_train.memory.program import Program, is_kernel, nbytes, needed_results
from aurora_train.memory.splits import Chip, Product, splits

REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax",
    "argmin",
}  # fmt: skip
WRITES_REFS = {"addupdate", "swap"}
UNARY = {"convert_element_type", "neg", "exp", "log", "tanh", "logistic", "sqrt", "rsqrt", "erf"}


THIN_ROWS = 4096  # XLA's TreeReductionRewriter cuts a sum down more rows than these into parts


class Loop(NamedTuple):
    """A loop whose body a graph is: its arguments are constants, then what is carried, then slices of what it scans."""

    num_consts: int
    num_carry: int
    length: int = 1
    needed: tuple[bool, ...] | None = None  # which results anybody reads
    reverse: bool = False


class Graph(Program):
    """`cause` of a value where known; `free`: values that live in a buffer that is already there.

    `donated` results are written over an argument in the end, one of `replaced`; XLA schedules as though they were
    not. `whole`: a result of a loop's body -> bytes of the stack it is written into. `carries`: a result -> the
    argument of the next turn that it becomes.
    """

    def __init__(
        self, closed, *, donated: frozenset = frozenset(), shards: int = 1, chip: Chip | None = None,
        loop: Loop | None = None, memo=None,
    ):  # fmt: skip
        super().__init__(closed, shards=shards, needed=loop and loop.needed)
        self._chip, self._memo, self.loop = chip, {} if memo is None else memo, loop
        self.cause: dict[int, str] = {}
        self.donated = {self.results[i] for i in donated if self.results[i] is not None} - self.external
        self.replaced = {self.inputs[i] for i in donated}
        self.free = {version for version, array in self.refs.items() if array in self.external}
        self.whole: dict[int, int] = {}
        self.carries: dict[int, int] = {}
        self._sliced: set[int] = set()
        if loop is not None:
            scanned = loop.num_consts + loop.num_carry
            self._sliced = set(self.inputs[scanned:])
            old = self.inputs[loop.num_consts : scanned]
            self.carries = {r: a for r, a in zip(self.results, old, strict=False) if r in self.outputs}
            self.free |= {v for v in self.outputs if self._is_written_carry(v)}
        self._decide()
        self._attribute()
        self.kernels = self._make_kernels()
        if loop is not None:
            self._stack_results(self.results[loop.num_carry :])
            self._linearise()

    def _is_written_carry(self, number: int) -> bool:
        """Whether a result of a loop's body is what it was given with one slice written: that happens in place."""
        equation, reads, _ = self.equations[self.producer[number]]
        return equation.primitive.name == "dynamic_update_slice" and reads[0] in self.external

    # ---- what is stored

    def _decide(self) -> None:
        self._stored, self._copied = set(self.outputs), set()
        self._stored.update(n for n in self.barriers if self.producer.get(n) in self.live)
        for index in self.live:
            equation, reads, writes = self.equations[index]
            if is_kernel(equation.primitive.name):
                self._stored.update(writes)
                self._stored.update(r for r in reads if r not in self.external)
                self._copied.update(r for r in reads if r in self._sliced)
            elif equation.primitive.name in REDUCTIONS:
                self._stored.update(writes)
                if self._is_thin(equation):
                    self._stored.update(r for r in reads if r not in self.external)
            else:
                self._stored.update(r for r in reads if self._grows(r, writes[0]) and self._has_logarithm(r))
            if equation.primitive.name in ("add", "add_any") and all(self._is_parted(r, index) for r in reads):
                self._stored.update(writes)
        self._alone = self._normalised()
        self._stored |= self._alone

    def _grows(self, number: int, result: int) -> bool:
        """Whether one element of a value goes into many of a result."""
        return number not in self.external and 0 < 64 * self.size[number] <= self.size[result]

    def _has_logarithm(self, number: int) -> bool:
        """Whether elementwise work up to this value takes a logarithm: too dear to do once for every column."""
        pending, seen = [number], set()
        while pending:
            index = self.producer.get(pending.pop())
            if index is None or index in seen:
                continue
            seen.add(index)
            name = self.equations[index][0].primitive.name
            if name == "log":
                return True
            if not is_kernel(name) and name not in REDUCTIONS:
                pending.extend(self.equations[index][1])
        return False

    def _is_thin(self, equation) -> bool:
        """A sum down columns, too short for XLA to cut into parts and too narrow to fill the GPU."""
        shape, axes = equation.invars[0].aval.shape, equation.params["axes"]
        if self._chip is None or len(shape) - 1 in axes:
            return False
        rows = math.prod(shape[i] for i in axes)
        columns = math.prod(shape) // rows
        return 1 < rows <= THIN_ROWS and columns // 32 < self._chip.multiprocessors

    def _normalised(self) -> set[int]:
        """(x - mean) / deviation over the last axis, where several kernels read it: XLA makes a kernel of the whole.

        A norm that does not subtract a mean is left to its readers instead, each of which computes it again.
        """
        found = set()
        for index in self.live:
            equation, reads, writes = self.equations[index]
            if equation.primitive.name != "sub" or len(reads) != 2 or self._reduced(reads[1]) != reads[0]:
                continue
            for user in self.users[writes[0]]:
                scaled, terms, units = self.equations[user]
                others = [t for t in terms if t != writes[0]]
                if scaled.primitive.name in ("mul", "div") and len(others) == 1 and len(self.users[units[0]]) > 1:
                    square = self._reduced(others[0])
                    if square in self.producer and set(self.equations[self.producer[square]][1]) == {writes[0]}:
                        found.add(units[0])
        return found

    def _reduced(self, number: int) -> int | None:
        """What a value is the sum of, where it is nothing but a scaled, shifted or broadcast sum."""
        while number in self.producer:
            equation, reads, _ = self.equations[self.producer[number]]
            if equation.primitive.name == "reduce_sum":
                return reads[0]
            if len(reads) != 1 or is_kernel(equation.primitive.name):
                return None
            number = reads[0]
        return None

    def _sources(self, index: int, known: dict) -> tuple[int, ...]:
        """The stored values and arguments that a fused chain ending in this equation reads, in operand order."""
        pending = [index]
        while pending:
            number = pending[-1]
            inner = [
                self.producer[n]
                for n in self.equations[number][1]
                if n not in self._stored and n not in self.external and self.producer[n] not in known
            ]
            if inner and number not in known:
                pending.extend(inner)
                continue
            pending.pop()
            found: dict[int, None] = {}
            for n in self.equations[number][1]:
                near = n in self._stored or n in self.external
                found.update({n: None} if near else dict.fromkeys(known[self.producer[n]]))
            known[number] = tuple(found)
        return known[index]

    def _attribute(self) -> None:
        """Gradients end in the step's barrier; what one loop stacks and another reads is kept for the backward pass."""
        for number in self.barriers:
            while number in self.producer:
                self.cause[number] = "gradients"
                index = self.producer[number]
                same = [r for r in self.equations[index][1] if self.size[r] == self.size[number]]
                if is_kernel(self.equations[index][0].primitive.name) or len(same) != 1:
                    break
                number = same[0]
        for index in self.live:
            equation, _, writes = self.equations[index]
            if equation.primitive.name != "scan":
                continue
            for number in writes[scan_parts(equation.params)[1] : len(equation.outvars)]:
                readers = {self.equations[i][0].primitive.name for i in self.users[number]}
                if number not in self.cause and "scan" in readers:
                    self.cause[number] = "saved"

    # ---- kernels

    def _make_kernels(self) -> list[Kernel]:
        made, known, copies = [], {}, {}
        empties: dict[tuple, Kernel] = {}
        for index in self._ordered():
            equation, reads, writes = self.equations[index]
            if is_kernel(equation.primitive.name):
                for number in sorted(set(reads) & self._copied - set(copies)):
                    copies[number] = self.new()
                    self.size[copies[number]] = self.size[number]
                    made.append(Kernel(frozenset(), (copies[number],), "slice", len(made)))
                wanted = tuple(copies.get(r, r) for r in reads if r in copies or r in self._stored)
                wanted += self._empties(equation, writes, empties, made)
                made.append(self._launch(equation, wanted, writes, len(made)))
                made[-1].arguments = frozenset(r for r in reads if r in self.external)
                made[-1].in_place |= index in self.summed
                self._split(equation, reads, made)
                continue
            kept = tuple(w for w in writes if w in self._stored)
            if not kept:
                continue
            touches = self._sources(index, known)
            operands = tuple(t for t in touches if t in self._stored)
            sources = frozenset(operands)
            kernel = Kernel(sources, kept, equation.primitive.name, len(made), in_place=True)
            kernel.touches, kernel.operands = frozenset(touches), operands
            kernel.arguments = kernel.touches & self.external
            if not self._alone.isdisjoint(writes):
                kernel.touches = frozenset()  # it has no siblings
            kernel.shunned = equation.primitive.name in WRITES_REFS and not self._writes_whole(equation)
            reduces = equation.primitive.name in REDUCTIONS
            runs_over = equation.invars if reduces or not equation.outvars else equation.outvars
            kernel.elements = int(np.prod(runs_over[0].aval.shape, dtype=np.int64))
            kernel.axes = tuple(equation.params["axes"]) if reduces else None
            kernel.rows = reduces and kernel.axes == (len(runs_over[0].aval.shape) - 1,)
            made.append(kernel)
        made = join_parts(made)
        mark_tiled(made)
        return with_siblings(made, self.size, self._custom_results())

    def _ordered(self) -> list[int]:
        """Equations in the order of the program, and none before what makes its operands, merged products included."""
        out: dict[int, None] = {}
        for index in sorted(self.live):
            pending = [index]
            while pending:
                makers = (self.producer.get(n) for n in self.equations[pending[-1]][1])
                missing = [m for m in makers if m is not None and m not in out and m in self.live and m != pending[-1]]
                pending.extend(missing)
                if not missing:
                    out[pending.pop()] = None
        return list(out)

    def _custom_results(self) -> set[int]:
        """Results of matrix products that XLA makes kernels of before it looks for siblings: they bring none together.

        So it was in all steps compiled for Hopper and for consumer Blackwell, and in none for datacenter Blackwell.
        """
        if self._chip is None or self._chip.capability[0] == 10:
            return set()
        products = (self.equations[i] for i in self.live)
        return {w for equation, _, writes in products if equation.primitive.name == "dot_general" for w in writes}

    def _parts(self, equation, reads) -> int:
        """Into how many parts the contraction of an equation is split."""
        if self._chip is None or equation.primitive.name != "dot_general":
            return 1
        return splits(self._product(equation, reads), self._chip)

    def _is_parted(self, number: int, user: int) -> bool:
        """Whether a value is the sum of a product's parts that one equation alone reads."""
        if number not in self.producer or self.users[number] != {user}:
            return False
        equation, reads, _ = self.equations[self.producer[number]]
        return self._parts(equation, reads) > 1

    def _split(self, equation, reads, made) -> None:
        """A product whose contraction is split writes all parts; another launch adds them."""
        parts = self._parts(equation, reads)
        if parts == 1:
            return
        product, launch = self._product(equation, reads), made[-1]
        partial = self.new()
        elements = product.batch * product.m * product.n
        self.size[partial] = parts * elements * product.sum_bits // 8 // self._shards
        results, launch.writes = launch.writes, (partial,)
        added = Kernel(frozenset((partial,)), results, "sum of parts", len(made), in_place=True, operands=(partial,))
        added.adds_parts = True
        added.touches, added.elements, added.axes = added.reads, parts * elements, (0,)
        made.append(added)

    def _product(self, equation, reads) -> Product:
        (contracted, _), (batched, _) = equation.params["dimension_numbers"]
        left, right = (v.aval for v in equation.invars)
        k = math.prod(left.shape[i] for i in contracted)
        batch = math.prod(left.shape[i] for i in batched)
        bits = [self._bits(v.aval, r) for v, r in zip(equation.invars, reads, strict=False)]
        result = 8 * equation.outvars[0].aval.dtype.itemsize
        m, n = (math.prod(side.shape) // (k * batch) for side in (left, right))
        return Product(batch, m, n, k, *bits, max(result, 32), result)

    def _bits(self, aval, number) -> int:
        """Of an element as it is read: before the conversions that a product makes as it reads a matrix."""
        bits = 8 * aval.dtype.itemsize
        while len(aval.shape) == 2 and number in self.producer:
            equation, reads, _ = self.equations[self.producer[number]]
            if equation.primitive.name not in UNARY:
                break
            number, aval = reads[0] if reads else None, equation.invars[0].aval
            bits = 8 * aval.dtype.itemsize
        return bits

    def _writes_whole(self, equation) -> bool:
        """Whether all of a mutable array is written, not one layer's slice of it."""
        return nbytes(equation.invars[0].aval) == nbytes(equation.invars[1].aval)

    def _empties(self, equation, writes, known, made) -> tuple:
        """The buffers that a loop will fill. XLA makes all of one shape in one launch, before the first is needed."""
        if equation.primitive.name != "scan":
            return ()
        wanted = []
        stacked = list(zip(writes, equation.outvars, strict=False))[scan_parts(equation.params)[1] :]
        kept = self._wanted(equation, writes)
        for number, variable in stacked:
            if number in self.free or number not in kept:
                continue
            key = (variable.aval.shape, str(variable.aval.dtype))
            empty = self.new()
            self.size[empty], self.cause[empty] = self.size[number], self.cause.get(number, "")
            kernel = known.get(key)
            if kernel is None:
                kernel = known[key] = Kernel(frozenset(), (), "empty", len(made))
                made.append(kernel)
            kernel.writes += (empty,)
            wanted.append(empty)
        return tuple(wanted)

    def _stack_results(self, stacked) -> None:
        """What a loop stacks leaves the iteration as soon as it is made: it is copied into the result or made there."""
        maker = {w: k for k in self.kernels for w in k.writes}
        read = {r for k in self.kernels for r in k.reads}
        outputs = dict(self.outputs)
        for number in dict.fromkeys(r for r in stacked if r is not None):
            kernel = maker.get(number)
            if number in self.external:  # what the iteration was given
                outputs = {**outputs, self._stack(number): None}
                continue
            if kernel is None or number in self.free:
                continue
            if kernel.in_place and not kernel.bodies and number not in read:
                self.free.add(number)
                self.whole[number] = self.loop.length * self.size[number]
                kernel.shunned = True
                continue
            written = self._stack(number)
            outputs = {written if o == number else o: None for o in outputs}
        self.outputs = outputs

    def _linearise(self) -> None:
        """What reads a carry runs before what writes the next one, so that no copy is needed: XLA's control edges."""
        maker = {w: k for k in self.kernels for w in k.writes}
        needs = needs_of(self.kernels)
        for result, old in self.carries.items():
            writer = maker.get(result)
            if writer is None:
                continue
            mine = 1 << writer.order
            before = [k.order for k in self.kernels if old in k.arguments and not needs[k.order] & mine]
            writer.after += tuple(o for o in before if o not in (writer.order, *writer.after))
            for o in needs:
                if o == writer.order or needs[o] & mine:
                    needs[o] |= bits(before)
                    for b in before:
                        needs[o] |= needs[b]

    def _stack(self, number: int) -> int:
        """Add the launch that copies a value of one iteration into its stack; the value that stands for the copy."""
        written = self.new()
        self.whole[written] = self.loop.length * self.size[number]
        order = 1 + max((k.order for k in self.kernels), default=0)
        reads = () if number in self.external else (number,)
        self.kernels.append(Kernel(frozenset(reads), (written,), "stack", order, operands=reads, shunned=True))
        return written

    def _launch(self, equation, wanted, results, order) -> Kernel:
        name, params = equation.primitive.name, equation.params
        writes = self._wanted(equation, results)
        kernel = Kernel(frozenset(wanted), writes, name, order, operands=wanted)
        kernel.in_place = name in ("scan", "while", "new_ref") or name.startswith("scatter")
        kernel.must_share = kernel.in_place
        kernel.shunned = name in ("scan", "while")
        if name == "scan":
            needed = tuple(needed_results(params, [w in writes for w in results[: len(equation.outvars)]]))
            loop = Loop(*scan_parts(params), params["length"], needed, params["reverse"])
            kernel.bodies = [self._body(params["jaxpr"], loop)]
            kernel.label = f"scan of {params['length']}"
        elif name == "while":
            kernel.bodies = [self._body(params["body_jaxpr"], Loop(params["body_nconsts"], len(equation.outvars)))]
        elif name == "cond":
            kernel.bodies = [self._body(branch) for branch in params["branches"]]
        return kernel

    def _wanted(self, equation, writes) -> tuple[int, ...]:
        """The results that exist: a loop does not carry what nobody reads."""
        if equation.primitive.name != "scan":
            return tuple(writes)
        results = writes[: len(equation.outvars)]
        used = [bool(self.users[w]) or w in self.outputs for w in results]
        needed = needed_results(equation.params, used)
        return tuple(w for w, keep in zip(results, needed, strict=True) if keep) + tuple(writes[len(results) :])

    def _body(self, closed, loop: Loop | None = None) -> Graph:
        key = id(closed), loop
        if key not in self._memo:
            graph = Graph(closed, loop=loop, shards=self._shards, memo=self._memo, chip=self._chip)
            self._memo[key] = (graph, closed)
        return self._memo[key][0]
