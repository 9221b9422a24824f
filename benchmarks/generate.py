"""Decoding against transformers' `generate` on torch, and against the sampler of an earlier commit, in one run.

    pip install -e '.[parity]'
    python benchmarks/generate.py [--model smollm2-135m qwen3.5-tiny] [--dtype float32 bfloat16] [--batch 1 8 32]
        [--rounds 5] [--new 32] [--before COMMIT]

Each side is a process of its own, which waits while another is asked; every line is a median over the rounds. `decode`
is tokens a second of all rows after a prompt of 64 tokens, `read` the seconds until the first token after 2,048. A
ratio above 1 says that ours is faster. The share of the bandwidth is the bytes of all weights a token over what a triad
of large arrays reaches on all cores. Beside other work rates say little, because torch's threads wait for each other;
so the ratio of processor seconds is shown too. `--before ''` leaves the earlier commit out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

import numpy as np
from generate_side import _EARLIER
from sides import Side
from tune_peers import processor_seconds

from aurora_train.machine.profile import cpu_model

HERE = Path(__file__).parent
BEFORE = "6d5e6f7"  # the sampler before "Speak fast"


def bandwidth() -> float:
    """Bytes a second of `a + b -> c` on all cores, of arrays that no cache holds; the best of ten."""
    size, cores = 1 << 24, os.cpu_count()
    arrays = [[np.ones(size, np.float32) for _ in range(3)] for _ in range(cores)]

    def once() -> float:
        threads = [threading.Thread(target=np.add, args=(a, b, c)) for a, b, c in arrays]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 3 * 4 * size * cores / (time.perf_counter() - began)

    return max(once() for _ in range(10))


@contextlib.contextmanager
def earlier(commit: str):
    """A checkout of an earlier commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*tree, "add", "-q", "--detach", folder, commit], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*tree, "remove", "--force", folder], check=True)


class Measured:
    """A side with its seconds and processor seconds by shape."""

    def __init__(self, kind: str, model: str, dtype: str, path: str):
        environment = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.side = Side(str(HERE / "generate_side.py"), kind, model, dtype, environment=environment)
        self.bytes = int(self.side.ask("bytes"))
        self.seconds: dict[tuple, list[float]] = {}
        self.processor: dict[tuple, list[float]] = {}

    def take(self, shape: tuple, keep: bool) -> None:
        """Ask once for (batch, prompt, new)."""
        batch, prompt, new = shape
        before = processor_seconds(self.side._process.pid)
        first, each = json.loads(self.side.ask(f'{{"batch": {batch}, "prompt": {prompt}, "new": {new}}}'))
        if keep:
            self.seconds.setdefault(shape, []).append(each if new else first)
            self.processor.setdefault(shape, []).append(processor_seconds(self.side._process.pid) - before)


def measure(model: str, dtype: str, options, before: str | None) -> list[str]:
    """The lines of the table for one model and dtype."""
    shapes = [(batch, 64, options.new) for batch in options.batch] + [(1, 2048, 0)] * options.prefill
    paths = {"ours": str(HERE.parent), "torch": ""} | ({"before": before} if before and model in _EARLIER else {})
    sides = {kind: Measured(kind, model, dtype, path) for kind, path in paths.items()}
    try:
        for shape in shapes:
            for turn in range(options.rounds + 1):  # the first compiles
                for side in sides.values():
                    side.take(shape, keep=turn > 0)
    finally:
        for side in sides.values():
            side.side.close()
    return [_line(model, dtype, shape, sides, options.bandwidth) for shape in shapes]


def _line(model: str, dtype: str, shape: tuple, sides: dict[str, Measured], bandwidth: float) -> str:
    batch, prompt, new = shape
    took = {kind: statistics.median(side.seconds[shape]) for kind, side in sides.items()}
    ratios = {kind: statistics.median(b / a for a, b in zip(sides["ours"].seconds[shape], side.seconds[shape],
                                                            strict=True)) for kind, side in sides.items()}  # fmt: skip
    spent = {kind: statistics.median(side.processor[shape]) for kind, side in sides.items()}
    share = f"{sides['ours'].bytes / took['ours'] / bandwidth:.0%}" if new and batch == 1 else ""
    shown = [f"{batch / one:.1f} tok/s" if new else f"{one:.2f} s" for one in took.values()]
    rates = dict(zip(took, shown, strict=True))
    cells = [model, dtype, f"decode, {batch} rows" if new else f"read {prompt:,}", rates["ours"], rates["torch"],
             f"{ratios['torch']:.2f}", f"{spent['torch'] / max(spent['ours'], 0.01):.2f}", rates.get("before", ""),
             f"{ratios['before']:.2f}" if "before" in ratios else "", share]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["smollm2-135m", "qwen3.5-tiny"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--no-prefill", dest="prefill", action="store_false")
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT")
    options = parser.parse_args()
    options.bandwidth = bandwidth()
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores; medians of {options.rounds} rounds; "
          f"triad {options.bandwidth / 1e9:.1f} GB/s\n")  # fmt: skip
    print("| model | dtype | | ours | torch | ratio | of processor time | before | ratio | of bandwidth |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with earlier(options.before) if options.before else contextlib.nullcontext() as before:
        for model in options.model:
            for dtype in options.dtype:
                print("\n".join(measure(model, dtype, options, before)), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
