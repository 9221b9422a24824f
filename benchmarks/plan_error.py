"""How far the estimated peak is from the compiled one, on real-size steps for GPUs that are not here.

    python benchmarks/plan_error.py                 # the development cases, known while the estimate was written
    python benchmarks/plan_error.py --held-out      # the held-out ones
    python benchmarks/plan_error.py --all --json plan_error.json

Each row: bytes estimated before anything was compiled, bytes of XLA:GPU's own plan, the signed error in percent of the
compiled peak, and the attention kernel compiled. Needs the extra [plan]; 5 to 15 CPU-seconds a case.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date

from plan_cases import DEVELOPMENT, FIRST_HELD_OUT, HELD_OUT
from planning import case_plan, case_rehearsal

from aurora_train.machine.profile import cpu_model
from aurora_train.plan.planner import Planner


def measure(case) -> dict:
    """One row."""
    program = case_rehearsal(case)
    plan = case_plan(case, program)
    planner = Planner(program, None, "", case.machine)
    began = time.process_time()
    estimated = planner.estimated(plan).bytes
    seconds = time.process_time() - began
    compiled = planner.compile(plan)
    return {
        "case": case.name,
        "state": case.state,
        "attention": program.model().attention.name,
        "estimated": estimated,
        "compiled": compiled,
        "error": 100 * (estimated - compiled) / compiled,
        "seconds": seconds,
    }


def summary(rows: list[dict], name: str) -> str:
    errors = [abs(row["error"]) for row in rows]
    if not errors:
        return f"{name}: no case"
    return f"{name}: {len(errors)} cases, mean {sum(errors) / len(errors):.2f} %, max {max(errors):.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--json", help="write the rows here too")
    options = parser.parse_args()
    lists = {"development": DEVELOPMENT + FIRST_HELD_OUT, "held-out": HELD_OUT}
    wanted = list(lists) if options.all else ["held-out" if options.held_out else "development"]
    print(f"{date.today()}, {cpu_model()}, Python {platform.python_version()}")
    print(f"{'case':58s} {'attention':9s} {'estimated':>9s} {'compiled':>9s} {'error':>8s}")
    rows = []
    for name in wanted:
        for case in lists[name]:
            if options.only not in case.name:
                continue
            row = measure(case) | {"list": name}
            rows.append(row)
            print(
                f"{row['case']:58s} {row['attention']:9s} {row['estimated'] / 1e9:8.2f}G {row['compiled'] / 1e9:8.2f}G "
                f"{row['error']:+7.2f}%",
                flush=True,
            )
    for name in wanted:
        own = [row for row in rows if row["list"] == name]
        print(summary([row for row in own if row["state"] in ("f32", "bf16")], f"{name}, dense full training"))
        print(summary([row for row in own if row["state"] not in ("f32", "bf16")], f"{name}, 8-bit moments and LoRA"))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
