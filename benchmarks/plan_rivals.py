"""The planner's plan against plans that other trainers' policies would give, at the same budget and on the same model.

    python benchmarks/plan_rivals.py [--every 8] [--only h200] [--json rivals.json]
    python benchmarks/plan_rivals.py --whole     # nobody accumulates: the batch, halved until recomputing all fits

For each case: FLOPs that a step recomputes, microbatches a step, the seconds of both by the planner's own cost, and
what that makes of the whole step; ours beside each rival's. A rival has one policy for all layers and, like ours,
chooses its microbatch by that cost:

- full: every layer recomputed.
- dots: every product's output kept (`jax.checkpoint_policies.dots_saveable`), with or without attention's.
- named: MaxText's `remat_policy`, the fastest that fits of `full`, `save_out_proj`, `save_qkv_proj`,
  `save_dot_except_mlp`, `save_dot_except_mlpwi`, `save_dot_with_context_except_mlp`, `minimal`,
  `minimal_with_context`. Those that move tensors to the host are left out: that is another machine's memory.
- estimator: MaxText's estimator: tensors kept one by one in its fixed order, as many as fit.
- ratio: torch.compile's activation memory budget: which tensors to keep is a knapsack by the FLOPs that made each, and
  the ratio, in steps of 0.1 from nothing to all, is the largest that fits.

All of them, ours too, are told that a plan fits where its estimated peak is within the budget: nothing is compiled.
The rivals' rules are written anew from their public descriptions; none of their code runs here. About 30 CPU-seconds
a case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from datetime import date

from plan_choices import GRID, tree_of
from plan_truth import uniform, unit_graphs
from planning import rehearsal_of

from aurora_train.errors import UserError
from aurora_train.machine.profile import cpu_model
from aurora_train.machine.rates import rates_for
from aurora_train.machine.targets import find_machine
from aurora_train.plan.plan import Plan
from aurora_train.plan.planner import Planner
from aurora_train.plan.search import Candidate

QKV, CONTEXT, OUT = ("query", "key", "value"), ("attn_flash", "attn_out", "attn_stats"), ("attn_proj",)
MLP_IN, MLP_OUT = ("mlp_gate", "mlp_up"), ("mlp_out",)
DOTS = (*QKV, *OUT, *MLP_IN, *MLP_OUT)
NAMED = {
    "full": (),
    "save_out_proj": OUT,
    "save_qkv_proj": QKV,
    "save_dot_except_mlp": (*QKV, *OUT),
    "save_dot_except_mlpwi": (*QKV, *OUT, *MLP_OUT),
    "save_dot_with_context_except_mlp": (*QKV, *CONTEXT, *OUT),
    "minimal": DOTS,
    "minimal_with_context": (*DOTS, *CONTEXT),
}


class Told(Planner):
    """A planner to which the estimate is the truth."""

    def compile(self, plan) -> int:
        self.compiles += 1
        self.compiled[repr(plan.work)] = self.estimated(plan).bytes
        return self.compiled[repr(plan.work)]


def estimator_sets(model) -> dict[str, tuple[str, ...]]:
    """MaxText's estimator: from nothing kept, one tensor more at a time; `model` is the config's section.

    Its order is by (what the product sums over, its width), the smallest kept first; of equals, the later in its list.
    """
    heads, kv, hidden = model.heads * model.dim_per_head, model.num_kv_heads * model.dim_per_head, model.hidden_width
    tensors = [
        ("context", CONTEXT, (model.max_length, heads)), ("query", ("query",), (model.width, heads)),
        ("key", ("key",), (model.width, kv)), ("value", ("value",), (model.width, kv)),
        ("mlpwi_0", ("mlp_gate",), (model.width, hidden)), ("mlpwi_1", ("mlp_up",), (model.width, hidden)),
        ("mlpwo", MLP_OUT, (hidden, model.width)), ("out", OUT, (heads, model.width)),
    ]  # fmt: skip
    order = sorted(tensors, key=lambda tensor: (-tensor[2][0], -tensor[2][1]))[::-1]
    sets, kept = {"nothing": ()}, ()
    for name, tags, _ in order:
        kept += tags
        sets[f"+{name}"] = kept
    return sets


def ratio_sets(graphs) -> dict[str, tuple[str, ...]]:
    """torch's: for each ratio of the bytes of all products' outputs, those of most FLOPs of their own that fit in."""
    graph = next(iter(graphs.values()))
    nothing = graph.score(())
    items = []
    for tag in (*DOTS, *CONTEXT):
        alone = graph.score((tag,))
        if tag in graph.tags and alone.used:
            items.append((tag, alone.saved_bytes - nothing.saved_bytes, nothing.dot_flops - alone.dot_flops))
    whole = sum(size for _, size, _ in items)
    picks = [pick for n in range(len(items) + 1) for pick in itertools.combinations(items, n)]
    sums = [(sum(i[1] for i in pick), sum(i[2] for i in pick), tuple(i[0] for i in pick)) for pick in picks]
    return {
        f"ratio {tenths / 10}": max((s for s in sums if 10 * s[0] <= tenths * whole), key=lambda s: (s[1], -s[0]))[2]
        for tenths in range(11)
    }


def best_of(planner: Planner, space, graphs, sets: dict[str, tuple[str, ...]]) -> tuple[str, Candidate] | None:
    """The fastest of one policy's save-sets, each at the largest microbatch that fits; None where none does."""
    best = None
    pairs = space.microbatches  # largest first
    least = {name: uniform(space, graphs, *pairs[0], save) for name, save in sets.items()}
    for name in sorted(sets, key=lambda name: least[name].seconds):
        if best is not None and least[name].seconds >= best[1].seconds:
            break  # even in one piece it would be slower
        rungs = [uniform(space, graphs, *pair, sets[name]) for pair in pairs]
        fitting = largest_that_fits(planner, rungs)
        if fitting is not None and (best is None or fitting.seconds < best[1].seconds):
            best = name, fitting
    return best


