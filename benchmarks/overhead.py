"""What accounting for energy costs a step on the host, and how much of a core the meter's thread takes.

    python benchmarks/overhead.py [--steps 20000] [--plug FILE]

The calls are those of the loop (`train/loop.py`): at every step `step`, `asked` and `rest_seconds`, with a budget and
hours set; at every tenth `measure`, as by default. Their processor time is
taken beside that of an empty loop, in turns. The meters are those
of this machine; without any, a file stands in for a wall plug, because the loop does not know which meter it has.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

from aurora_train.config.energy import Energy as Setting
from aurora_train.energy.account import Energy
from aurora_train.energy.meter import in_words
from aurora_train.machine.profile import cpu_model
from aurora_train.run import Run

ROUNDS, LOG_EVERY = 7, 10


def seconds_a_step(energy: Energy | None, steps: int) -> float:
    """Of the loop's calls, or of the bare loop."""
    began = time.thread_time()
    for step in range(steps):
        if energy is None:
            continue
        energy.step(4096.0, None, step)
        if step % LOG_EVERY == 0:
            energy.measure(1e6)
        if energy.asked() or energy.rest_seconds():
            raise SystemExit("the benchmark's budget is spent")
    return (time.thread_time() - began) / steps


def thread_share(energy: Energy, seconds: float = 3.0) -> float:
    """Processor time of everything but this thread, a second."""
    began, own = time.process_time(), time.thread_time()
    time.sleep(seconds)
    return (time.process_time() - began - (time.thread_time() - own)) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--plug", help="a file with watts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plug = Path(options.plug or Path(folder) / "plug")
        if not options.plug:
            plug.write_text("100.0\n")
        setting = Setting(budget_kwh=1e9, hours="00:00-23:59", plug=str(plug), price_per_kwh=0.3, region="DEU")
        with Energy(setting, Run(folder)) as energy:
            pairs = [[seconds_a_step(one, options.steps) for one in (None, energy)] for _ in range(ROUNDS)]
            costs = sorted(1e6 * (accounted - bare) for bare, accounted in pairs)
            print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores; {in_words(energy._meter.sources)}")
            print(f"the calls of a step: {statistics.median(costs):.1f} us ({costs[0]:.1f} to {costs[-1]:.1f})")
            print(f"the meter's thread: {1e3 * thread_share(energy):.2f} ms of processor time a second")


if __name__ == "__main__":
    main()
