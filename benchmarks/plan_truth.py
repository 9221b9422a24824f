"""The planner against exhaustive truth at toy size: every plan of a grid compiled, then a choice at each budget.

    python benchmarks/plan_truth.py                                   # about 5 CPU-minutes: 128 compilations
    python benchmarks/plan_truth.py --cache truth.json                # keeps compiled bytes for the next time
    python benchmarks/plan_truth.py --layers 12 --sequence 512 --machine gb200

The truth: all unions of a few groups of tags, one save-set for the whole stack, with each microbatch, compiled for the
machine. At each budget the cheapest of these that fits, in the planner's own seconds (recomputation and overhead of a
microbatch), is held against what the planner chooses with at most four compilations. The planner may win: its cuts
and save-sets are not in the truth. Needs the extra [plan].
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from planning import rehearsal_of

from aurora_train.errors import UserError
from aurora_train.machine.profile import cpu_model
from aurora_train.machine.rates import rates_for
from aurora_train.machine.targets import find_machine
from aurora_train.plan.plan import Plan
from aurora_train.plan.planner import COMPILES, Planner
from aurora_train.plan.residuals import trace_stack_unit
from aurora_train.plan.search import Candidate

GROUPS = (("query", "key", "value"), ("attn_flash",), ("attn_proj",), ("mlp_gate", "mlp_up"), ("mlp_act",))
SAME = 1.000001  # a plan this much dearer is as cheap


@dataclass(frozen=True)
class Truth:
    """One compiled plan: its bytes on the device and its cost in the planner's seconds."""

    microbatch: int
    save: tuple[str, ...]
    bytes: int
    seconds: float


class Counting(Planner):
    """A planner that shares its compiled bytes with others, and counts what it would have compiled alone."""

    def compile(self, plan: Plan) -> int:
        self.asked = {*getattr(self, "asked", ()), repr(plan.work)}
        return super().compile(plan)


def toy_tree(*, width=256, layers=6, sequence=256, batch=8, vocabulary=1024) -> dict:
    """A small language model, as a nested dict of config sections."""
    return {
        "recipe": "language_model",
        "model": {"width": width, "layers": layers, "heads": width // 64, "mlp_width": 4 * width,
                  "max_length": sequence},
        "data": {"sequence": sequence, "tokenizer": {"kind": "bpe", "vocab": vocabulary}},
        "train": {"batch": batch, "precision": "bfloat16"},
    }  # fmt: skip


def unions(groups) -> list[tuple[str, ...]]:
    """Every union of groups of tags, the empty one first."""
    picks = itertools.chain.from_iterable(itertools.combinations(groups, n) for n in range(len(groups) + 1))
    return [tuple(itertools.chain.from_iterable(pick)) for pick in picks]


def unit_graphs(planner: Planner) -> dict:
    """The graph of one unit for one example, by the path of each stack."""
    with planner.program.here():
        return {path: trace_stack_unit(*call) for path, call in planner.program.stack_calls().items()}


def uniform(space, graphs, microbatch: int, accumulation: int, save) -> Candidate:
    """The plan that keeps `save` in all units; a name that a stack lacks saves nothing there."""
    cuts = {}
    for stack in space.stacks:
        graph = graphs[stack.path]
        score = graph.score(tuple(tag for tag in save if tag in graph.tags))
        cuts[stack.path] = [(0, stack.units, score)]
    return space.candidate(microbatch, accumulation, cuts)


def exhaust(planner: Planner, groups=GROUPS, progress=None) -> list[Truth]:
    """Every union of groups with every microbatch, compiled by `planner`. ValueError for a tag that no stack has."""
    space = planner._space()
    graphs = unit_graphs(planner)
    known = {tag for graph in graphs.values() for tag in graph.tags}
    missing = {tag for group in groups for tag in group} - known
    if missing:
        raise ValueError(f"no stack has the tags {sorted(missing)}; there are {sorted(known)}")
    found = []
    for (microbatch, accumulation), save in itertools.product(space.microbatches, unions(groups)):
        candidate = uniform(space, graphs, microbatch, accumulation, save)
        found.append(Truth(microbatch, save, planner.compile(planner.plan_of(candidate)), candidate.seconds))
        if progress:
            progress(len(found))
    return found