def largest_that_fits(planner: Planner, rungs: list[Candidate]) -> Candidate | None:
    """Of one save-set's microbatches, largest first. Walks from where the additive model thinks the limit is."""

    def fits(number):
        return planner.estimated(planner.plan_of(rungs[number])).bytes <= planner.budget

    at = next((i for i, rung in enumerate(rungs) if rung.bytes <= planner.budget), len(rungs) - 1)
    if fits(at):
        while at > 0 and fits(at - 1):
            at -= 1
        return rungs[at]
    while at + 1 < len(rungs):
        at += 1
        if fits(at):
            return rungs[at]
    return None


def planner_of(machine: str, model: str, sequence: int, batch: int, state: str, whole: bool) -> Told:
    """The planner of one case. `whole`: one microbatch a step, and the batch halved until recomputing all fits."""
    target = find_machine(machine)
    while True:
        tree = tree_of(model, sequence, batch, state)
        if whole:
            tree["memory"] = {"accumulation": 1}
        program = rehearsal_of(tree, machine)
        planner = Told(program, target.budget_bytes, target.budget_reason, machine, rates_for(target))
        if not whole or batch == 1 or planner.estimated(_recompute_all(program)).bytes <= planner.budget:
            return planner
        batch //= 2


def _recompute_all(program) -> Plan:
    plan = program.simplest_plan()
    cuts = {path: [segment._replace(save=()) for segment in cut] for path, cut in plan.stacks.items()}
    return Plan(plan.microbatch, 1, cuts)


def measure(machine: str, model: str, sequence: int, batch: int, state: str, whole: bool = False) -> dict:
    """One case: {policy: what it came to, or None where nothing fits}; "ours" is the planner's."""
    planner = planner_of(machine, model, sequence, batch, state, whole)
    program = planner.program
    space = planner._space()
    graphs = unit_graphs(planner)
    rivals = {
        "full": {"full": ()},
        "dots": {"dots": DOTS, "dots, attention": (*DOTS, *CONTEXT)},
        "named": NAMED,
        "estimator": estimator_sets(program.config.model),
        "ratio": ratio_sets(graphs),
    }
    found = {"ours": _ours(planner, space)}
    for rival, sets in rivals.items():
        best = best_of(planner, space, graphs, sets)
        found[rival] = None if best is None else _told(planner, *best)
    name = f"{machine} {model} T{sequence} batch {program.config.train.batch} {state}"
    work = found["ours"] and found["ours"].pop("step") - found["ours"]["seconds"]
    return {"case": name, "budget": planner.budget, "work": work, "plans": found}


