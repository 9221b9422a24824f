"""Chooses the fastest plan that fits a step: estimate, search, compile, correct.

`program` is a `train.rehearsal.Rehearsal`: it knows how to trace and compile the real step under a plan, for this
machine or for an absent one. The planner compiles at most four times and never changes the maths.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace

from aurora_train.compat import is_unreadable
from aurora_train.errors import UserError
from aurora_train.machine.memory import give_back_freed
from aurora_train.mesh import batch_ways
from aurora_train.plan import account, offload, unreadable
from aurora_train.plan.estimate import Estimate
from aurora_train.plan.plan import Plan
from aurora_train.plan.search import Candidate, Costs, Space, StackCosts, cheapest, next_faster, preference
from aurora_train.plan.shortlist import Shortlist
from aurora_train.plan.traffic import received
from aurora_train.plan.verify import collectives, compiled_bytes
from aurora_train.units import size

COMPILES = 4
MARGIN = 0.08  # share of the budget kept free while nothing is compiled: the estimate may be too low by this much
FULL_ENOUGH = 0.95  # once a plan that uses this share of the budget fits, another compilation has to promise WORTH
WORTH = 0.001  # saving, as a share of the seconds that plan spends on recomputation and overhead
LIKELY = 0.5  # probability of fitting required of a plan once two are compiled and have corrected the estimates
SURE = 0.97  # the same for the last plan that may be compiled, if none has fitted yet
UNKNOWN = Costs(1e-14, 1e-12, 1e-3, 1e-10)  # costs of an unknown machine: they only rank plans
UNKNOWN_LINK = 2 / 16e9  # seconds to move a byte out and back if the speed of the link to the processor is unknown
HOPELESS = 1.25  # an estimate of this many times the budget is not worth a compilation
IDLE = 0.5  # on a CPU, no search is made for a step that keeps everything within this share of the budget
ROOMY = 256 * 2**20  # bytes of temporaries above which a CPU splits such a step's batch into microbatches
WORK_PER_BYTE = 1_500  # FLOPs in a microbatch per byte of parameters: 1,000 tokens, if a parameter has 4 bytes


class Misfit(UserError):
    """No plan fits the budget."""


@dataclass
class Planner:
    """One search. `budget` in bytes on one device; it may be None if only `estimated` and `compile` are used.

    `beside_copy`: a step of more bytes leaves a save no room for its copy of the state, so the plan says that saves are
    made in place; None if there is always room. `offload_beside_copy`: the same for the bytes of each device that wait
    in the processor's memory, where that is apart. `budget_in_place`: (budget, reason) used instead if nothing fits
    `budget`.
    """

    program: object
    budget: int | None
    budget_reason: str
    machine: str
    rates: object = None
    verify: bool = True
    progress: object = None
    compiled_later: bool = False  # the caller itself compiles a plan that needed no search
    beside_copy: int | None = None
    offload_beside_copy: int | None = None
    budget_in_place: tuple[int, str] | None = None
    compiles: int = 0
    cpu_seconds: float = 0.0
    compiled: dict = field(default_factory=dict)
    collectives: dict = field(default_factory=dict)  # of each compiled plan: how many by kind, and their bytes
    tried: list[tuple[Candidate, int]] = field(default_factory=list)  # plans of a search, with compiled bytes

    @property
    def usable(self) -> int:
        """How many bytes of the budget the estimate of a plan may use."""
        return int(self.budget * (1 if self.compiles else 1 - MARGIN))

    # ---- the parts

    @functools.cached_property
    def estimate(self) -> Estimate:
        """The additive model of this program."""
        return Estimate(self.program)

    def estimated(self, plan: Plan) -> Candidate:
        """A plan with its estimated bytes and its cost on top of the step's own work."""
        graphs = self.estimate.graphs
        moved = dict.fromkeys(tag for cut in plan.stacks.values() for segment in cut for tag in segment.offload)
        offload.refuse_idle(tuple(moved), graphs.values())
        cuts = {
            path: [(s.start, s.stop, offload.score_of(graph, s.save, s.offload)) for s in plan.stacks[path]]
            for path, graph in graphs.items()
        }
        return self._space_of([self._costs_of(path, []) for path in graphs], []).candidate(
            plan.microbatch, plan.accumulation, cuts
        )

    def compile(self, plan: Plan) -> int:
        """The compiler's peak in bytes."""
        key = repr(plan.work)
        if key not in self.compiled:
            self.compiles += 1
            if self.progress:
                self.progress(self.compiles - 1, COMPILES, f"compiling a plan for {self.machine}")
            paused = time.thread_time()
            compiled = self.program.compile(plan)
            self.compiled[key] = compiled_bytes(compiled).peak
            if self.program.mesh.devices.size > 1:
                self.collectives[key] = {"collectives": collectives(compiled), "received": received(compiled.as_text())}
            give_back_freed()  # or else the compiler's leftovers of every plan are part of the run's memory
            self.cpu_seconds -= time.thread_time() - paused
        return self.compiled[key]

    # ---- the search

    def run(self) -> Plan:
        """The plan, verified by a compiler if there is one. UserError if nothing fits."""
        plan = self._beside_copy_or_in_place(self._asked_or_searched)
        self._refuse_writing(plan)
        return plan

    def _refuse_writing(self, plan: Plan) -> None:
        """UserError if texts that the run will write do not fit beside its state: it would end where it is scored."""
        writing, held = plan.details.get("writing"), sum(self.estimate.arguments.values())
        if writing and held + writing["bytes"] > self.budget:
            raise UserError(
                f"{writing['texts']} texts of {writing['length']} tokens, written at once for samples or scores, take "
                f"{size(writing['bytes'])} beside the {size(held)} of the state, and the budget is {size(self.budget)}",
                where="samples.count", why=self.budget_reason,
                hint="fewer texts (samples.count, score.exact_batch), or shorter ones (samples.max_tokens)",
            )  # fmt: skip

    def unchanged(self, earlier: Plan) -> Plan | None:
        """The plan that `run` would make, if it is `earlier`, which an equal planner with other memory made; else None.

        On a CPU that has room for everything, free memory decides nothing else (`_as_asked`).
        """
        searched = "planning_seconds" in earlier.details  # with more memory, a search might find a faster one
        if self.program.platform != "cpu" or self.is_fixed or searched or not earlier.predicted_bytes:
            return None
        if earlier.predicted_bytes > IDLE * self.budget:
            return None
        return self._with_saves(replace(earlier, budget_bytes=self.budget))

    def _beside_copy_or_in_place(self, search) -> Plan:
        """The result of a search within the budget or, if nothing fits that, within the budget of saves in place."""
        try:
            return self._with_saves(self._readable_or_not(search))
        except Misfit:
            if self.budget_in_place is None:
                raise
        (self.budget, self.budget_reason), self.budget_in_place, self.beside_copy = self.budget_in_place, None, 0
        return self._with_saves(self._readable_or_not(search))

    def _with_saves(self, plan: Plan) -> Plan:
        """The plan, with how saves are made: in place if a copy of the state does not fit beside the step."""
        needed = plan.compiled_bytes or plan.predicted_bytes or self.budget
        waiting = plan.details.get("host_bytes") or 0
        in_place = self.beside_copy is not None and needed > self.beside_copy
        in_place |= self.offload_beside_copy is not None and waiting > self.offload_beside_copy
        return replace(plan, saves_in_place=in_place, beside_copy_bytes=self.beside_copy)

    def _readable_or_not(self, search) -> Plan:
        """The result of a search, or a plan made without one if the step contains something it cannot read."""
        try:
            return search()
        except Exception as error:
            if not is_unreadable(error):
                raise
            fault = error  # handled outside of this block, so that a later error is not shown as its consequence
        devices = batch_ways(self.program.mesh)
        return unreadable.plan_unreadable(self, microbatches(self.program.config, self.program.recipe, devices), fault)

    def _asked_or_searched(self) -> Plan:
        began = time.thread_time()
        whole = self._as_asked()
        verify = self.verify and not self.compiled_later and self.compiles < COMPILES
        compiled = self.compile(whole) if whole and verify else None
        self.cpu_seconds += time.thread_time() - began
        if whole and (self.is_fixed or compiled is None or compiled <= self.budget):
            return self._filled_in(whole, compiled)
        return self._searched()

    def _searched(self) -> Plan:
        began = time.thread_time()
        (space, candidates), room = self._candidates, self.program.host_bytes
        roomy = [c for c in candidates if room is None or c.host <= room]
        if not roomy:
            offload.refuse_overflow(min(c.host for c in candidates), room)
        shortlist = Shortlist(roomy, self.budget)
        plan = self._written(space, shortlist, *self._choose(shortlist))
        self.cpu_seconds += time.thread_time() - began
        return replace(plan, details=plan.details | {"planning_seconds": round(self.cpu_seconds, 2)})

    @functools.cached_property
    def _candidates(self) -> tuple[Space, list[Candidate]]:
        """(what can be chosen, every plan of it): the same for every budget."""
        space = self._space()
        return space, space.all()

    def _as_asked(self) -> Plan | None:
        """The plan if no search is needed: the config says what is kept, or a CPU has room for everything."""
        program, devices = self.program, batch_ways(self.program.mesh)
        pairs = microbatches(program.config, program.recipe, devices)
        if not self.is_fixed and program.platform != "cpu":
            return None
        plan = program.asked_plan()
        if not self.is_fixed:
            plan = self._in_microbatches(plan, pairs)
            return plan if self.estimated(plan).bytes <= IDLE * self.budget else None
        plans = [replace(plan, microbatch=m, accumulation=n) for m, n in pairs]
        return next((p for p in plans if self.estimated(p).bytes <= self.usable), plans[-1])

    def _in_microbatches(self, plan: Plan, pairs: list[tuple[int, int]]) -> Plan:
        """Split the batch on a single CPU, until the temporaries fit in `ROOMY` or the parts would be too small.

        On a CPU a large batch is no faster than its parts, and the kernel clears all memory that XLA allocates in a
        step. With several devices, every part would need its own reduction of the gradients.
        """
        whole = self.estimated(plan).bytes
        temporaries = whole - sum(self.estimate.arguments.values())
        if len(pairs) == 1 or self.program.mesh.devices.size > 1 or temporaries <= ROOMY:
            return plan
        most = (self.program.product_flops(plan) or 0) / (WORK_PER_BYTE * account.parameter_bytes(self.program))
        cheap = [(m, n) for m, n in pairs if n <= most] or pairs[:1]
        microbatch, parts = next((pair for pair in cheap if temporaries <= ROOMY * pair[1]), cheap[-1])
        reason = f"everything kept; {parts} microbatches, for less memory"
        parted = replace(plan, microbatch=microbatch, accumulation=parts, reason=reason)
        return parted if self.estimated(parted).bytes < whole else plan

    @property
    def is_fixed(self) -> bool:
        """Whether the config says what is kept."""
        memory = self.program.config.memory
        return memory.save != "auto" or memory.unroll != "auto"

    def _filled_in(self, plan: Plan, compiled: int | None) -> Plan:
        """A plan that was not searched for, completed with its bytes and details."""
        cost = self.estimated(plan)
        offload.refuse_overflow(cost.host, self.program.host_bytes)
        needed = compiled if compiled is not None else cost.bytes
        if needed > self.budget:
            if self.budget_in_place is not None:
                self.refuse_misfit(None, needed)
            more = f"it needs {size(needed)}, more than the budget"
            plan = replace(plan, reason=f"{plan.reason}; {more}" if plan.reason else more)
        return replace(
            plan, machine=self.machine, platform=self.program.platform, budget_bytes=self.budget,
            predicted_bytes=cost.bytes, compiled_bytes=compiled, details=account.essentials(self, plan, cost),
        )  # fmt: skip

    def smaller(self, than: Plan) -> Plan | None:
        """After an out-of-memory error: the fastest plan that needs clearly less than `than` did, or None."""
        needed = than.compiled_bytes or than.predicted_bytes
        most, reason = int(0.85 * needed), f"an out-of-memory with a plan of {size(needed)}"
        self.budget, self.budget_reason = min(self.budget, most), reason
        if self.budget_in_place is not None:
            self.budget_in_place = min(self.budget_in_place[0], most), reason
        try:
            return self._beside_copy_or_in_place(self._searched)
        except UserError:
            return None

    def _space(self) -> Space:
        program, graphs = self.program, self.estimate.graphs
        calls, wish = program.stack_calls(), program.config.memory.offload
        moved = offload.named(program.config, [call[0] for call in calls.values()], apart=program.apart)
        offload.refuse_idle(moved, graphs.values() if moved else [])
        stacks = []
        for path, graph in graphs.items():
            mine = tuple(tag for tag in moved if tag in offload.tags_of(calls[path][0]))
            scores = offload.with_offload(graph, graph.points(), wish, mine, program.apart)
            stacks.append(self._costs_of(path, scores))
        return self._space_of(stacks, microbatches(program.config, program.recipe, batch_ways(program.mesh)))

    def _costs_of(self, path: str, scores: list) -> StackCosts:
        return StackCosts(path, self.program.stacks()[path].num_units, scores, self.estimate.gradient[path])

    def _space_of(self, stacks: list[StackCosts], pairs) -> Space:
        return Space(stacks, pairs, batch_ways(self.program.mesh), self._costs(), self.estimate.rest)

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
        """(the plan, its compiled bytes or None if nothing is compiled)."""
        if not self.verify:
            choice = cheapest(shortlist.candidates, self.usable, shortlist.expected)
            self.refuse_misfit(choice, (choice or shortlist.smallest()).bytes)
            return choice, None
        best, real, least = self._known(shortlist)
        latest = COMPILES if self.tried else COMPILES - 1  # a first search compiles at least one
        for turn in range(min(self.compiles, latest), COMPILES):
            candidate = self._next(shortlist, best, turn)
            if candidate is None or (best is not None and not self._pays(shortlist, candidate, best, real)):
                break
            needed = self.compile(self.plan_of(candidate))
            shortlist.learn(candidate, needed)
            self.tried.append((candidate, needed))
            least = min(needed, least or needed)
            if needed <= self.budget:
                best, real = candidate, needed
        if best is None:
            self.refuse_misfit(None, least or shortlist.smallest().bytes)
        return best, real

    def _known(self, shortlist: Shortlist) -> tuple[Candidate | None, int | None, int | None]:
        """(the fastest of an earlier search's compiled plans that fits, its bytes, the fewest bytes of any of them)."""
        for candidate, needed in self.tried:
            shortlist.learn(candidate, needed)
        fitting = [one for one in self.tried if one[1] <= self.budget]
        best, real = min(fitting, key=lambda one: preference(one[0]), default=(None, None))
        return best, real, min((needed for _, needed in self.tried), default=None)

    def _next(self, shortlist: Shortlist, best: Candidate | None, turn: int) -> Candidate | None:
        """The plan to compile next; the smallest if no other is likely enough to fit."""
        sure = SURE if best is None and turn == COMPILES - 1 else LIKELY if turn >= 2 else 0.0
        candidate = shortlist.most_promising(best, sure)
        if candidate is not None or best is not None:
            return candidate
        smallest = shortlist.smallest()
        hopeless = shortlist.is_compiled(smallest) or smallest.bytes > HOPELESS * self.budget
        return None if hopeless else smallest

    def _pays(self, shortlist: Shortlist, candidate: Candidate, best: Candidate, real: int) -> bool:
        """Whether to compile once more although a plan that fits is known."""
        gain = WORTH if real >= FULL_ENOUGH * self.budget else 0.0
        return shortlist.promise(candidate, best) > gain * best.seconds

    def refuse_misfit(self, choice: Candidate | None, needed: int) -> None:
        """Misfit if there is no choice, or it needs more bytes than the budget has."""
        if choice is not None and needed <= self.budget:
            return
        levers = "; ".join(f"{lever['setting']} saves {size(lever['saves_bytes'])}" for lever in self._levers()[:3])
        raise Misfit(
            f"no plan fits {self.machine or 'this machine'}: the smallest needs {size(needed)} of {size(self.budget)}",
            where="memory.budget",
            why=f"budget: {self.budget_reason}",
            hint=levers or "a smaller model or a shorter sequence",
        )

    def _levers(self) -> list[dict]:
        return account.levers(self.program, self.program.blueprint(self.program.simplest_plan()))

    # ---- the result

    def plan_of(self, candidate: Candidate) -> Plan:
        """The plan of a candidate, without bytes and details."""
        cuts = candidate.stacks()
        return Plan(candidate.microbatch, candidate.accumulation, cuts | self.program.uncalled(cuts))

    def _written(self, space: Space, shortlist: Shortlist, chosen: Candidate, compiled: int | None) -> Plan:
        plan = self.plan_of(chosen)
        faster = next_faster(shortlist.candidates, chosen, shortlist.expected)
        how = "compiled" if compiled is not None else "not compiled"
        details = account.details(self, space, shortlist, chosen, faster)
        return replace(
            plan,
            reason=f"the fastest that fits ({how}); budget: {self.budget_reason}",
            machine=self.machine,
            platform=self.program.platform,
            budget_bytes=self.budget,
            predicted_bytes=chosen.bytes,
            compiled_bytes=compiled,
            details=details,
        )


def microbatches(config, recipe, devices: int) -> list[tuple[int, int]]:
    """(microbatch over all devices, accumulation) for each division of the batch, largest first. UserError if none."""
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
    if recipe.couples != "example":
        return [(batch, 1)]
    return [(batch // n, n) for n in range(1, local + 1) if local % n == 0]
