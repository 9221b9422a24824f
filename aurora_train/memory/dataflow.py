"""A jaxpr as the kernels that XLA would make of it: calls inlined, elementwise chains fused, loops with a body each."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from aurora_train.memory.splits import Chip, Product, splits

CALLS = {
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "remat",
    "remat2", "checkpoint", "custom_lin",
}  # fmt: skip
# The same bytes under another shape or name. A transpose is one too: XLA gives the producer the layout wanted.
ALIASES = {
    "reshape", "squeeze", "expand_dims", "name", "checkpoint_name", "transpose", "stop_gradient",
    "bitcast_convert_type", "sharding_constraint",
}  # fmt: skip
# What reads stored operands and stores its results; all else is fused into its consumer.
KERNELS = {
    "dot_general", "conv_general_dilated", "scan", "while", "cond", "sort", "top_k", "scatter", "scatter-add",
    "cumsum", "custom_call", "ffi_call", "fft", "cholesky", "triangular_solve", "all_gather", "psum",
    "ragged_dot_general", "qr", "svd", "eigh", "lu", "pallas_call", "new_ref",
}  # fmt: skip
REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin",
}  # fmt: skip
WRITES_REFS = {"addupdate", "swap"}
UNARY = {"convert_element_type", "neg", "exp", "log", "tanh", "logistic", "sqrt", "rsqrt", "integer_pow", "erf"}
WEIGHTLESS = {"optimization_barrier"}
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
    members: set[int] = field(default_factory=set)
    touches: frozenset[int] = frozenset()  # of a fused launch: all it reads, arguments and slices included
    operands: tuple[int, ...] = ()  # `reads` in the order in which they are written in the program
    elements: int = 0  # of a fused launch: of what it runs over, the operand of a reduction or else the result
    axes: tuple[int, ...] | None = None  # of a reduction
    arguments: frozenset[int] = frozenset()  # what it reads of its program's arguments


def nbytes(aval) -> int:
    """Bytes of an abstract value; typed keys count 8 each."""
    number = int(np.prod(aval.shape, dtype=np.int64))
    try:
        return number * np.dtype(aval.dtype).itemsize
    except TypeError:
        return number * 8


def is_variable(atom) -> bool:
    """Whether an operand of an equation is a variable, not a literal."""
    return not hasattr(atom, "val")


def is_ref(variable) -> bool:
    """Whether a variable is a mutable array."""
    return "Ref" in type(variable.aval).__name__


def callee(equation):
    """The jaxpr that a call runs once, or None."""
    if equation.primitive.name not in CALLS:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in equation.params:
            return equation.params[key]
    return None


def needed_results(params, used: list[bool]) -> list[bool]:
    """Which results of a scan must be computed, where only those `used` are read after it: a carry may feed others."""
    body = params["jaxpr"].jaxpr
    carried = body.invars[params["num_consts"] : params["num_consts"] + params["num_carry"]]
    needed = list(used)
    while True:
        wanted = {v for v, keep in zip(body.outvars, needed, strict=True) if keep and is_variable(v)}
        for equation in reversed(body.eqns):
            if equation.effects or not wanted.isdisjoint(equation.outvars):
                wanted.update(v for v in equation.invars if is_variable(v))
        further = [keep or (i < len(carried) and carried[i] in wanted) for i, keep in enumerate(needed)]
        if further == needed:
            return needed
        needed = further


class Graph:
    """Values are numbered; `size` in bytes, `cause` where known, `free` those that live in a buffer already there.

    `donated` results are written over an argument in the end; XLA schedules as though they were not.
    """

    def __init__(
        self, closed, *, donated: frozenset = frozenset(), sliced: frozenset = frozenset(),
        stacked: int | None = None, needed: tuple[bool, ...] | None = None, shards: int = 1, memo=None,
        carry: tuple[int, int] | None = None, length: int = 1, chip: Chip | None = None,
    ):  # fmt: skip
        jaxpr = closed.jaxpr
        self._numbers, self._memo, self._shards = count(), {} if memo is None else memo, shards
        self._chip = chip
        self.size, self.cause = {}, {}
        self._equations: list = []
        self._producer: dict[int, int] = {}
        self._users = defaultdict(set)
        self._summed: set[int] = set()  # equations of products that a sum was joined to
        inputs = [self._new(v) for v in (*jaxpr.constvars, *jaxpr.invars)]
        self._external = set(inputs)
        self._sliced = {inputs[len(jaxpr.constvars) + i] for i in sliced}
        environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))
        self._barriers: list[int] = []
        self._passed = 0  # barriers so far
        self._known: dict[tuple, list[int]] = {}  # equations by what they compute -> their results
        self._refs: dict[int, int] = {}  # a version of a mutable array -> the array it started as
        self._written: dict[int, int] = {}  # an argument that is mutable -> its last version
        self._inline(jaxpr, environment)
        results = [environment[v] if is_variable(v) else None for v in jaxpr.outvars]
        if needed is not None:
            results = [r if keep else None for r, keep in zip(results, needed, strict=True)]
        self.donated = {results[i] for i in donated if results[i] is not None} - self._external
        self._length = length
        self.whole: dict[int, int] = {}  # a result of a loop's body that is written into a stack -> bytes of the stack
        first = len(jaxpr.constvars)
        self.replaced = {inputs[first + i] for i in donated}
        self.free: set[int] = set()
        self.outputs = {r: None for r in results if r is not None and r not in self._external}  # in order
        self._stacked = [] if stacked is None else [r for r in results[stacked:] if r is not None]
        for version in self._written.values():
            self.outputs[version] = None
            self.free.add(version)
        self.free |= {v for v, first in self._refs.items() if first in self._external}
        self.carries: dict[int, int] = {}  # a result of a loop's body -> the argument that it follows
        if carry is not None:
            self.free |= {v for v in self.outputs if self._is_written_carry(v)}
            start, number = carry
            old = inputs[first + start : first + start + number]
            self.carries = {r: a for r, a in zip(results, old, strict=False) if r in self.outputs}
        self._keep_live()
        self._scatter_into_sums()
        self._products_into_sums()
        self._decide()
        self._attribute()
        self.kernels = self._make_kernels()
        self._stack_results()

    # ---- reading the jaxpr

    def _is_written_carry(self, number: int) -> bool:
        """Whether a result of a loop's body is what it was given with one slice written: that happens in place."""
        equation, reads, _ = self._equations[self._producer[number]]
        return equation.primitive.name == "dynamic_update_slice" and reads[0] in self._external

    def _new(self, variable=None) -> int:
        number = next(self._numbers)
        self.size[number] = 0 if variable is None else nbytes(variable.aval) // self._shards
        return number

    def _constant(self) -> int:
        number = self._new()
        self._external.add(number)
        return number

    def _inline(self, jaxpr, environment) -> None:
        for equation in jaxpr.eqns:
            reads = [environment[v] if is_variable(v) else None for v in equation.invars]
            inner = callee(equation)
            if inner is not None:
                results = self._call(inner, reads, equation, environment)
            elif equation.primitive.name in WEIGHTLESS:
                results = [self._constant() if r is None else r for r in reads]
                self._barriers.extend(results)
                self._passed += 1
            elif equation.primitive.name == "freeze" or self._is_alias(equation, reads):
                results = reads[:1]
            else:
                results = self._once(equation, reads, environment)
            environment.update(zip(equation.outvars, results, strict=True))

    def _once(self, equation, reads, environment) -> list[int]:
        """The results of an equation; those of an equal one that was there before, as XLA has it."""
        key = self._identity(equation, reads)
        if key is None or key not in self._known:
            results = [self._new(v) for v in equation.outvars]
            self._record(equation, reads, results + self._written_refs(equation, reads, environment))
            if key is None:
                return results
            self._known[key] = results
        return self._known[key]

    def _identity(self, equation, reads) -> tuple | None:
        """What equal elementwise equations have in common; a barrier parts what is before it from what is after."""
        if self._is_kernel_name(equation.primitive.name) or equation.effects:
            return None
        operands = tuple(
            (str(v.aval), repr(v.val)) if r is None and not is_variable(v) else r
            for v, r in zip(equation.invars, reads, strict=True)
        )
        try:
            key = equation.primitive.name, self._passed, operands, tuple(sorted(equation.params.items()))
            hash(key)
        except TypeError:
            return None
        return key

    def _record(self, equation, reads, results) -> None:
        for number in results:
            self._producer[number] = len(self._equations)
        self._equations.append((equation, [r for r in reads if r is not None], results))

    def _written_refs(self, equation, reads, environment) -> list[int]:
        """A mutable array that an equation writes is, from there on, another value in the same buffer."""
        out = []
        if equation.primitive.name == "new_ref" or not equation.effects:
            return out
        for variable, read in zip(equation.invars, reads, strict=True):
            if read is not None and is_ref(variable):
                version = self._new(variable)
                environment[variable] = version
                self._refs[version] = self._refs.get(read, read)
                if self._refs[version] in self._external:
                    self._written[self._refs[version]] = version
                out.append(version)
        return out

    def _call(self, inner, reads, equation, environment) -> list[int]:
        body = getattr(inner, "jaxpr", inner)
        local = {v: self._constant() for v in body.constvars}
        local |= {v: self._constant() if r is None else r for v, r in zip(body.invars, reads, strict=True)}
        self._inline(body, local)
        for variable, given in zip(equation.invars, body.invars, strict=True):
            if is_variable(variable) and is_ref(variable):
                environment[variable] = local[given]
        return [local[v] if is_variable(v) else self._constant() for v in body.outvars]

    def _is_alias(self, equation, reads) -> bool:
        if equation.primitive.name not in ALIASES or reads[0] is None:
            return False
        return self.size[reads[0]] == nbytes(equation.outvars[0].aval) // self._shards

    def _keep_live(self) -> None:
        """Drop what nothing needs, as XLA does."""
        self._live, pending = set(), list(self.outputs)
        while pending:
            index = self._producer.get(pending.pop())
            if index is not None and index not in self._live:
                self._live.add(index)
                pending.extend(self._equations[index][1])
        for index in self._live:
            for number in self._equations[index][1]:
                self._users[number].add(index)

    def _scatter_into_sums(self) -> None:
        """zeros.at[i].add(u) + y becomes y.at[i].add(u), as XLA has it: a tied table's two gradients are one buffer."""
        for index in sorted(self._live):
            equation, reads, writes = self._equations[index]
            if not self._is_scatter(index) or len(self._users[writes[0]]) != 1:
                continue
            (adder,) = self._users[writes[0]]
            added, terms, total = self._equations[adder]
            others = [t for t in terms if t != writes[0]]
            if added.primitive.name not in ("add", "add_any") or len(others) != 1 or writes[0] in self.outputs:
                continue
            target, other = reads[0], others[0]
            self._equations[index] = (equation, [other, *reads[1:]], total)
            self._producer[total[0]] = index
            self._live.discard(adder)
            self._users[target].discard(index)
            self._users[other].discard(adder)
            self._users[other].add(index)
            if not self._users[target] and target in self._producer:
                self._live.discard(self._producer[target])

    def _products_into_sums(self) -> None:
        """a @ b + y is one kernel where nothing but the sum reads the product, and it may be written over y."""
        for index in sorted(self._live):
            equation, reads, writes = self._equations[index]
            if equation.primitive.name != "dot_general" or len(self._users[writes[0]]) != 1 or writes[0] in self.outputs:
                continue
            (adder,) = self._users[writes[0]]
            added, terms, total = self._equations[adder]
            product = equation.outvars[0].aval
            others = [t for t in terms if t != writes[0]]
            alike = all(is_variable(v) and v.aval.shape == product.shape for v in added.invars)
            if added.primitive.name not in ("add", "add_any") or len(others) != 1 or not alike or product.ndim != 2:
                continue
            self._equations[index] = (equation, [*reads, others[0]], total)
            self._producer[total[0]] = index
            self._live.discard(adder)
            self._users[others[0]].discard(adder)
            self._users[others[0]].add(index)
            self._summed.add(index)

    # ---- what is stored

    def _is_kernel(self, index: int) -> bool:
        return self._is_kernel_name(self._equations[index][0].primitive.name)

    @staticmethod
    def _is_kernel_name(name: str) -> bool:
        return name in KERNELS or "attention" in name or name.startswith("custom_")

    def _decide(self) -> None:
        self._stored, self._copied = set(self.outputs), set()
        self._stored.update(n for n in self._barriers if self._producer.get(n) in self._live)
        for index in self._live:
            equation, reads, writes = self._equations[index]
            if self._is_kernel(index):
                self._stored.update(writes)
                self._stored.update(r for r in reads if r not in self._external)
                self._copied.update(r for r in reads if r in self._sliced)
            elif equation.primitive.name in REDUCTIONS:
                self._stored.update(writes)
        self._alone = self._normalised()
        self._stored |= self._alone

    def _normalised(self) -> set[int]:
        """(x - mean) / deviation over the last axis, where several kernels read it: XLA makes a kernel of the whole.

        A norm that does not subtract a mean is left to its readers instead, each of which computes it again.
        """
        found = set()
        for index in self._live:
            equation, reads, writes = self._equations[index]
            if equation.primitive.name != "sub" or len(reads) != 2 or self._reduced(reads[1]) != reads[0]:
                continue
            for user in self._users[writes[0]]:
                scaled, terms, units = self._equations[user]
                others = [t for t in terms if t != writes[0]]
                if scaled.primitive.name in ("mul", "div") and len(others) == 1 and len(self._users[units[0]]) > 1:
                    square = self._reduced(others[0])
                    if square in self._producer and set(self._equations[self._producer[square]][1]) == {writes[0]}:
                        found.add(units[0])
        return found

    def _reduced(self, number: int) -> int | None:
        """What a value is the sum of, where it is nothing but a scaled, shifted or broadcast sum."""
        while number in self._producer:
            equation, reads, _ = self._equations[self._producer[number]]
            if equation.primitive.name == "reduce_sum":
                return reads[0]
            if len(reads) != 1 or self._is_kernel(self._producer[number]):
                return None
            number = reads[0]
        return None

    def _sources(self, index: int, known: dict) -> tuple[int, ...]:
        """The stored values and arguments that a fused chain ending in this equation reads, in operand order."""
        pending = [index]
        while pending:
            number = pending[-1]
            inner = [
                self._producer[n]
                for n in self._equations[number][1]
                if n not in self._stored and n not in self._external and self._producer[n] not in known
            ]
            if inner and number not in known:
                pending.extend(inner)
                continue
            pending.pop()
            found: dict[int, None] = {}
            for n in self._equations[number][1]:
                near = n in self._stored or n in self._external
                found.update({n: None} if near else dict.fromkeys(known[self._producer[n]]))
            known[number] = tuple(found)
        return known[index]

    def _attribute(self) -> None:
        """Gradients end in the step's barrier; what one loop stacks and another reads is kept for the backward pass."""
        for number in self._barriers:
            while number in self._producer:
                self.cause[number] = "gradients"
                index = self._producer[number]
                same = [r for r in self._equations[index][1] if self.size[r] == self.size[number]]
                if self._is_kernel(index) or len(same) != 1:
                    break
                number = same[0]
        for index in self._live:
            equation, _, writes = self._equations[index]
            if equation.primitive.name != "scan":
                continue
            for number in writes[equation.params["num_carry"] : len(equation.outvars)]:
                readers = {self._equations[i][0].primitive.name for i in self._users[number]}
                if number not in self.cause and "scan" in readers:
                    self.cause[number] = "saved"

    # ---- kernels

    def _make_kernels(self) -> list[Kernel]:
        made, known, copies = [], {}, {}
        empties: dict[tuple, Kernel] = {}
        for index in sorted(self._live):
            equation, reads, writes = self._equations[index]
            if self._is_kernel(index):
                for number in sorted(set(reads) & self._copied - set(copies)):
                    copies[number] = self._new()
                    self.size[copies[number]] = self.size[number]
                    made.append(Kernel(frozenset(), (copies[number],), "slice", len(made)))
                wanted = tuple(copies.get(r, r) for r in reads if r in copies or r in self._stored)
                wanted += self._empties(equation, writes, empties, made)
                made.append(self._launch(equation, wanted, writes, len(made)))
                made[-1].arguments = frozenset(r for r in reads if r in self._external)
                made[-1].in_place |= index in self._summed
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
            kernel.arguments = kernel.touches & self._external
            if not self._alone.isdisjoint(writes):
                kernel.touches = frozenset()  # it has no siblings
            kernel.shunned = equation.primitive.name in WRITES_REFS and not self._writes_whole(equation)
            reduces = equation.primitive.name in REDUCTIONS
            runs_over = equation.invars if reduces or not equation.outvars else equation.outvars
            kernel.elements = int(np.prod(runs_over[0].aval.shape, dtype=np.int64))
            kernel.axes = tuple(equation.params["axes"]) if reduces else None
            made.append(kernel)
        return _with_siblings(made, self.size, self._custom_results())

    def _custom_results(self) -> set[int]:
        """Results of matrix products that XLA makes kernels of before it looks for siblings: they bring none together.

        So it was in all steps compiled for Hopper and for consumer Blackwell, and in none for datacenter Blackwell.
        """
        if self._chip is None or self._chip.capability[0] == 10:
            return set()
        products = (self._equations[i] for i in self._live)
        return {w for equation, _, writes in products if equation.primitive.name == "dot_general" for w in writes}

    def _split(self, equation, reads, made) -> None:
        """A product whose contraction is split writes all parts; another launch adds them."""
        if self._chip is None or equation.primitive.name != "dot_general":
            return
        product, launch = self._product(equation, reads), made[-1]
        parts = splits(product, self._chip)
        if parts == 1:
            return
        partial = self._new()
        elements = product.batch * product.m * product.n
        self.size[partial] = parts * elements * product.sum_bits // 8 // self._shards
        results, launch.writes = launch.writes, (partial,)
        added = Kernel(frozenset((partial,)), results, "sum of parts", len(made), in_place=True, operands=(partial,))
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
        while len(aval.shape) == 2 and number in self._producer:
            equation, reads, _ = self._equations[self._producer[number]]
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
        stacked = list(zip(writes, equation.outvars, strict=False))[equation.params["num_carry"] :]
        kept = self._wanted(equation, writes)
        for number, variable in stacked:
            if number in self.free or number not in kept:
                continue
            key = (variable.aval.shape, str(variable.aval.dtype))
            empty = self._new()
            self.size[empty], self.cause[empty] = self.size[number], self.cause.get(number, "")
            kernel = known.get(key)
            if kernel is None:
                kernel = known[key] = Kernel(frozenset(), (), "empty", len(made))
                made.append(kernel)
            kernel.writes += (empty,)
            wanted.append(empty)
        return tuple(wanted)

    def _stack_results(self) -> None:
        """What a loop stacks leaves the iteration as soon as it is made: it is copied into the result or made there."""
        maker = {w: k for k in self.kernels for w in k.writes}
        read = {r for k in self.kernels for r in k.reads}
        outputs = dict(self.outputs)
        for number in dict.fromkeys(self._stacked):
            kernel = maker.get(number)
            if number in self._external:  # what the iteration was given
                outputs = {**outputs, self._stack(number): None}
                continue
            if kernel is None or number in self.free:
                continue
            if kernel.in_place and not kernel.bodies and number not in read:
                self.free.add(number)
                self.whole[number] = self._length * self.size[number]
                kernel.shunned = True
                continue
            written = self._stack(number)
            outputs = {written if o == number else o: None for o in outputs}
        self.outputs = outputs

    def _stack(self, number: int) -> int:
        """Add the launch that copies a value of one iteration into its stack; the value that stands for the copy."""
        written = self._new()
        self.whole[written] = self._length * self.size[number]
        order = 1 + max((k.order for k in self.kernels), default=0)
        reads = () if number in self._external else (number,)
        self.kernels.append(Kernel(frozenset(reads), (written,), "stack", order, operands=reads, shunned=True))
        return written

    def _is_scatter(self, index: int) -> bool:
        return self._equations[index][0].primitive.name.startswith("scatter")

    def _launch(self, equation, wanted, results, order) -> Kernel:
        name, params = equation.primitive.name, equation.params
        writes = self._wanted(equation, results)
        kernel = Kernel(frozenset(wanted), writes, name, order, operands=wanted)
        kernel.in_place = name in ("scan", "while", "new_ref") or name.startswith("scatter")
        kernel.must_share = kernel.in_place
        kernel.shunned = name in ("scan", "while")
        if name == "scan":
            body = params["jaxpr"]
            first = params["num_consts"] + params["num_carry"]
            needed = tuple(needed_results(params, [w in writes for w in results[: len(equation.outvars)]]))
            sliced = frozenset(range(first, len(body.jaxpr.invars)))
            carry = params["num_consts"], params["num_carry"]
            kernel.bodies = [self._body(body, sliced, params["num_carry"], needed, carry, params["length"])]
            kernel.label = f"scan of {params['length']}"
        elif name == "while":
            carry = params["body_nconsts"], len(equation.outvars)
            kernel.bodies = [self._body(params["body_jaxpr"], frozenset(), carry=carry)]
        elif name == "cond":
            kernel.bodies = [self._body(branch, frozenset()) for branch in params["branches"]]
        return kernel

    def _wanted(self, equation, writes) -> tuple[int, ...]:
        """The results that exist: a loop does not carry what nobody reads."""
        if equation.primitive.name != "scan":
            return tuple(writes)
        results = writes[: len(equation.outvars)]
        used = [bool(self._users[w]) or w in self.outputs for w in results]
        needed = needed_results(equation.params, used)
        return tuple(w for w, keep in zip(results, needed, strict=True) if keep) + tuple(writes[len(results) :])

    def _body(self, closed, sliced, stacked=None, needed=None, carry=None, length=1) -> Graph:
        key = id(closed), needed, carry
        if key not in self._memo:
            graph = Graph(
                closed, sliced=sliced, stacked=stacked, needed=needed, shards=self._shards, memo=self._memo,
                carry=carry, length=length, chip=self._chip,
            )  # fmt: skip
            self._memo[key] = (graph, closed)
        return self._memo[key][0]


