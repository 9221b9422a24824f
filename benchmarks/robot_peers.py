"""Training steps a second of ACT against LeRobot's on torch: the same data and sizes, interleaved in one run.

    python benchmarks/robot_peers.py --python /path/to/venv/bin/python [--case small paper] [--rounds 5] [--json FILE]

`--python` is one that has lerobot (0.4.4), whose pins do not fit beside ours. Ours is a whole `aurora train` of
demonstrations in the world two_modes with every step logged, stopped (SIGSTOP) while torch runs. Theirs is their policy
with the architecture that ours takes too (`tests/parity/test_lerobot_act.py` compares the loss), without dropout on
either side, on batches of the same demonstrations that are ready in memory, and nothing beside the step. float32. A
round's ratio is of its own two neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from sides import Ended, Side, in_turns
from train_step import Ours

from aurora_train.machine.profile import cpu_model

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from robot.scaling import Scaling  # noqa: E402

SOURCE = {"source": "world:two_modes", "episodes": 100, "validation": 0.1}


@dataclass(frozen=True)
class Case:
    """Sizes of one model and batch. `seconds`: how long each side runs in a round."""

    width: int
    heads: int
    mlp: int
    layers: int
    decoder_layers: int
    posterior_layers: int
    chunk: int
    batch: int
    seconds: float

    def config(self, precision: str) -> dict:
        """A whole config of `aurora train`."""
        model = {
            "kind": "act", "width": self.width, "heads": self.heads, "mlp_width": self.mlp, "layers": self.layers,
            "decoder_layers": self.decoder_layers, "posterior_layers": self.posterior_layers, "activation": "relu",
            "norm_place": "sum",
        }  # fmt: skip
        return {
            "recipe": "robot/policy", "model": model, "data": SOURCE | {"chunk": self.chunk},
            "train": {"batch": self.batch, "steps": 10**6, "precision": precision},
            "optimizer": {"name": "adamw", "lr": 1e-4, "weight_decay": 1e-4, "clip": 10.0}, "log": {"every": 1},
            "checkpoint": {"every": 10**6}, "evaluate": {"every": None, "final": False},
        }  # fmt: skip

    def sizes(self) -> dict:
        """The same for `tests/parity/lerobot_act.py`."""
        return {"state": 2, "environment": 2, "actions": 2, "latent": 32, "chunk": self.chunk, "width": self.width,
                "heads": self.heads, "mlp": self.mlp, "layers": self.layers, "decoder_layers": self.decoder_layers,
                "posterior_layers": self.posterior_layers, "batch": self.batch}  # fmt: skip


CASES = {
    "small": Case(128, 4, 512, 2, 2, 2, 16, 64, 4.0),
    "paper": Case(512, 8, 3200, 4, 1, 4, 100, 8, 10.0),  # lerobot's defaults
}


def write_batches(case: Case, file: Path, count: int = 16) -> None:
    """Scaled batches of the demonstrations that our side trains on."""
    from aurora_train.config import load_values
    from aurora_train.train.beginning import Beginning

    beginning = Beginning.of(load_values(case.config("float32"), "case"))
    source = beginning.ready(lambda *_: None)
    scaling = Scaling(beginning.recipe.known)
    batch = source.take(np.random.default_rng(0).permutation(len(source))[: count * case.batch])
    state = np.asarray(scaling.seen(batch)["state"], np.float32)
    np.savez(file, state=state[:, :2], environment=state[:, 2:], padded=batch["padded"],
             action=np.asarray(scaling.scaled(batch["action"]), np.float32))  # fmt: skip


def measure(case: Case, python: str, rounds: int) -> dict:
    """Medians in seconds a step by side, and ratios (theirs over ours: above 1 we are faster) to the faster peer."""
    script, peers, failed = str(Path(__file__).parent / "lerobot_peer.py"), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        batches = Path(folder) / "batches.npz"
        write_batches(case, batches)
        ours = Ours(case, "float32", Path(folder))
        try:
            for kind in ("eager", "compiled"):
                try:
                    peers[kind] = Side(script, json.dumps(case.sizes()), str(batches), kind, python=python,
                                       environment={"PYTHONPATH": ""}, stderr=Path(folder) / kind)  # fmt: skip
                except Ended as end:
                    failed[kind] = end.words
            if not peers:
                raise SystemExit(f"lerobot does not run: {failed}")
            found = in_turns(ours, peers, case.seconds, rounds)
        finally:
            ours.close()
            for peer in peers.values():
                peer.close()
    return found | {"failed": failed}


def row(name: str, found: dict) -> str:
    """One line of the table."""
    told = [f"{1 / found['seconds'][side]:.2f}" if side in found["seconds"] else found["failed"][side][:40]
            for side in ("ours", "eager", "compiled")]  # fmt: skip
    spread = f"{min(found['ratios']):.2f} to {max(found['ratios']):.2f}"
    return f"| {name} | {' | '.join(told)} | **{found['ratio']:.2f}** ({spread}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=os.environ.get("AURORA_LEROBOT_PYTHON"), help="a Python that has lerobot")
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the rows here too")
    options = parser.parse_args()
    if options.python is None:
        parser.error("--python (or AURORA_LEROBOT_PYTHON) has to name a Python that has lerobot")
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores; {options.rounds} rounds; steps a second\n")
    print("| case | ours | lerobot eager | lerobot compiled | ratio to the best |")
    print("|---|---|---|---|---|")
    rows = {}
    for name in options.case:
        rows[name] = measure(CASES[name], options.python, options.rounds)
        print(row(name, rows[name]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
