"""The peer of robot_peers.py and robot_success.py: LeRobot's ACT under torch, in a process and a Python of its own.

Run as a script with sizes (JSON) and a file of chunks, it answers each line of stdin, seconds, with the median seconds
of a training step over as long; or, with `train STEPS LR OUT`, it trains on chunks that it draws, and writes its
weights. A step is what LeRobot's own loop does: forward, backward, clipping, AdamW.
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

    sizes, how = json.loads(sys.argv[1]), sys.argv[3]
    policy = make_policy(sizes)
    policy.train()
    if how == "compiled":
        policy.model = torch.compile(policy.model)
    stored = dict(np.load(sys.argv[2]))
    rate = float(sys.argv[5]) if how == "train" else 1e-4
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=1e-4)

    def step(batch: dict) -> None:
        loss, _ = policy(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()

    if how == "train":
        draws = np.random.default_rng(0)
        for _ in range(int(sys.argv[4])):
            rows = draws.integers(len(stored["state"]), size=sizes["batch"])
            step(as_theirs({name: array[rows] for name, array in stored.items()}))
        np.savez(sys.argv[6], **{name: p.detach().numpy() for name, p in policy.named_parameters()})
        return
    count = len(stored["state"]) // sizes["batch"]
    batches = [as_theirs({name: array[k * sizes["batch"] : (k + 1) * sizes["batch"]] for name, array in stored.items()})
               for k in range(count)]  # fmt: skip
    for batch in batches[:3]:
        step(batch)
    print("ready", flush=True)
    for line in sys.stdin:
        times, end = [], time.perf_counter() + float(line)
        while time.perf_counter() < end or len(times) < 3:
            before = time.perf_counter()
            step(batches[len(times) % count])
            times.append(time.perf_counter() - before)
        print(statistics.median(times), flush=True)


if __name__ == "__main__":
    main()
