"""The peer of robot_peers.py: LeRobot's ACT under torch, in a process and a Python of its own.

Run as a script with sizes (JSON) and a file of batches, it answers each line of stdin, seconds, with the median seconds
of a training step over as long. A step is what LeRobot's own loop does: forward, backward, clipping, AdamW.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))
from lerobot_act import as_theirs, make_policy  # noqa: E402


def main() -> None:
    import torch

    sizes, compiled = json.loads(sys.argv[1]), sys.argv[3] == "compiled"
    policy = make_policy(sizes)
    policy.train()
    if compiled:
        policy.model = torch.compile(policy.model)
    stored = np.load(sys.argv[2])
    count = len(stored["state"]) // sizes["batch"]
    batches = [as_theirs({name: stored[name][k * sizes["batch"] : (k + 1) * sizes["batch"]] for name in stored.files})
               for k in range(count)]  # fmt: skip
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=1e-4)

    def step(number: int) -> None:
        loss, _ = policy(batches[number % count])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()

    for number in range(3):
        step(number)
    print("ready", flush=True)
    for line in sys.stdin:
        times, end = [], time.perf_counter() + float(line)
        while time.perf_counter() < end or len(times) < 3:
            before = time.perf_counter()
            step(len(times))
            times.append(time.perf_counter() - before)
        print(statistics.median(times), flush=True)


if __name__ == "__main__":
    main()
