"""Sixty configs of real size: does the chosen plan fit once compiled, how full is the budget, how many compilations?

    python benchmarks/plan_choices.py [--first N] [--json choices.json]

A plan that leaves more than 5 % of its budget is full all the same where nothing faster fits: it already keeps all
that pays, or the next plan up does not fit. Needs the extra [plan]; about 20 CPU-seconds a case.
"""

from __future__ import annotations

import argparse
import json
from datetime import date

from plan_cases import SHAPES, VOCABULARY
from planning import rehearsal_of

from aurora_train.errors import UserError
from aurora_train.machine.profile import cpu_model
from aurora_train.machine.rates import rates_for
from aurora_train.machine.targets import find_machine
from aurora_train.plan.planner import COMPILES, Planner

GRID = [  # machine, model, sequence, batch, state
    *[("dgx-spark", "gpt2-350m", t, b, "f32") for t, b in ((1024, 64), (1024, 256), (4096, 64))],
    *[("rtx-5090", "gpt2-350m", t, b, "f32") for t, b in ((1024, 32), (1024, 256), (2048, 64), (4096, 16))],
    *[("rtx-4090", "gpt2-350m", t, b, "f32") for t, b in ((1024, 64), (2048, 32), (8192, 8))],
    *[("dgx-spark", "llama-1b", t, b, "f32") for t, b in ((2048, 64), (4096, 32), (8192, 16), (32768, 4))],
    *[("rtx-5090", "llama-1b", t, b, "f32") for t, b in ((2048, 32), (4096, 16), (8192, 8))],
    *[("h100", "llama-1b", t, b, "f32") for t, b in ((2048, 64), (4096, 64), (16384, 8), (32768, 4))],
    *[("h200", "llama-1b", t, b, "f32") for t, b in ((2048, 128), (4096, 64), (8192, 32), (32768, 8))],
    *[("dgx-station", "llama-1b", t, b, "f32") for t, b in ((4096, 128), (8192, 64), (32768, 8))],
    *[("dgx-spark", "llama-3b", t, b, "f32") for t, b in ((2048, 32), (4096, 16), (8192, 8))],
    *[("h100", "llama-3b", t, b, "f32") for t, b in ((2048, 32), (4096, 32), (8192, 8))],
    *[("h200", "llama-3b", t, b, "f32") for t, b in ((2048, 64), (4096, 32), (8192, 16), (16384, 8))],
    *[("dgx-station", "llama-3b", t, b, "f32") for t, b in ((2048, 128), (4096, 64), (16384, 16))],
    *[("h200", "qwen3-4b", t, b, "f32") for t, b in ((2048, 32), (4096, 32), (8192, 8))],
    *[("dgx-station", "qwen3-4b", t, b, "f32") for t, b in ((4096, 64), (8192, 16))],
    *[("dgx-station", "llama-8b", t, b, "f32") for t, b in ((2048, 64), (4096, 32), (4096, 128), (8192, 16))],
    *[("h200", "llama-8b", t, b, "f32") for t, b in ((1024, 16), (2048, 16))],
    *[("h200", "llama-8b", t, b, "lora") for t, b in ((2048, 32), (4096, 16))],
    *[("dgx-spark", "llama-8b", t, b, "lora") for t, b in ((2048, 16), (4096, 8))],
    *[("dgx-station", "qwen3-14b", t, b, "lora") for t, b in ((4096, 16), (8192, 8))],
    *[("dgx-station", "qwen3-32b", t, b, "lora") for t, b in ((2048, 16), (4096, 8))],
]  # fmt: skip


def tree_of(model: str, sequence: int, batch: int, state: str) -> dict:
    lora = {"lora": {"rank": 16}} if state == "lora" else {}
    return {
        "recipe": "language_model",
        "model": {**SHAPES[model], "max_length": sequence, **lora},
        "data": {"sequence": sequence, "tokenizer": {"kind": "bpe", "vocab": VOCABULARY.get(model, 128256)}},
        "train": {"batch": batch, "precision": "bfloat16"},
    }


def measure(machine: str, model: str, sequence: int, batch: int, state: str) -> dict:
    """One row; `verdict` is "full", "nothing faster fits", "OVER" or "none fits"."""
    target = find_machine(machine)
    program = rehearsal_of(tree_of(model, sequence, batch, state), machine)
    planner = Planner(program, target.budget_bytes, target.budget_reason, machine, rates_for(target))
    row = {"case": f"{machine} {model} T{sequence} batch {batch} {state}", "budget": target.budget_bytes}
    try:
        plan = planner.run()
    except UserError as fault:
        compiled = min(planner.compiled.values(), default=0)
        return row | {"verdict": "none fits", "compiles": planner.compiles, "compiled": compiled, "why": str(fault)}
    used = plan.compiled_bytes / target.budget_bytes
    faster = plan.details["next_faster"]
    if used > 1:
        verdict = "OVER"
    elif used >= 0.95:
        verdict = "full"
    else:
        verdict = "nothing faster fits" if faster is None or faster["lacks_bytes"] > 0 else "NOT FULL"
    return row | {
        "verdict": verdict, "used": used, "compiled": plan.compiled_bytes, "predicted": plan.predicted_bytes,
        "compiles": planner.compiles, "seconds": planner.cpu_seconds, "microbatch": plan.microbatch,
        "accumulation": plan.accumulation, "stacks": plan.to_json()["stacks"],
        "step_seconds": plan.details["time"]["step_seconds"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, help="only so many cases, spread over the list")
    parser.add_argument("--json", help="write the rows here too")
    options = parser.parse_args()
    cases = GRID if not options.first else GRID[:: max(1, len(GRID) // options.first)]
    print(f"{date.today()}, {cpu_model()}; {len(cases)} of {len(GRID)} cases")
    rows = []
    for case in cases:
        row = measure(*case)
        rows.append(row)
        print(
            f"{row['case']:46s} {row['verdict']:20s} {row['compiled'] / 1e9:7.1f} of {row['budget'] / 1e9:6.1f} GB "
            f"({100 * row.get('used', 0):5.1f} %), predicted {row.get('predicted', 0) / 1e9:7.1f}, "
            f"{row['compiles']} compiles, {row.get('seconds', 0):4.1f} s, microbatch {row.get('microbatch', '-')}",
            flush=True,
        )
        if options.json:
            with open(options.json, "w") as file:
                json.dump(rows, file, indent=1)
    bad = [row for row in rows if row["verdict"] in ("OVER", "NOT FULL") or row["compiles"] > COMPILES]
    slow = [row for row in rows if row.get("seconds", 0) > 1]
    print(f"{len(rows) - len(bad)} of {len(rows)} as promised; {len(slow)} took over 1 s of CPU beside compiling")


if __name__ == "__main__":
    main()
