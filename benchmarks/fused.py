"""What the update within the backward pass saves: bytes of the step with and without it, compiled for an absent GPU.

    python benchmarks/fused.py [--machine h200] [--sequence 2048] [--batch 4]

Everything is recomputed, so that the gradients are at the peak. Needs the extra [plan]; about 20 CPU-seconds a row.
"""

from __future__ import annotations

import argparse
from datetime import date

from plan_cases import SHAPES
from planning import rehearsal_of, shape_tree

from aurora_train.machine.profile import cpu_model
from aurora_train.nn.stack import Segment
from aurora_train.optimizer import partition
from aurora_train.plan.account import tree_bytes
from aurora_train.plan.plan import Plan
from aurora_train.plan.planner import Planner
from aurora_train.plan.verify import compiled_bytes

CASES = (("llama-1b", "float32"), ("llama-1b", "int8"), ("llama-8b", "bfloat16"), ("llama-8b", "int8"))


def measure(model: str, moments: str, machine: str, sequence: int, batch: int, fuse: bool):
    """(estimated, compiled, the stacks' gradients) in bytes. Masters are bfloat16 where moments are not float32."""
    master = "float32" if moments == "float32" else "bfloat16"
    tree = shape_tree(
        model, sequence, batch, optimizer={"clip": None, "moments": moments, "master": master},
        memory={"fuse_update": fuse, "accumulation": 1},
    )  # fmt: skip
    program = rehearsal_of(tree, machine)
    plan = Plan(batch, 1, {"stack": [Segment(0, SHAPES[model]["layers"], ())]})
    estimated = Planner(program, None, "", machine).estimated(plan).bytes
    gradients = tree_bytes(partition(program.blueprint(plan).state.params)[1])
    return estimated, compiled_bytes(program.compile(plan)).peak, gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="h200")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    shape = f"{options.batch} x {options.sequence} tokens"
    print(f"{date.today()}, {cpu_model()}; compiled for {options.machine}, {shape}\n")
    print("| model | moments | stacks' gradients | step | fused | saved | estimated | fused |")
    print("|---|---|---|---|---|---|---|---|")
    for model, moments in CASES:
        rows = [
            measure(model, moments, options.machine, options.sequence, options.batch, fuse) for fuse in (False, True)
        ]
        (guess, plain, gradients), (guess_fused, fused, _) = rows
        told = [gradients, plain, fused, plain - fused, guess, guess_fused]
        print(f"| {model} | {moments} | {' | '.join(f'{value / 1e9:.1f} GB' for value in told)} |", flush=True)


if __name__ == "__main__":
    main()
