"""`aurora train`'s loop against its own compiled step in a bare Python loop; interleaved in one run.

    python benchmarks/loop.py [--case 0.8m 10m] [--rounds 5]

The loop reads data, logs every step, shows progress and watches for hangs. The bare side calls the same compiled
step on one batch that is there already and waits for nothing but the last number. A ratio of 1 is a loop for free.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import closing
from datetime import date
from pathlib import Path

from sides import Side
from train_step import CASES, Ours

from aurora_train.machine.hugepages import restart_with_huge_pages
from aurora_train.machine.profile import cpu_model


def ready(file: str, folder: str):
    """(compiled step, state, batch on the device) of a config, as `aurora train` would have them."""
    from aurora_train.config import load
    from aurora_train.machine.profile import prepare_environment

    config = load(file, [])
    prepare_environment(config)
    import jax

    from aurora_train.data.batches import read_batch
    from aurora_train.record.progress import silent
    from aurora_train.run import Run
    from aurora_train.train.session import open_session

    session = open_session(config, Run(Path(folder)), silent)
    step, _ = session.compile()
    batch = jax.device_put(read_batch(session.source, config.train.seed, config.train.batch, 0))
    return step, session.fresh(), batch


def bare(file: str, folder: str) -> None:
    """Answers each line of stdin, seconds, with the mean seconds of a step over as long."""
    restart_with_huge_pages()  # as `aurora train` does
    step, state, batch = ready(file, folder)
    import jax

    for _ in range(3):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    print("ready", flush=True)
    for line in sys.stdin:
        began, count = time.perf_counter(), 0
        while count < 3 or time.perf_counter() - began < float(line):
            before, (state, metrics) = metrics, step(state, batch)
            jax.block_until_ready(before)
            count += 1
        jax.block_until_ready(metrics)
        print((time.perf_counter() - began) / count, flush=True)


def bare_side(folder: Path) -> Side:
    """The bare side, in a process of its own, for the config that `Ours` wrote into `folder`."""
    return Side(__file__, "--bare", str(folder / "case.yaml"), str(folder / "bare"))


def measure(name: str, rounds: int) -> str:
    """One line of the table."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        with closing(Ours(case, "float32", Path(folder))) as ours, closing(bare_side(Path(folder))) as plain:
            pairs = [(plain.run(case.seconds), ours.run(case.seconds)) for _ in range(rounds)]
    ratios = [alone / looped for alone, looped in pairs]
    medians = [f"{1e3 * statistics.median(side):.2f} ms" for side in zip(*pairs, strict=True)]
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return f"| {name} | {medians[0]} | {medians[1]} | **{statistics.median(ratios):.3f}** ({spread}) |"


def main() -> None:
    if sys.argv[1:2] == ["--bare"]:
        return bare(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=CASES, default=["0.8m", "10m"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores, float32, {options.rounds} rounds\n")
    print("| case | bare step | aurora train | bare over ours |\n|---|---|---|---|")
    for name in options.case:
        print(measure(name, options.rounds), flush=True)


if __name__ == "__main__":
    main()
