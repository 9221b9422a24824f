"""What offload frees: bytes of the step on the device and on the host, compiled for an absent GPU, beside the plan's.

    python benchmarks/offload.py [--machine h200] [--sequence 4096] [--batch 8]

Needs the extra [plan]; about 20 CPU-seconds a row. What it costs in time is not measured: that takes the device.
"""

from __future__ import annotations

import argparse
from datetime import date

from planning import rehearsal_of, shape_tree

from aurora_train.machine.profile import cpu_model
from aurora_train.nn.saving import UNIT_INPUT
from aurora_train.nn.stack import Segment
from aurora_train.plan.plan import Plan
from aurora_train.plan.planner import Planner
from aurora_train.plan.residuals import offloaded, trace_stack_unit
from aurora_train.plan.verify import compiled_bytes

MODELS = ("llama-1b", "llama-3b", "llama-8b")
CHOICES = (((), ()), ((), (UNIT_INPUT,)), (("attn_flash",), (UNIT_INPUT, "mlp_up", "mlp_gate")))


def rows(model: str, machine: str, sequence: int, batch: int):
    """(kept, moved, estimated, compiled, planned on the host, compiled on the host) for each of CHOICES, in bytes."""
    tree = shape_tree(model, sequence, batch, optimizer={"moments": "int8"}, memory={"accumulation": 1})
    program = rehearsal_of(tree, machine)
    ((path, call),) = program.stack_calls().items()
    with program.here():
        graph = trace_stack_unit(*call)
    units = call[0].num_units
    for save, moved in CHOICES:
        plan = Plan(batch, 1, {path: [Segment(0, units, save, offload=moved)]})
        score = graph.score((*save, *(tag for tag in moved if tag != UNIT_INPUT)))
        planned = offloaded(score, moved, graph.kept_by_name(score.save)).offloaded_bytes * units * batch
        found = compiled_bytes(program.compile(plan))
        yield save, moved, Planner(program, None, "", machine).estimated(plan).bytes, found.peak, planned, found.host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="h200")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    shape = f"{options.batch} x {options.sequence} tokens, 8-bit moments"
    print(f"{date.today()}, {cpu_model()}; compiled for {options.machine}, {shape}\n")
    print("| model | kept | offloaded | on the device | estimated | on the host | by the plan |")
    print("|---|---|---|---|---|---|---|")
    for model in MODELS:
        for save, moved, guess, peak, planned, host in rows(model, options.machine, options.sequence, options.batch):
            told = " | ".join(f"{value / 1e9:.1f} GB" for value in (peak, guess, host, planned))
            names = [", ".join(tags) or "nothing" for tags in (save, moved)]
            print(f"| {model} | {names[0]} | {names[1]} | {told} |", flush=True)


if __name__ == "__main__":
    main()