def _ours(planner: Planner, space) -> dict | None:
    try:
        plan = planner.run()
    except UserError:
        return None
    by_save = {(stack.path, score.save): score for stack in space.stacks for score in stack.scores}
    cuts = {path: [(s.start, s.stop, by_save[path, s.save]) for s in cut] for path, cut in plan.stacks.items()}
    parts = [f"{a}-{b} {'+'.join(score.save) or 'nothing'}" for cut in cuts.values() for a, b, score in cut]
    told = _told(planner, "; ".join(parts), space.candidate(plan.microbatch, plan.accumulation, cuts))
    return told | {"step": plan.details["time"]["step_seconds"]}


def _told(planner: Planner, name: str, candidate: Candidate) -> dict:
    return {
        "choice": name, "flops": candidate.flops, "seconds": candidate.seconds, "microbatch": candidate.microbatch,
        "accumulation": candidate.accumulation, "bytes": planner.estimated(planner.plan_of(candidate)).bytes,
    }  # fmt: skip


def more(ours: float, theirs: float) -> str:
    """Ours over theirs in percent."""
    if theirs == 0:
        return "   same" if ours == 0 else "  more"
    return f"{100 * (ours / theirs - 1):+7.1f} %"


def show(row: dict) -> None:
    print(f"{row['case']}, budget {row['budget'] / 1e9:.1f} GB")
    ours = row["plans"]["ours"]
    for rival, plan in row["plans"].items():
        if plan is None:
            print(f"  {rival:10s} nothing fits")
            continue
        against = ""
        if rival != "ours" and ours is not None:
            against = f"ours: {more(ours['flops'], plan['flops'])} FLOPs, {more(ours['seconds'], plan['seconds'])} s, "
            against += f"{more(row['work'] + ours['seconds'], row['work'] + plan['seconds'])} step"
        print(
            f"  {rival:10s} {plan['flops'] / 1e12:9.2f} TFLOP recomputed in {plan['accumulation']:3d} x "
            f"{plan['microbatch']:3d}, {1e3 * plan['seconds']:8.1f} ms, {plan['bytes'] / 1e9:6.1f} GB  {against:57s}  "
            f"{plan['choice']}",
            flush=True,
        )


def summary(rows: list[dict]) -> str:
    lines = []
    for rival in ("full", "dots", "named", "estimator", "ratio"):
        both = [(row["plans"]["ours"], row["plans"][rival], row["work"]) for row in rows if row["plans"]["ours"]]
        pairs = [(ours, theirs) for ours, theirs, _ in both if theirs is not None]
        steps = [(work + ours["seconds"]) / (work + theirs["seconds"]) for ours, theirs, work in both if theirs]
        ratios = sorted(ours["seconds"] / theirs["seconds"] for ours, theirs in pairs)
        if not ratios:
            lines.append(f"{rival}: fits in none of {len(both)}")
            continue
        fewer = sum(ours["flops"] <= theirs["flops"] for ours, theirs in pairs)
        lines.append(
            f"{rival}: fits in {len(pairs)} of {len(both)}; there ours recomputes no more FLOPs in {fewer}; seconds, "
            f"ours over theirs: median {100 * (statistics.median(ratios) - 1):+.1f} %, best "
            f"{100 * (ratios[0] - 1):+.1f} %, worst {100 * (ratios[-1] - 1):+.1f} %; of the whole step: median "
            f"{100 * (statistics.median(steps) - 1):+.1f} %, worst {100 * (max(steps) - 1):+.1f} %"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=8, help="each so-manieth of the cases of plan_choices.py")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--whole", action="store_true", help="one microbatch a step, for everybody")
    parser.add_argument("--json", help="write the rows here too")
    options = parser.parse_args()
    cases = [case for case in GRID[:: options.every] if options.only in " ".join(map(str, case))]
    print(f"{date.today()}, {cpu_model()}; {len(cases)} of {len(GRID)} cases; bytes are estimated")
    rows = []
    for case in cases:
        rows.append(measure(*case, whole=options.whole))
        show(rows[-1])
    print(summary(rows))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