def _with_siblings(kernels: list[Kernel], size, custom=frozenset()) -> list[Kernel]:
    """Fused launches that read one array in common and run over as many elements become one with several outputs.

    XLA's MultiOutputFusion, siblings: reductions over the same axes, and elementwise results beside them. Never where
    one needs the other, nor for what a kernel in `custom` made.
    """
    needs = _needs(kernels)
    size = {number: nbytes for number, nbytes in size.items() if number not in custom and nbytes > ONE_ELEMENT}
    out, by_elements = [], defaultdict(list)
    for k in kernels:
        k.members = {k.order}
        fused = k.in_place and k.touches and len(k.writes) == 1
        twin = next((o for o in by_elements[k.elements] if _are_siblings(o, k, needs, size)), None) if fused else None
        if twin is None:
            out.append(k)
            if k.in_place and k.touches and k.writes:
                by_elements[k.elements].append(k)
            continue
        twin.operands += tuple(o for o in k.operands if o not in twin.reads)
        twin.reads |= k.reads
        twin.writes += k.writes
        twin.touches |= k.touches
        twin.arguments |= k.arguments
        twin.axes = k.axes if twin.axes is None else twin.axes
        twin.members.add(k.order)
        for later in needs:
            if needs[later] & twin.members:
                needs[later] |= twin.members
                for member in twin.members:
                    needs[later] |= needs[member]
    return out


def _are_siblings(one: Kernel, other: Kernel, needs, size) -> bool:
    if one.axes is not None and other.axes is not None and one.axes != other.axes:
        return False
    if one.members & needs[other.order]:
        return False
    return not size.keys().isdisjoint(one.touches & other.touches)


def _needs(kernels: list[Kernel]) -> dict[int, set[int]]:
    """Kernel -> all kernels that must run before it. The kernels come in the order of the program."""
    made_by = {w: k.order for k in kernels for w in k.writes}
    needs: dict[int, set[int]] = {}
    for k in kernels:
        needs[k.order] = set()
        for r in k.reads:
            if r in made_by and made_by[r] != k.order:
                needs[k.order] |= {made_by[r]} | needs.get(made_by[r], set())
    return needs
