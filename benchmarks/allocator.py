"""A training step with what it frees kept for the next one, and with glibc as it comes; interleaved in one run.

    python benchmarks/allocator.py [--case 0.8m 10m] [--rounds 5]

Both are whole `aurora train` processes as in train_step.py. Where a user sets one of glibc's variables the trainer
leaves its allocator alone: that is how the second side is had.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from datetime import date
from pathlib import Path

from train_step import CASES, Ours

from aurora_train.machine.profile import cpu_model

SIDES = {"kept": {}, "as it comes": {"GLIBC_TUNABLES": "glibc.malloc.check=0"}}


def measure(name: str, rounds: int) -> str:
    """One line of the table."""
    case, sides = CASES[name], {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for side, environment in SIDES.items():
                sides[side] = Ours(case, "float32", Path(folder) / side.replace(" ", "-"), environment)
            taken = [{side: process.run(case.seconds) for side, process in sides.items()} for _ in range(rounds)]
            memory = {side: process.peak_rss() for side, process in sides.items()}
        finally:
            for process in sides.values():
                process.close()
    told = [f"{1e3 * statistics.median(one[side] for one in taken):.1f} ms" for side in SIDES]
    ratios = [one["as it comes"] / one["kept"] for one in taken]
    told.append(f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})")
    told.append(" / ".join(f"{memory[side] / 1e9:.2f}" for side in SIDES) + " GB")
    return f"| {name} | {' | '.join(told)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=CASES, default=["0.8m", "10m"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores, float32, {options.rounds} rounds\n")
    print("| case | kept | as it comes | ratio | peak RSS |\n|---|---|---|---|---|")
    for name in options.case:
        print(measure(name, options.rounds), flush=True)


if __name__ == "__main__":
    main()