def budgets(truth: list[Truth], count: int) -> list[int]:
    """So many, evenly spaced from the smallest compiled peak to the largest."""
    low, high = min(t.bytes for t in truth), max(t.bytes for t in truth)
    return [low + (high - low) * i // (count - 1) for i in range(count)]


def judge(planner: Planner, truth: list[Truth], budget: int) -> dict:
    """One row: the best of the truth and what the planner chose at this budget.

    `excess`: the planner's seconds over the truth's, less 1; None where it said that nothing fits.
    """
    best = min((t for t in truth if t.bytes <= budget), key=lambda t: (t.seconds, t.bytes))
    fresh = Counting(
        planner.program, budget, "a budget of the benchmark", planner.machine, planner.rates,
        compiled=planner.compiled,
    )  # fmt: skip
    row = {"budget": budget, "best": best.seconds, "best_bytes": best.bytes, "best_microbatch": best.microbatch,
           "best_save": best.save}  # fmt: skip
    try:
        plan = fresh.run()
    except UserError as fault:
        return row | {"excess": None, "looks": len(getattr(fresh, "asked", ())), "why": str(fault)}
    space = fresh._space()
    by_save = {(s.path, score.save): score for s in space.stacks for score in s.scores}
    cuts = {
        path: [(part.start, part.stop, by_save[path, part.save]) for part in cut] for path, cut in plan.stacks.items()
    }
    seconds = space.candidate(plan.microbatch, plan.accumulation, cuts).seconds
    return row | {
        "seconds": seconds, "excess": seconds / best.seconds - 1, "bytes": plan.compiled_bytes,
        "over": plan.compiled_bytes > budget, "microbatch": plan.microbatch, "looks": len(fresh.asked),
        "cuts": {path: [(a, b, list(score.save)) for a, b, score in cut] for path, cut in cuts.items()},
    }  # fmt: skip


def summary(rows: list[dict]) -> str:
    chosen = [row for row in rows if row["excess"] is not None]
    good = sum(row["excess"] <= SAME - 1 for row in chosen)
    better = sum(row["excess"] < 1 - SAME for row in chosen)
    worst = max((row["excess"] for row in chosen), default=float("nan"))
    mean = sum(max(row["excess"], 0) for row in chosen) / max(len(chosen), 1)
    return (
        f"{len(rows)} budgets: at least as cheap as the truth in {good} ({100 * good / len(rows):.1f} %), cheaper in "
        f"{better}; says infeasible though a plan fits in {len(rows) - len(chosen)}; over budget in "
        f"{sum(row['over'] for row in chosen)}; worst excess {100 * worst:+.2f} %, mean {100 * mean:.2f} %; at most "
        f"{max(row['looks'] for row in rows)} compilations each (allowed: {COMPILES})"
    )


def told(plan: Truth) -> str:
    return f"{plan.bytes / 1e6:.1f} MB ({plan.microbatch} a microbatch, {'+'.join(plan.save) or 'nothing'} kept)"


def show(row: dict) -> str:
    head = f"{row['budget'] / 1e6:8.2f} MB  truth {1e6 * row['best']:8.2f} us ({row['best_microbatch']} a microbatch, "
    head += f"{100 * row['best_bytes'] / row['budget']:5.1f} % full)"
    if row["excess"] is None:
        return f"{head}  SAYS INFEASIBLE after {row['looks']}"
    parts = "; ".join(f"{a}-{b} {'+'.join(save) or 'nothing'}" for cut in row["cuts"].values() for a, b, save in cut)
    return (
        f"{head}  planner {1e6 * row['seconds']:8.2f} us {100 * row['excess']:+7.2f} % ({row['microbatch']}, "
        f"{100 * row['bytes'] / row['budget']:5.1f} % full, {row['looks']} compiled: {parts})"
    )


def measure(tree: dict, machine: str, count: int, cache: Path | None = None, groups=GROUPS, progress=None):
    """(truth, rows) of one toy model on one machine; compiled bytes are kept in the file `cache`."""
    planner = Planner(rehearsal_of(tree, machine), None, "", machine, rates_for(find_machine(machine)))
    known = json.loads(cache.read_text()) if cache and cache.exists() else {}
    case = json.dumps([tree, machine])
    planner.compiled.update(known.get(case, {}))

    def keep():
        if cache:
            cache.write_text(json.dumps(known | {case: planner.compiled}))

    def kept(done):
        keep()
        if progress:
            progress(done)

    truth = exhaust(planner, groups, kept)
    rows = []
    for budget in budgets(truth, count):
        rows.append(judge(planner, truth, budget))
        keep()
    return truth, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 256), ("layers", 6), ("sequence", 256), ("batch", 8), ("vocabulary", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--machine", default="h100")
    parser.add_argument("--budgets", type=int, default=48)
    parser.add_argument("--cache", type=Path, help="a file of compiled bytes, read and written")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    tree = toy_tree(
        width=options.width, layers=options.layers, sequence=options.sequence, batch=options.batch,
        vocabulary=options.vocabulary,
    )  # fmt: skip
    print(f"{date.today()}, {cpu_model()}; {options.machine}, {tree['model']}, batch {options.batch}")
    truth, rows = measure(tree, options.machine, options.budgets, options.cache)
    least, most = min(truth, key=lambda t: t.bytes), max(truth, key=lambda t: t.bytes)
    print(f"truth: {len(truth)} plans compiled, from {told(least)} to {told(most)}")
    for row in rows:
        print(show(row))
    print(summary(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
