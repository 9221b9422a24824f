"""What a save and a resume cost, beside Orbax alone, `torch.save` and torch's DCP, in one run.

    python benchmarks/checkpoint.py                      # 100M parameters, AdamW: a state of 1.2 GB
    python benchmarks/checkpoint.py --width 256 --layers 4 --repeats 3 --json checkpoint.json

Blocked: how long training stands still for a save. Whole: until it counts as saved (for us that is fsync'd, hashed and
listed; Orbax syncs no metadata and checks no data). The steps are the real compiled ones, timed with no save running
and with one in the background. Repeats are interleaved; medians. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from planning import load_tree

from aurora_train.data.batches import read_batch
from aurora_train.machine.profile import cpu_model
from aurora_train.run import Run
from aurora_train.train.session import open_session


def timed(work):
    """(seconds, result)."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def tree_of(width: int, layers: int, vocabulary: int, text: Path) -> dict:
    """A language model, its data a small text file."""
    return {
        "recipe": "language_model",
        "model": {"width": width, "layers": layers, "heads": max(width // 64, 1), "tied": False},
        "data": {"source": str(text), "tokenizer": {"kind": "bpe", "vocab": vocabulary}, "sequence": 64,
                 "holdout_test": 0.1, "holdout_validation": 0.1},
        "train": {"steps": 1000, "batch": 4},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "checkpoint": {"every": 100},
    }  # fmt: skip


class Steps:
    """The compiled step on one batch."""

    def __init__(self, session):
        self.compiled, self.state = session.compile()[0], session.fresh()
        config = session.config
        self.batch = read_batch(session.source, config.train.seed, config.train.batch, 0)

    def run(self, number: int) -> float:
        """Seconds of one step, the median of several."""
        taken = []
        for _ in range(number):
            seconds, metrics = timed(self._one)
            taken.append(seconds)
        return statistics.median(taken)

    def _one(self):
        self.state, metrics = self.compiled(self.state, self.batch)
        return jax.block_until_ready(metrics)


def ours(session, steps: Steps, step: int) -> dict:
    """Blocked, whole, and the step time while the save goes on."""
    store = session.store
    blocked, _ = timed(lambda: store.save(step, steps.state, {"data_step": step}))
    began = time.perf_counter()
    beside = []
    while store._pending is not None and not store._pending.done():
        beside.append(steps.run(1))
    store.wait()
    whole = blocked + time.perf_counter() - began
    return {"blocked": blocked, "whole": whole, "step beside": statistics.median(beside) if beside else None}


def orbax_alone(steps: Steps, folder: Path) -> dict:
    """Orbax as its documentation has it, and its defaults."""
    from orbax.checkpoint import v1 as ocp

    arrays = {f"leaf{i}": leaf for i, leaf in enumerate(jax.tree.leaves(steps.state))}
    with ocp.training.Checkpointer(folder) as checkpointer:
        blocked, response = timed(lambda: checkpointer.save_async(1, arrays))
        rest, _ = timed(response.result)
    return {"blocked": blocked, "whole": blocked + rest, "step beside": None}


def torch_save(steps: Steps, folder: Path) -> dict | None:
    """`torch.save` of the same arrays as tensors: it blocks for all of it, and syncs nothing."""
    try:
        import torch
    except ImportError:
        return None
    blocked, _ = timed(lambda: torch.save(_tensors(steps), folder / "state.pt"))
    return {"blocked": blocked, "whole": blocked, "step beside": None}


def torch_dcp(steps: Steps, folder: Path) -> dict | None:
    """`torch.distributed.checkpoint.async_save`: it blocks for the copy, and writes in a thread."""
    try:
        from torch import distributed
        from torch.distributed import checkpoint
    except ImportError:
        return None
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    named = {f"leaf{i}": tensor for i, tensor in enumerate(_tensors(steps))}
    blocked, future = timed(lambda: checkpoint.async_save(named, checkpoint_id=folder / "state"))
    rest, _ = timed(future.result)
    return {"blocked": blocked, "whole": blocked + rest, "step beside": None}


def _tensors(steps: Steps) -> list:
    """The state as torch has it; no copy, on a CPU."""
    import numpy as np
    import torch

    return [torch.from_numpy(np.asarray(leaf)) for leaf in jax.tree.leaves(steps.state)]


PEERS = {"Orbax alone": orbax_alone, "torch.save": torch_save, "torch DCP, async": torch_dcp}


def resumed(session, step: int) -> dict:
    """Verification, restoring and reading the same files once, warm in the page cache."""
    files = [p for p in (session.store.folder / str(step)).rglob("*") if p.is_file()]

    def read():
        for path in files:
            with open(path, "rb") as handle:
                while handle.read(1 << 22):
                    pass

    reading, _ = timed(read)
    verifying, (found, _) = timed(session.store.newest_intact)
    assert found == step
    restoring, state = timed(lambda: jax.block_until_ready(session.restore(step)))
    fresh, again = timed(lambda: jax.block_until_ready(session.fresh()))
    for leaf in jax.tree.leaves((state, again)):
        if not leaf.is_deleted():
            leaf.delete()
    return {"reading": reading, "verifying": verifying, "restoring": restoring, "fresh state": fresh}


def medians(rows: list[dict]) -> dict:
    """Key by key, over what was measured."""
    return {
        key: statistics.median([row[key] for row in rows if row[key] is not None] or [float("nan")]) for key in rows[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as here:
        here = Path(here).absolute()
        text = here / "text"
        text.mkdir()
        for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]:
            shutil.copy(path, text)
        session = open_session(
            load_tree(tree_of(options.width, options.layers, options.vocabulary, text)), Run(here / "run"),
            lambda *_: None,
        )  # fmt: skip
        session.store.sweep()
        steps = Steps(session)
        steps.run(2)
        alone, rows, resumes = [], {"aurora_train": [], **{name: [] for name in PEERS}}, []
        for turn in range(1, options.repeats + 1):
            alone.append(steps.run(5))
            rows["aurora_train"].append(ours(session, steps, turn))
            for name, peer in PEERS.items():
                folder = here / f"peer{turn}"
                folder.mkdir()
                rows[name].append(peer(steps, folder))
                shutil.rmtree(folder)
            resumes.append(resumed(session, turn))
            shutil.rmtree(session.store.folder / str(turn))
            session.store.ledger.strike([turn])
        session.store.close()
        report(options, steps, statistics.median(alone), {k: v for k, v in rows.items() if v[0]}, medians(resumes))


def report(options, steps, alone: float, rows: dict, resume: dict) -> None:
    """Print the tables, and write them down where asked."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(steps.state))
    count = sum(leaf.size for leaf in jax.tree.leaves(steps.state.params))
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax "
          f"{jax.__version__}; {count / 1e6:.0f}M parameters, state {size / 1e9:.2f} GB, step {alone:.2f} s, "
          f"medians of {options.repeats}\n")  # fmt: skip
    print("| | blocked | share of 100 steps | until it counts | a step beside it |\n|---|---|---|---|---|")
    found = {name: medians(measured) for name, measured in rows.items()}
    for name, row in found.items():
        beside = f"{row['step beside'] / alone:.2f} of one alone" if row["step beside"] == row["step beside"] else ""
        share = row["blocked"] / (100 * alone)
        print(f"| {name} | {row['blocked']:.2f} s | {share:.2%} | {row['whole']:.2f} s | {beside} |")
    print(f"\nresume: verifying {resume['verifying']:.2f} s (reading the files once {resume['reading']:.2f} s), "
          f"restoring {resume['restoring']:.2f} s; drawing a fresh state {resume['fresh state']:.2f} s")
    if options.json:
        Path(options.json).write_text(json.dumps({"step": alone, "saves": found, "resume": resume}, indent=1))


if __name__ == "__main__":
    main()
