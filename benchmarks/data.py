"""Tokens a second that one core can make ready: packed batches with document masks, as `aurora train` reads them.

    python benchmarks/data.py [--case bytes-2k ...] [--seconds 3] [--rounds 5]
    python benchmarks/data.py --waits [CONFIG ...]      # the share of a step that waits for its batch, in real runs

Every case reads real text (the standard library of this Python), prepared and tokenized before the clock starts, in
random order, with the caller's thread bound to one core. The plain side copies arrays of the same shapes that lie in
memory: no reading, packing, masks or shuffling; more than a loader can reach.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from planning import load_tree

from aurora_train import bundled
from aurora_train.data.batches import batches
from aurora_train.machine.profile import cpu_model
from aurora_train.record.progress import preparation
from aurora_train.train.rehearsal import make_recipe


@dataclass(frozen=True)
class Case:
    """Tokens of a row, rows of a batch, tokenizer, and whether the library is read as a mixture of two sources."""

    sequence: int
    batch: int
    tokenizer: dict
    mixed: bool = False


BPE = {"kind": "bpe", "vocab": 8192}
CASES = {
    "bytes-256": Case(256, 32, {"kind": "byte"}),
    "bytes-2k": Case(2048, 16, {"kind": "byte"}),
    "bpe-2k": Case(2048, 16, BPE),
    "bpe-8k": Case(8192, 4, BPE),
    "mix-2k": Case(2048, 16, BPE, mixed=True),
}


def source_of(case: Case):
    """The training split of a case, prepared."""
    library = sysconfig.get_path("stdlib")
    mix = {
        "tests": {"source": f"{library}/test", "weight": 1.0, "pattern": "**/*.py"},
        "rest": {"source": library, "weight": 3.0, "pattern": "*.py"},
    }
    source = {"mix": mix} if case.mixed else {"source": "python-stdlib"}
    tree = {
        "recipe": "language_model", "model": {"width": 64, "layers": 1, "heads": 1, "max_length": case.sequence},
        "data": {**source, "tokenizer": case.tokenizer, "sequence": case.sequence},
        "train": {"batch": case.batch, "steps": 10},
    }  # fmt: skip
    with preparation(quiet=True) as progress:
        recipe = make_recipe(load_tree(tree))
        recipe.ready(progress)
    return recipe.data("train")


def rate(source, batch: int, seconds: float) -> tuple[float, dict]:
    """(tokens a second, the last batch) over as long, read in this thread."""
    tokens, began = 0, time.perf_counter()
    with batches(source, 0, batch, 0, 10**9, prefetch=0) as feed:
        while time.perf_counter() - began < seconds:
            _, arrays = next(feed)
            tokens += arrays["tokens"].size
    return tokens / (time.perf_counter() - began), arrays


def plain_rate(like: dict, seconds: float) -> float:
    """Tokens a second of copying arrays of the same bytes from memory."""
    arrays = {name: np.ascontiguousarray(array) for name, array in like.items()}
    tokens, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for array in arrays.values():
            array.copy()
        tokens += arrays["tokens"].size
    return tokens / (time.perf_counter() - began)


def measure(name: str, seconds: float, rounds: int) -> str:
    """One line of the table."""
    case = CASES[name]
    source = source_of(case)
    _, like = rate(source, case.batch, 0.5)
    documents = np.mean([len(np.unique(row[row > 0])) for row in like["segments"]])
    found = [(rate(source, case.batch, seconds)[0], plain_rate(like, seconds / 4)) for _ in range(rounds)]
    ours, copied = (statistics.median(side) for side in zip(*found, strict=True))
    low, high = min(a for a, _ in found), max(a for a, _ in found)
    shape = f"{case.batch} x {case.sequence}, {documents:.1f} documents a row"
    return f"| {name} | {shape} | **{ours / 1e6:.1f}** ({low / 1e6:.1f} to {high / 1e6:.1f}) | {copied / 1e6:.0f} |"


def waits(name: str, steps: int = 200) -> str:
    """One line: what a run of a bundled config logs as `data_wait`, over the log steps of its first `steps`."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = [f"train.steps={steps}", "log.every=20", "evaluate.final=false", "--quiet"]
        command = [sys.executable, "-m", "aurora_train", "train", name, "--run", str(run), *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        found = [record["data_wait"] for record in records if "data_wait" in record]
    return f"| {name} | {len(found)} | **{statistics.median(found):.2%}** ({min(found):.2%} to {max(found):.2%}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--waits", nargs="*", metavar="CONFIG", help="measure runs; all bundled configs if none")
    options = parser.parse_args()
    if options.waits is not None:
        print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores\n")
        print("| config | log steps | share of a step that waits for data |\n|---|---|---|")
        for name in options.waits or bundled.configs():
            print(waits(name), flush=True)
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"{date.today()}, {cpu_model()}, one core, {options.rounds} rounds\n")
    print("| case | batch | Mtok/s | a copy of the same arrays, Mtok/s |\n|---|---|---|---|")
    for name in options.case:
        print(measure(name, options.seconds, options.rounds), flush=True)


if __name__ == "__main__":
    main()
