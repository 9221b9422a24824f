"""How the time of a step grows with width, depth, batch and sequence, beside how its FLOPs do.

    python benchmarks/scaling.py [--precision bfloat16] [--steps 5] [--rounds 3]

Along each axis a real config is planned and compiled at each size and its steps are timed, sizes in turn, medians
over rounds. The exponent is the slope of log time against log size; the theoretical one is that of the step's model
FLOPs (6 N a token and causal attention once) at the same sizes. Time against sequence length, the tokens of a batch
being fixed, is fitted as a + b T: b T is the part that is quadratic in a sequence. Time against width is fitted as
a W + b W^2 too: a W, elementwise work, is what keeps the exponent of a narrow model below that of its FLOPs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
from loop import ready
from train_step import Case, step_flops

from aurora_train.machine.hugepages import restart_with_huge_pages
from aurora_train.machine.profile import cpu_model

BASE = Case(width=384, layers=4, heads=6, sequence=128, batch=8)
AXES = {
    "width": [replace(BASE, width=w, heads=w // 64) for w in (256, 384, 512, 768)],
    "wide": [replace(BASE, width=w, heads=w // 64, layers=2) for w in (1024, 2048, 3072, 4096)],
    "layers": [replace(BASE, layers=n) for n in (2, 4, 6, 8)],
    "batch": [replace(BASE, batch=n) for n in (4, 8, 16, 32)],
    "sequence": [replace(BASE, sequence=t, batch=4096 // t) for t in (128, 256, 512, 1024)],
}
FIELDS = {"wide": "width"}  # of a case, where an axis has another name


class Steps:
    """The compiled step of one size."""

    def __init__(self, case: Case, precision: str, folder: Path):
        folder.mkdir()
        (folder / "case.yaml").write_text(json.dumps(case.config(precision)))
        self._step, self._state, self._batch = ready(str(folder / "case.yaml"), str(folder / "run"))
        self.seconds(2)

    def seconds(self, steps: int) -> float:
        """Median seconds of a step."""
        import jax

        found = []
        for _ in range(steps):
            began = time.perf_counter()
            self._state, metrics = self._step(self._state, self._batch)
            jax.block_until_ready((self._state, metrics))
            found.append(time.perf_counter() - began)
        return statistics.median(found)


def along(axis: str, precision: str, steps: int, rounds: int) -> str:
    """One line of the table."""
    cases = AXES[axis]
    sizes = np.array([getattr(case, FIELDS.get(axis, axis)) for case in cases], float)
    with tempfile.TemporaryDirectory() as folder:
        sides = [Steps(case, precision, Path(folder) / str(i)) for i, case in enumerate(cases)]
        found = [[side.seconds(steps) for side in sides] for _ in range(rounds)]
    took = np.median(found, axis=0)
    flops = np.array([step_flops(case) for case in cases])
    told = [axis, " ".join(f"{size:.0f}" for size in sizes), " ".join(f"{1e3 * s:.0f}" for s in took)]
    if axis == "sequence":
        shares = [f"{quadratic_share(sizes, values, sizes[-1]):.0%}" for values in (took, flops)]
        told += [f"{shares[0]} of the time at {sizes[-1]:.0f}", f"{shares[1]} of the FLOPs"]
    else:
        exponents = [np.polyfit(np.log(sizes), np.log(values), 1)[0] for values in (took, flops)]
        told += [f"**{exponents[0]:.2f}**", f"{exponents[1]:.2f}"]
        if FIELDS.get(axis, axis) == "width":
            shares = [1 - quadratic_share(sizes, took / sizes, at) for at in sizes[[0, -1]]]
            told[-2] += f" ({shares[0]:.0%} of it at {sizes[0]:.0f}, {shares[1]:.0%} at {sizes[-1]:.0f} is a W)"
    return f"| {' | '.join(told)} |"


def quadratic_share(sizes, values, at: float) -> float:
    """The share of b T in a + b T at T = `at`, by least squares."""
    slope, constant = np.polyfit(sizes, values, 1)
    return slope * at / (constant + slope * at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="*", choices=AXES, default=list(AXES))
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    restart_with_huge_pages()
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores, {options.precision}, {options.rounds} rounds\n")
    print("| axis | sizes | ms a step | measured | theory |\n|---|---|---|---|---|")
    for axis in options.axis:
        print(along(axis, options.precision, options.steps, options.rounds), flush=True)


if __name__ == "__main__":
    main()
