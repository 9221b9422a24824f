"""Start to first step: `aurora train` against a bare script with the same imports and the same cached step.

    python benchmarks/startup.py [CONFIG] [KEY=VALUE ...] [--repeats 5]

Both are whole processes, interleaved, with a warm compile cache and prepared data. Time is from launch to the moment
the loss of step 1 is on the host (bare) or in metrics.jsonl (aurora). Prints the ratio of the medians and the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import sys
from pathlib import Path
from aurora_train.config import load
config = load(sys.argv[1], sys.argv[2:])
from aurora_train.machine.profile import prepare_environment
prepare_environment(config)
import datasets, flax, grain, jax, optax
from flax import nnx
from orbax.checkpoint import v1
from aurora_train import mesh, optimizer
from aurora_train.data.batches import read_batch
from aurora_train.files import cache_folder
from aurora_train.memory.plan import make_plan
from aurora_train.random import stream
from aurora_train.train.session import make_recipe
from aurora_train.train.state import draw
from aurora_train.train.step import make_step
recipe = make_recipe(config)
recipe.prepare(lambda *_: None)
devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
model = nnx.eval_shape(lambda: recipe.model(nnx.Rngs(params=stream(config.train.seed, "init"))))
plan = make_plan(config, model, platform="cpu", num_devices=1)
tx = optimizer.build(config.optimizer, config.train.steps)
blueprint = draw(recipe, plan, tx, devices, seed=config.train.seed, ema=config.optimizer.ema is not None)
step = make_step(recipe, blueprint, tx, seed=0, accumulation=plan.accumulation, ema=config.optimizer.ema)
batch = read_batch(recipe.data("train"), config.train.seed, config.train.batch, 0)
jitted = jax.jit(step, donate_argnums=0, in_shardings=(blueprint.shardings, mesh.batch_sharding(devices)),
                 out_shardings=(blueprint.shardings, mesh.replicated(devices)))
compiled = jitted.lower(blueprint.state, batch).compile()
state, metrics = compiled(blueprint.initialise(), batch)
print(float(metrics["loss"]), flush=True)
"""


def bare(config: list[str]) -> float:
    """Seconds until the bare script printed the loss of its step."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", BARE, *config], stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    assert line and process.returncode == 0, "the bare script failed"
    return seconds


def trained(config: list[str], folder: Path) -> float:
    """Seconds until metrics.jsonl of a fresh run holds its first record; the run is then ended."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "aurora_train.cli.main", "train", *config, "--run", str(folder), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, "aurora train failed"
        time.sleep(0.002)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", default=["quickstart"])
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    ours, rival = [], []
    with tempfile.TemporaryDirectory() as folder:
        bare(asked.config), trained(asked.config, Path(folder) / "warm")  # fills the caches
        for number in range(asked.repeats):
            rival.append(bare(asked.config))
            ours.append(trained(asked.config, Path(folder) / str(number)))
    mine, theirs = statistics.median(ours), statistics.median(rival)
    print(f"| start to first step, warm cache | seconds (median of {asked.repeats}) |")
    print("|---|---|")
    print(f"| aurora train {' '.join(asked.config)} | {mine:.2f} |")
    print(f"| bare script, same step | {theirs:.2f} |")
    print(f"| ratio | {mine / theirs:.2f} |")
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
