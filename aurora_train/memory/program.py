"""A jaxpr as XLA reads it: calls inlined, aliases gone, equal equations once, and nothing that nobody needs."""

from __future__ import annotations

from collections import defaultdict
from itertools import count

import jax
import numpy as np

from aurora_train.compat import open_jaxpr, scan_parts
from aurora_train.memory.merging import merge_products

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
    "ragged_dot_general", "qr", "svd", "eigh", "lu", "pallas_call", "new_ref", "device_put",
}  # fmt: skip
WEIGHTLESS = {"optimization_barrier"}


def on_host(aval) -> bool:
    """Whether a value lies in the processor's memory."""
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


def nbytes(aval) -> int:
    """Bytes of an abstract value on the device; typed keys count 8 each."""
    if on_host(aval):
        return 0
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
    body, (consts, carry) = open_jaxpr(params["jaxpr"]), scan_parts(params)
    carried = body.invars[consts : consts + carry]
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


def needed_operands(params, needed: list[bool]) -> list[bool]:
    """Which operands of a scan are read at all, where only the results `needed` are computed (`needed_results`)."""
    body, (consts, carry) = open_jaxpr(params["jaxpr"]), scan_parts(params)
    wanted = {v for v, keep in zip(body.outvars, needed, strict=True) if keep and is_variable(v)}
    for equation in reversed(body.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            wanted.update(v for v in equation.invars if is_variable(v))
    carried = [False] * consts + needed[:carry] + [False] * (len(body.invars) - consts - carry)
    return [v in wanted or keep for v, keep in zip(body.invars, carried, strict=True)]


def is_kernel(name: str) -> bool:
    """Whether a primitive is a launch of its own."""
    return name in KERNELS or "attention" in name or name.startswith("custom_")


class Program:
    """Values are numbered: `size` in bytes of each, `inputs` in order, `external` those that come from outside.

    An equation is (equation, values read, values written); the values that are written in place of a mutable array
    are among the latter. `shards`: every array is cut into so many parts.
    """

    def __init__(self, closed, *, shards: int = 1, needed: tuple[bool, ...] | None = None):
        jaxpr = open_jaxpr(closed)
        self._numbers, self._shards = count(), shards
        self.size: dict[int, int] = {}
        self.equations: list = []
        self.producer: dict[int, int] = {}
        self.users = defaultdict(set)
        self.summed: set[int] = set()  # equations of products that a sum was joined to
        constants = [self.new(v) for v in jaxpr.constvars]
        self.inputs = [self.new(v) for v in jaxpr.invars]
        self.external = {*constants, *self.inputs}
        environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *self.inputs), strict=True))
        self.barriers: list[int] = []
        self._passed = 0  # barriers so far
        self.turned: dict = {}  # a variable that is another transposed -> the permutation
        self._known: dict[tuple, list[int]] = {}  # equations by what they compute -> their results
        self.refs: dict[int, int] = {}  # a version of a mutable array -> the array it started as
        self._written: dict[int, int] = {}  # an argument that is mutable -> its last version
        self._inline(jaxpr, environment)
        results = [environment[v] if is_variable(v) else None for v in jaxpr.outvars]
        if needed is not None:
            results = [r if keep else None for r, keep in zip(results, needed, strict=True)]
        self.results = results
        self.outputs = {r: None for r in results if r is not None and r not in self.external}  # in order
        self.outputs |= dict.fromkeys(self._written.values())
        self.live: set[int] = set()
        self._keep_live()
        merge_products(self)
        self._scatter_into_sums()
        self._products_into_sums()

    def new(self, variable=None) -> int:
        number = next(self._numbers)
        self.size[number] = 0 if variable is None else nbytes(variable.aval) // self._shards
        return number

    def _constant(self) -> int:
        number = self.new()
        self.external.add(number)
        return number

    def _inline(self, jaxpr, environment) -> None:
        for equation in jaxpr.eqns:
            reads = [environment[v] if is_variable(v) else None for v in equation.invars]
            inner = callee(equation)
            if inner is None and equation.primitive.name == "scan" and equation.params["length"] == 1:
                inner = equation.params["jaxpr"]  # XLA's WhileLoopSimplifier: a loop of one turn is no loop
            if inner is not None:
                results = self._call(inner, reads, equation, environment)
            elif equation.primitive.name in WEIGHTLESS:
                results = [self._constant() if r is None else r for r in reads]
                self.barriers.extend(results)
                self._passed += 1
            elif equation.primitive.name == "freeze" or self._is_alias(equation, reads):
                results = reads[:1]
                if equation.primitive.name == "transpose":
                    self.turned[equation.outvars[0]] = equation.params["permutation"]
            else:
                results = self._once(equation, reads, environment)
            environment.update(zip(equation.outvars, results, strict=True))

    def _once(self, equation, reads, environment) -> list[int]:
        """The results of an equation; those of an equal one that was there before, as XLA has it."""
        key = self._identity(equation, reads)
        if key is None or key not in self._known:
            results = [self.new(v) for v in equation.outvars]
            self._record(equation, reads, results + self._written_refs(equation, reads, environment))
            if key is None:
                return results
            self._known[key] = results
        return self._known[key]

    def _identity(self, equation, reads) -> tuple | None:
        """What equal elementwise equations have in common; a barrier parts what is before it from what is after."""
        if is_kernel(equation.primitive.name) or equation.effects:
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
            self.producer[number] = len(self.equations)
        self.equations.append((equation, [r for r in reads if r is not None], results))

    def _written_refs(self, equation, reads, environment) -> list[int]:
        """A mutable array that an equation writes is, from there on, another value in the same buffer."""
        out = []
        if equation.primitive.name == "new_ref" or not equation.effects:
            return out
        for variable, read in zip(equation.invars, reads, strict=True):
            if read is not None and is_ref(variable):
                version = self.new(variable)
                environment[variable] = version
                self.refs[version] = self.refs.get(read, read)
                if self.refs[version] in self.external:
                    self._written[self.refs[version]] = version
                out.append(version)
        return out

    def _call(self, inner, reads, equation, environment) -> list[int]:
        body = open_jaxpr(inner)
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
        """Drop what nothing needs, as XLA does: equations, and operands of loops."""
        wanted = set(self.outputs)
        for index in reversed(range(len(self.equations))):
            equation, reads, writes = self.equations[index]
            if wanted.isdisjoint(writes):
                continue
            if equation.primitive.name == "scan":
                used = [w in wanted for w in writes[: len(equation.outvars)]]
                read = needed_operands(equation.params, needed_results(equation.params, used))
                read = [keep for v, keep in zip(equation.invars, read, strict=True) if is_variable(v)]
                reads = [r for r, keep in zip(reads, read, strict=True) if keep]
                self.equations[index] = (equation, reads, writes)
            self.live.add(index)
            wanted.update(reads)
            for number in reads:
                self.users[number].add(index)

    def _scatter_into_sums(self) -> None:
        """zeros.at[i].add(u) + y becomes y.at[i].add(u), as XLA has it: a tied table's two gradients are one buffer."""
        for index in sorted(self.live):
            equation, reads, writes = self.equations[index]
            if not self._is_scatter(index) or len(self.users[writes[0]]) != 1:
                continue
            (adder,) = self.users[writes[0]]
            added, terms, total = self.equations[adder]
            others = [t for t in terms if t != writes[0]]
            if added.primitive.name not in ("add", "add_any") or len(others) != 1 or writes[0] in self.outputs:
                continue
            target, other = reads[0], others[0]
            self.equations[index] = (equation, [other, *reads[1:]], total)
            self.producer[total[0]] = index
            self.live.discard(adder)
            self.users[target].discard(index)
            self.users[other].discard(adder)
            self.users[other].add(index)
            if not self.users[target] and target in self.producer:
                self.live.discard(self.producer[target])

    def _products_into_sums(self) -> None:
        """a @ b + y is one kernel where nothing but the sum reads the product, and it may be written over y."""
        for index in sorted(self.live):
            equation, reads, writes = self.equations[index]
            if equation.primitive.name != "dot_general" or len(self.users[writes[0]]) != 1 or writes[0] in self.outputs:
                continue
            (adder,) = self.users[writes[0]]
            added, terms, total = self.equations[adder]
            product = equation.outvars[0].aval
            others = [t for t in terms if t != writes[0]]
            alike = all(is_variable(v) and v.aval.shape == product.shape for v in added.invars)
            if added.primitive.name not in ("add", "add_any") or len(others) != 1 or not alike or product.ndim != 2:
                continue
            # Where the sum was: what it adds may be made after the product.
            self.equations[adder] = (equation, [*reads, others[0]], total)
            self.live.discard(index)
            for number in reads:
                self.users[number] = self.users[number] - {index} | {adder}
            self.summed.add(adder)

    def _is_scatter(self, index: int) -> bool:
        return self.equations[index][0].primitive.name.startswith("scatter")
