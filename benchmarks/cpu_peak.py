"""The compiled bytes of a step against the memory that the step really takes, on CPU.

    python benchmarks/cpu_peak.py [NAME ...] [--steps 4]

Compiled: arguments + outputs - aliased + temporaries, from the compiler's own buffer plan of the training step.
Measured: the kernel's own high-water mark of this process (VmHWM, set back after compiling) less the pages of mapped
files and less what the process held before the state was allocated. Every config has a process of its own, on the
trainer's own path from a config to a compiled step. The bar is 5 % + 80 MB. Exit status 1 if one is over it.

What is over and above the compiled bytes is not buffers: a matrix product's packed operands, thread stacks, and what
glibc's malloc keeps. Of the last, one arena (MALLOC_ARENA_MAX=1) or a fixed threshold (MALLOC_MMAP_THRESHOLD_=131072,
MALLOC_TRIM_THRESHOLD_=131072) gives some 15 to 25 MB back; the temporaries are one block, far above any threshold, and
go back to the kernel after every step whatever is set.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

LANGUAGE = ["quickstart", "data.tokenizer.kind=byte", "optimizer.name=adamw"]
SOME = "memory.save=[query, key, value, attn_out, mlp_up]"
# Name -> config and overrides. Large enough that several hundred MB are at stake, few enough tokens for 2 cores.
CONFIGS: dict[str, list[str]] = {
    "f32, all kept": [
        *LANGUAGE, "model.width=384", "model.layers=6", "model.heads=6", "data.sequence=256", "train.batch=24",
        "train.precision=float32", "memory.save=all", "memory.accumulation=1",
    ],
    "f32, nothing kept": [
        *LANGUAGE, "model.width=768", "model.layers=8", "model.heads=12", "data.sequence=256", "train.batch=8",
        "train.precision=float32", "memory.save=nothing", "memory.accumulation=1",
    ],
    "bf16, some kept": [
        *LANGUAGE, "model.width=512", "model.layers=8", "model.heads=8", "data.sequence=512", "train.batch=16",
        "train.precision=bfloat16", SOME, "memory.accumulation=1",
    ],
    "bf16, nothing kept, 4 microbatches": [
        *LANGUAGE, "model.width=768", "model.layers=8", "model.heads=12", "data.sequence=256", "train.batch=32",
        "train.precision=bfloat16", "memory.save=nothing", "memory.accumulation=4",
    ],
    "f32, some kept, 4 microbatches, ema": [
        *LANGUAGE, "model.width=512", "model.layers=8", "model.heads=8", "data.sequence=256", "train.batch=32",
        "train.precision=float32", SOME, "memory.accumulation=4", "optimizer.ema=0.99",
    ],
    "neural decoder, f32, all kept": [
        "neural/decoding", "model.width=256", "model.layers=6", "model.heads=8", "train.batch=256",
        "memory.save=all", "memory.accumulation=1",
    ],
}  # fmt: skip
BAR_SHARE, BAR_BYTES = 0.05, 80e6


def measure(name: str, steps: int) -> dict[str, float]:
    """Compiled and measured bytes of one config, in this process."""
    from aurora_train.config import load
    from aurora_train.machine.profile import prepare_environment

    config = load(CONFIGS[name][0], CONFIGS[name][1:])
    prepare_environment(config)
    import jax
    import numpy as np

    from aurora_train import files
    from aurora_train.plan.plan import make_plan
    from aurora_train.plan.verify import compiled_bytes
    from aurora_train.train.rehearsal import rehearse
    from aurora_train.train.state import together

    recipe = config.recipe_class(config, files.cache_folder())
    rehearsal = rehearse(config, recipe)
    plan = make_plan(config, rehearsal.model(), platform="cpu", num_devices=1)
    blueprint = rehearsal.blueprint(plan)
    initialise = blueprint.initialise.lower().compile()
    program = rehearsal.compile(plan)
    step = together(program)
    batch = {
        key: (np.ones if key == "weights" else np.zeros)(leaf.shape, leaf.dtype)
        for key, leaf in rehearsal.batch(config.train.batch).items()
    }
    trim()
    before = held("RssAnon")
    state = jax.block_until_ready(initialise())
    trim()  # what only the initialiser used is not the step's
    resident = held("RssAnon") - before
    peaks = []
    for _ in range(steps):
        forget_peak()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        peaks.append(held("VmHWM") - held("RssFile") - held("RssShmem") - before)
    untrimmed = held("RssAnon") - before
    trim()
    account = compiled_bytes(program)
    return asdict(account) | {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(blueprint.state.params)),
        "compiled": account.peak, "measured": max(peaks), "first": peaks[0], "state": resident,
        "after": untrimmed, "after_trimming": held("RssAnon") - before, "baseline": before,
        "loss": float(metrics["loss"]),
    }  # fmt: skip


def held(field: str) -> int:
    """Bytes of one line of /proc/self/status."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def forget_peak() -> None:
    """Set VmHWM back to what is resident now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def trim() -> None:
    """Have glibc give free memory back, so that it is not taken for memory in use."""
    ctypes.CDLL(None).malloc_trim(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print every figure, one JSON line per config")
    asked = parser.parse_args()
    if asked.here:
        from aurora_train.machine.hugepages import restart_with_huge_pages

        restart_with_huge_pages()  # as `aurora train` does
        print(json.dumps(measure(asked.names[0], asked.steps)))
        return 0
    print("| config | parameters | compiled MB | measured MB | difference | over the bar |\n|---|---|---|---|---|---|")
    over = 0
    for name in asked.names or CONFIGS:
        found = in_a_process(name, asked.steps)
        apart = found["measured"] - found["compiled"]
        allowed = BAR_SHARE * found["compiled"] + BAR_BYTES
        over += abs(apart) > allowed
        print(
            f"| {name} | {found['parameters'] / 1e6:.1f} M | {found['compiled'] / 1e6:.0f} "
            f"| {found['measured'] / 1e6:.0f} | {apart / 1e6:+.0f} MB, {apart / found['compiled']:+.1%} "
            f"| {'yes' if abs(apart) > allowed else 'no'} |",
            flush=True,
        )
        if asked.json:
            print(json.dumps(found))
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    return int(over > 0)


def in_a_process(name: str, steps: int) -> dict:
    """`measure` in a fresh process, on one CPU device, from a folder where nothing lies."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, str(Path(__file__).absolute()), name, "--here", "--steps", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, cwd=folder, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
