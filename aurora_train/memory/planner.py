"""From a step that can be traced and compiled to the fastest plan that fits: simulate, search, compile, correct.

`program` is a `train.rehearsal.Rehearsal`: it knows how to trace and compile the real step under a plan, for this
machine or for one that is not here. At most three compilations; the maths is never touched.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import jax

from aurora_train.compat import is_unreadable
from aurora_train.errors import UserError
from aurora_train.memory import account, offload, unread
from aurora_train.memory.dataflow import Graph
from aurora_train.memory.liveness import Profile, profile_of
from aurora_train.memory.plan import Plan
from aurora_train.memory.residuals import trace_stack_unit
from aurora_train.memory.search import Candidate, Costs, Space, StackCosts, as_segments, cheapest, next_faster
from aurora_train.memory.shortlist import Shortlist
from aurora_train.memory.verify import compiled_bytes
from aurora_train.units import size

COMPILES = 3
SETTLE = (4, 2, 2)  # simulations before each
MARGIN = 0.02  # of the budget, kept free while nothing is compiled: the simulation errs by 0.9 % in the mean
FULL_ENOUGH = 0.95  # beside a plan that uses this share of the budget, another compilation must promise to save
WORTH = 0.001  # of the seconds that plan spends on recomputation and overhead
SURE = 0.97  # the chance of fitting asked of the last plan that may be compiled, where none has fitted yet
UNKNOWN = Costs(1e-14, 1e-12, 1e-3, 1e-10)  # of a machine that nothing is known of: they only rank plans
UNKNOWN_LINK = 2 / 16e9  # seconds to move a byte out and back where the link to the processor is not known
HOPELESS = 1.25  # times the budget by simulation: not worth a compilation
IDLE = 0.5  # on a CPU, a step that keeps everything and needs less than this share is not searched for
ROOMY = 256 * 2**20  # bytes of temporaries above which a CPU takes such a step's batch in parts
WORK_PER_BYTE = 1_500  # FLOPs in a part for each byte of parameters: 1,000 tokens, if a parameter has 4 bytes


@dataclass
class Simulated:
    """A plan as simulated: `bytes` is arguments plus temporaries on one device."""

    bytes: int
    arguments: int
    profile: Profile


@dataclass
class Planner:
    """One search. `budget` in bytes on one device; None where only `simulate` and `compile` are asked for."""

    program: object
    budget: int | None
    budget_reason: str
    machine: str
    rates: object = None
    verify: bool = True
    progress: object = None
    compiled_later: bool = False  # the caller compiles what is not searched for, when it is ready to
    compiles: int = 0
    cpu_seconds: float = 0.0
    simulated: dict = field(default_factory=dict)
    compiled: dict = field(default_factory=dict)

    @property
    def usable(self) -> int:
        """Bytes of the budget that a plan may be predicted to need."""
        return int(self.budget * (1 if self.compiles else 1 - MARGIN))

    # ---- the parts

    def simulate(self, plan: Plan) -> Simulated:
        """The step's peak from its jaxpr, without compiling."""
        key = repr(plan.work)
        if key not in self.simulated:
            traced, state = self.program.trace(plan)
            arguments = sum(account.arguments(self.program, self.program.blueprint(plan)).values())
            donated = frozenset(range(len(jax.tree.leaves(state._replace(frozen={})))))
            shards = self.program.mesh.devices.size
            graph = Graph(traced.jaxpr, donated=donated, shards=shards, chip=self.program.chip)
            found = profile_of(graph)
            self.simulated[key] = Simulated(arguments + found.peak, arguments, found)
        return self.simulated[key]

    def compile(self, plan: Plan) -> int:
        """The compiler's peak in bytes."""
        key = repr(plan.work)
        if key not in self.compiled:
            self.compiles += 1
            if self.progress:
                self.progress(self.compiles - 1, COMPILES, f"compiling a plan for {self.machine}")
            paused = time.thread_time()
            self.compiled[key] = compiled_bytes(self.program.compile(plan)).peak
            self.cpu_seconds -= time.thread_time() - paused
        return self.compiled[key]

    # ---- the search

    def run(self) -> Plan:
        """The plan, verified where that is possible. UserError where nothing fits."""
        return self._planned(self._found)

    def _planned(self, search) -> Plan:
        """What a search finds; a plan that needs none where it ends on something that it cannot read."""
        try:
            return search()
        except Exception as error:
            if not is_unreadable(error):
                raise
            fault = error  # handled below: what comes up there is not to be shown as its consequence
        devices = self.program.mesh.devices.size
        return unread.plan_unread(self, microbatches(self.program.config, self.program.recipe, devices), fault)

    def _found(self) -> Plan:
        began = time.thread_time()
        whole = self._as_asked()
        compiled = self.compile(whole) if whole and self.verify and not self.compiled_later else None
        self.cpu_seconds += time.thread_time() - began
        if whole and (self.is_fixed or compiled is None or compiled <= self.budget):
            return self._told(whole, compiled)
        return self._searched()

    def _searched(self) -> Plan:
        began = time.thread_time()
        space, room = self._space(), self.program.host_bytes
        candidates = space.all()
        roomy = [c for c in candidates if room is None or c.host <= room]
        if not roomy:
            offload.refuse_overflow(min(c.host for c in candidates), room)
        shortlist = Shortlist(roomy, self.budget)
        plan = self._written(space, shortlist, *self._choose(shortlist))
        self.cpu_seconds += time.thread_time() - began
        return replace(plan, details=plan.details | {"planning_seconds": round(self.cpu_seconds, 2)})

    def _as_asked(self) -> Plan | None:
        """The plan that needs no search: the config says what is kept, or a CPU has room for everything."""
        program, devices = self.program, self.program.mesh.devices.size
        pairs = microbatches(program.config, program.recipe, devices)
        if not self.is_fixed and program.platform != "cpu":
            return None
        plan = program.asked_plan()
        if not self.is_fixed:
            plan = self._parted(plan, pairs)
            return plan if self.simulate(plan).bytes <= IDLE * self.budget else None
        plans = [replace(plan, microbatch=m, accumulation=n) for m, n in pairs]
        return next((p for p in plans if self.simulate(p).bytes <= self.usable), plans[-1])

    def _parted(self, plan: Plan, pairs: list[tuple[int, int]]) -> Plan:
        """On one CPU: in about as many microbatches as bring the temporaries under `ROOMY`, and cost next to nothing.

        There a large batch is no faster than its parts, and what XLA takes anew in every step the kernel has to clear.
        Several devices would add up their gradients once a part.
        """
        found = self.simulate(plan)
        temporaries = found.bytes - found.arguments
        if len(pairs) == 1 or self.program.mesh.devices.size > 1 or temporaries <= ROOMY:
            return plan
        most = (self.program.product_flops(plan) or 0) / (WORK_PER_BYTE * account.parameter_bytes(self.program))
        cheap = [(m, n) for m, n in pairs if n <= most] or pairs[:1]
        microbatch, parts = next((pair for pair in cheap if temporaries <= ROOMY * pair[1]), cheap[-1])
        reason = f"everything kept; {parts} microbatches, for less memory"
        parted = replace(plan, microbatch=microbatch, accumulation=parts, reason=reason)
        return parted if self.simulate(parted).bytes < found.bytes else plan

    @property
    def is_fixed(self) -> bool:
        """Whether the config says what is kept."""
        memory = self.program.config.memory
        return memory.save != "auto" or memory.unroll != "auto"

    def _told(self, plan: Plan, compiled: int | None) -> Plan:
        """A plan that was not searched for, with its bytes."""
        simulated, cost = self.simulate(plan), self.priced(plan)
        offload.refuse_overflow(cost.host, self.program.host_bytes)
        needed = compiled if compiled is not None else simulated.bytes
        if needed > self.budget:
            plan = replace(plan, reason=f"{plan.reason}; it needs {size(needed)}, more than the budget")
        return replace(
            plan, machine=self.machine, platform=self.program.platform, budget_bytes=self.budget,
            predicted_bytes=simulated.bytes, compiled_bytes=compiled,
            details=account.essentials(self, plan, simulated, cost),
        )  # fmt: skip

    def smaller(self, than: Plan) -> Plan | None:
        """After an out-of-memory: the fastest plan that needs clearly less than `than` did, or None."""
        needed = than.compiled_bytes or than.predicted_bytes
        self.budget = min(self.budget, int(0.85 * needed))
        self.budget_reason = f"an out-of-memory with a plan of {size(needed)}"
        try:
            return self._planned(self._searched)
        except UserError:
            return None

    def _space(self) -> Space:
        program = self.program
        devices = program.mesh.devices.size
        pairs = microbatches(program.config, program.recipe, devices)
        calls = program.stack_calls()
        moved = offload.named(program.config, [call[0] for call in calls.values()], apart=program.apart)
        offload.refuse_idle(moved, [self._graph(call) for call in calls.values()] if moved else [])
        stacks = [self._stack(path, call, moved) for path, call in calls.items()]
        space = Space(stacks, pairs, devices, self._costs(), None)
        known: dict[int, int] = {}

        def rest(local: int) -> int:
            """Everything but what units keep and their gradients, at full recomputation; linear in between."""
            if local not in known:
                ends = sorted(known)
                if len(ends) >= 2:
                    low, high = ends[0], ends[-1]
                    return known[low] + (known[high] - known[low]) * (local - low) // (high - low)
                known[local] = self._rest(space, local * devices)
            return known[local]

        space.rest = rest
        smallest, largest = pairs[-1][0] // devices, pairs[0][0] // devices
        rest(smallest)
        if largest != smallest:
            reach = max(4 * smallest, pairs[-2][0] // devices)
            rest(max(m // devices for m, _ in pairs if m // devices <= reach))
        return space

    def _rest(self, space: Space, microbatch: int) -> int:
        batch = self.program.config.train.batch
        cuts = {s.path: [(0, s.units, space.hulls[s.path][0])] for s in space.stacks}
        segments = as_segments(cuts)
        plan = Plan(microbatch, batch // microbatch, segments | self.program.uncalled(segments))
        whole = self.simulate(plan).bytes
        local = max(microbatch // space.devices, 1)
        return whole - sum(
            s.units * (space.hulls[s.path][0].saved_bytes * local + s.gradient) for s in space.stacks
        )

    def _stack(self, path: str, call, moved: tuple[str, ...]) -> StackCosts:
        stack, wish, graph = call[0], self.program.config.memory.offload, self._graph(call)
        mine = tuple(tag for tag in moved if tag in offload.tags_of(stack))
        scores = offload.with_offload(graph, graph.points(), wish, mine, self.program.apart)
        fused = self.program.config.memory.fuse_update  # then there is a gradient of one unit at a time
        gradient = 0 if fused else account.unit_gradient_bytes(stack, self.program.mesh)
        return StackCosts(path, stack.num_units, scores, gradient)

    def _graph(self, call):
        with self.program.here():
            return trace_stack_unit(*call)

    def priced(self, plan: Plan) -> Candidate:
        """A plan that was not searched for, with what it costs beside the work itself; `bytes` are not known."""
        calls, cuts = {}, {}
        if any(segment.save is not None for cut in plan.stacks.values() for segment in cut):
            calls = self.program.stack_calls()
        graphs = {path: self._graph(call) for path, call in calls.items()}
        moved = dict.fromkeys(tag for cut in plan.stacks.values() for segment in cut for tag in segment.offload)
        offload.refuse_idle(tuple(moved), graphs.values())
        for path, graph in graphs.items():
            cuts[path] = [(s.start, s.stop, offload.score_of(graph, s.save, s.offload)) for s in plan.stacks[path]]
        stacks = [StackCosts(path, call[0].num_units, [], 0) for path, call in calls.items()]
        devices = self.program.mesh.devices.size
        space = Space(stacks, [], devices, self._costs(), lambda local: 0)
        return space.candidate(plan.microbatch, plan.accumulation, cuts)

    def _costs(self) -> Costs:
        if self.rates is None:
            return UNKNOWN
        matmul = account.product_rate(self.rates, self.program.config)
        weights = 3 * account.parameter_bytes(self.program)  # read forward and backward, gradients written
        return Costs(
            1 / matmul, 1 / self.rates.bandwidth, self.rates.per_microbatch_seconds + weights / self.rates.bandwidth,
            2 / self.rates.link if self.rates.link else UNKNOWN_LINK,
        )  # fmt: skip

    def _choose(self, shortlist: Shortlist) -> tuple[Candidate, int | None]:
        """(the plan, its compiled bytes; None where nothing is compiled)."""
        if not self.verify:
            found = self._settled(shortlist, lambda: cheapest(shortlist.candidates, self.usable, shortlist.expected))
            self.refuse_misfit(found, self._simulated(found or shortlist.smallest()))
            return found, None
        best, real, least = None, None, None
        for turn in range(min(self.compiles, COMPILES - 1), COMPILES):
            found = self._next(shortlist, best, turn)
            if found is None or (best is not None and not self._pays(shortlist, found, best, real)):
                break
            needed = self._compiled(found, shortlist)
            least = min(needed, least or needed)
            if needed <= self.budget:
                best, real = found, needed
        if best is None:
            self.refuse_misfit(None, least or self._simulated(shortlist.smallest()))
        return best, real

    def _next(self, shortlist: Shortlist, best: Candidate | None, turn: int) -> Candidate | None:
        """The plan to compile next; the smallest where no other can be trusted to fit."""
        sure = SURE if best is None and turn == COMPILES - 1 else 0.0
        found = self._settled(shortlist, lambda: shortlist.most_promising(best, sure), SETTLE[turn])
        if found is not None or best is not None:
            return found
        smallest = shortlist.smallest()
        hopeless = shortlist.is_compiled(smallest) or self._simulated(smallest) > HOPELESS * self.budget
        return None if hopeless else smallest

    def _pays(self, shortlist: Shortlist, found: Candidate, best: Candidate, real: int) -> bool:
        """Whether to compile once more where a plan that fits is known."""
        gain = WORTH if real >= FULL_ENOUGH * self.budget else 0.0
        return shortlist.promise(found, best) > gain * best.seconds

    def _settled(self, shortlist: Shortlist, pick, tries: int = SETTLE[0]) -> Candidate | None:
        """What `pick` picks once it is itself simulated, so that it is not picked for an error of the model."""
        found = None
        for _ in range(tries):
            found = pick()
            if found is None or shortlist.is_simulated(found):
                return found
            shortlist.learn(found, self._simulated(found))
        return pick()

    def _simulated(self, candidate: Candidate) -> int:
        return self.simulate(self.plan_of(candidate)).bytes

    def _compiled(self, candidate: Candidate, shortlist: Shortlist) -> int:
        found = self.compile(self.plan_of(candidate))
        shortlist.learn(candidate, self._simulated(candidate), found)
        return found

    def refuse_misfit(self, found, needed: int) -> None:
        if found is not None and needed <= self.budget:
            return
        levers = "; ".join(f"{lever['setting']} saves {size(lever['saves_bytes'])}" for lever in self._levers()[:3])
        if self.program.config.memory.fuse_update:
            levers = "memory.fuse_update=false lets the batch be cut into microbatches" + (levers and f"; {levers}")
        raise UserError(
            f"no plan fits {self.machine or 'this machine'}: the smallest needs {size(needed)} of {size(self.budget)}",
            where="memory.budget",
            why=f"budget: {self.budget_reason}",
            hint=levers or "a smaller model or a shorter sequence",
        )

    def _levers(self) -> list[dict]:
        return account.levers(self.program, self.program.blueprint(self.program.simplest_plan()))

    # ---- the result

    def plan_of(self, candidate: Candidate) -> Plan:
        """The bare plan of a candidate."""
        cuts = candidate.stacks()
        return Plan(candidate.microbatch, candidate.accumulation, cuts | self.program.uncalled(cuts))

    def _written(self, space: Space, shortlist: Shortlist, chosen: Candidate, compiled: int | None) -> Plan:
        plan = self.plan_of(chosen)
        simulated = self.simulate(plan)
        faster = next_faster(shortlist.candidates, chosen, shortlist.expected)
        details = account.details(self, space, shortlist, chosen, simulated, faster)
        return replace(
            plan,
            reason=self._reason(chosen, compiled),
            machine=self.machine,
            platform=self.program.platform,
            budget_bytes=self.budget,
            predicted_bytes=simulated.bytes,
            compiled_bytes=compiled,
            details=details,
        )

    def _reason(self, chosen: Candidate, compiled: int | None) -> str:
        how = "compiled" if compiled is not None else "not compiled"
        needed = compiled if compiled is not None else self.simulate(self.plan_of(chosen)).bytes
        limit = f" of {size(self.budget)}" if self.budget is not None else ""
        return f"the fastest that fits: {size(needed)}{limit} ({how}); budget: {self.budget_reason}"


def microbatches(config, recipe, devices: int) -> list[tuple[int, int]]:
    """(microbatch over all devices, accumulation), largest first, that the batch divides into. UserError if none."""
    batch, wish = config.train.batch, config.memory.accumulation
    if batch % devices:
        raise UserError(
            f"a batch of {batch} does not divide over {devices} devices",
            where="train.batch",
            hint=f"the nearest that does is {max(batch // devices, 1) * devices}",
        )
    local = batch // devices
    if wish != "auto":
        if local % wish:
            raise UserError(
                f"a batch of {batch} does not divide into {wish} microbatches over {devices} device(s)",
                where="train.batch",
                hint=f"the nearest that does is {max(batch // (wish * devices), 1) * wish * devices}",
            )
        if wish > 1 and recipe.couples == "global":
            raise UserError(
                f"the loss of {config.recipe} couples a whole batch, so it cannot be split into microbatches",
                where="memory.accumulation",
                hint="memory.accumulation=1 and a smaller train.batch",
            )
        return [(batch // wish, wish)]
    if recipe.couples != "example" or config.memory.fuse_update:
        return [(batch, 1)]
    return [(batch // n, n) for n in range(1, local + 1) if local % n == 0]
