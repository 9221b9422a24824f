"""What a base of 4 bits costs in loss: adapters on a frozen base, and on the same base in NF4, from one trained run.

    python benchmarks/adapters.py [--base 600] [--steps 200]

The quickstart's model is trained on the quickstart's data, and adapters are then trained on it at another data order.
Scores are bits per byte of the held-out text. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from aurora_train.machine.profile import cpu_model

ADAPTERS = ["model.lora.rank=16", "optimizer.name=adamw", "optimizer.lr=1e-3", "train.seed=1"]
ROWS = {
    "the base as it is": ["optimizer.lr=1e-30"],
    "the base in 4 bits": ["model.lora.base=nf4", "optimizer.lr=1e-30"],
    "adapters on it (LoRA)": [],
    "adapters on it in 4 bits (QLoRA)": ["model.lora.base=nf4"],
}


def train(folder: Path, run: str, *overrides: str) -> dict:
    """Scores of a finished run."""
    command = [sys.executable, "-m", "aurora_train", "train", "quickstart", *overrides, "--run", str(folder / run)]
    subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / run / "scores.json").read_text())["score"]


def frozen_bytes(folder: Path, run: str) -> int:
    """Of the frozen parameters as they are saved."""
    return sum(file.stat().st_size for file in (folder / run / "checkpoints" / "frozen").rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=int, default=600, help="steps of the base")
    parser.add_argument("--steps", type=int, default=200, help="steps of the adapters")
    options = parser.parse_args()
    print(f"{date.today()}, {cpu_model()}; base {options.base} steps, adapters {options.steps} steps\n")
    print("| run | bits per byte | frozen, MB |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = train(folder, "base", f"train.steps={options.base}")
        print(f"| the base, when it was trained | {base['bits_per_byte']:.4f} | |", flush=True)
        for number, (name, overrides) in enumerate(ROWS.items()):
            steps = options.steps if "adapters" in name else 1
            start = [*ADAPTERS, f"init.from={folder / 'base'}", f"train.steps={steps}"]
            score = train(folder, str(number), *start, *overrides)
            held = frozen_bytes(folder, str(number)) / 1e6
            print(f"| {name} | {score['bits_per_byte']:.4f} | {held:.2f} |", flush=True)


if __name__ == "__main__":
    main()
