"""Whether a run in fp8 learns as one in bfloat16: loss curves of one config, real text, every run from its start.

    python benchmarks/fp8.py [--config quickstart] [--seeds 0 1] [--json FILE] [KEY.PATH=VALUE ...]

Each precision is trained by `aurora train` from each seed, and the validation losses are set side by side. What two
precisions differ by means something beside what two seeds of one precision differ by, so that is printed too. On a CPU
8 bits are emulated: the losses are those that a GPU would show but for the order of sums, the times are not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from aurora_train.machine.profile import cpu_model

SIDES = {
    "float32": ["train.precision=float32"], "bfloat16": ["train.precision=bfloat16"], "fp8": ["train.precision=fp8"],
    "fp8, ends in bfloat16": ["train.precision=fp8", "train.bf16_ends=1"],
}  # fmt: skip
REST = ["evaluate.baselines=false", "samples.count=1", "samples.max_tokens=1"]


def curve(config: str, wishes: list[str], folder: Path) -> dict[int, float]:
    """Validation loss by step, and the last training losses' mean as step -1, of one whole run."""
    command = [sys.executable, "-m", "aurora_train", "train", config, *REST, *wishes, "--run", str(folder), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {r["step"]: r["evaluation"]["loss"] for r in records if "evaluation" in r}
    train = [r["loss"] for r in records if "loss" in r]
    return found | {-1: statistics.mean(train[-20:])}


def table(curves: dict[str, list[dict[int, float]]]) -> str:
    """Means over seeds; the last two columns are of the last evaluation."""
    steps = sorted(step for step in next(iter(curves.values()))[0] if step >= 0)
    base = curves["bfloat16"]
    lines = [f"| precision | {' | '.join(f'step {s}' for s in steps)} | last 20 losses | over bfloat16, of one seed |"]
    lines.append("|" + "---|" * (len(steps) + 3))
    for name, runs in curves.items():
        means = [statistics.mean(run[s] for run in runs) for s in (*steps, -1)]
        off = [100 * (run[steps[-1]] / other[steps[-1]] - 1) for run, other in zip(runs, base, strict=True)]
        told = ", ".join(f"{x:+.2f} %" for x in off) if name != "bfloat16" else "-"
        lines.append(f"| {name} | {' | '.join(f'{m:.4f}' for m in means)} | {told} |")
    last = [run[steps[-1]] for run in base]
    if len(last) > 1:
        lines.append(f"\nSeeds of bfloat16 lie {100 * (max(last) / min(last) - 1):.2f} % apart.")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--json", type=Path)
    parser.add_argument("wishes", nargs="*", metavar="KEY.PATH=VALUE")
    options = parser.parse_args()
    curves: dict[str, list] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for name, wishes in SIDES.items():
                run = Path(folder) / f"{len(curves[name])}-{list(SIDES).index(name)}"
                curves[name].append(curve(options.config, [*options.wishes, *wishes, f"train.seed={seed}"], run))
                print(f"seed {seed}, {name}: {curves[name][-1]}", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(curves))
    print(f"{options.config}, {len(options.seeds)} seeds; {cpu_model()}, {os.cpu_count()} cores, {date.today()}\n")
    print(table(curves))


if __name__ == "__main__":
    main()
