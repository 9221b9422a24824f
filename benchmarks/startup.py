"""Start to first step: `aurora train` cold and warm, and `aurora resume`, each against what it is to be measured by.

    pip install -e '.[parity]' accelerate
    python benchmarks/startup.py [--against bare trainer compiled fresh] [--repeats 5] [--json FILE]
    python benchmarks/startup.py --against bare --config tinystories train.batch=8

| row | ours | its peer |
|---|---|---|
| bare | a fresh run, every program in the compile cache | a script with the same imports and the same cached step |
| trainer | a fresh run, an empty compile cache | transformers' Trainer on the same GPT-2 and batch, random tokens |
| compiled | the same | the same with torch_compile and an empty cache of its own |
| fresh | `aurora resume` of a run with a checkpoint | a fresh run of the same config; both with a warm cache |

All are whole processes, interleaved, with prepared data. Time is from launch to the moment the loss of the first step
is on the host (bare, Trainer) or in metrics.jsonl (aurora). `fresh` is of a model of 25M parameters, whose checkpoint
has 300 MB, by default; a resume reads it twice, once to verify it and once to load it, and the time of reading its
files once is printed beside.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

from train_step import CASES

from aurora_train.checkpoint import durable
from aurora_train.machine.profile import cpu_model

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
from aurora_train.plan.plan import make_plan
from aurora_train.random import stream
from aurora_train.train.hooks import features_of
from aurora_train.machine.precision import settled
from aurora_train.train.rehearsal import make_recipe
from aurora_train.train.state import draw
from aurora_train.train.step import make_step
config = settled(config)
recipe = make_recipe(config)
recipe.ready(lambda *_: None)
devices = mesh.asked(config.mesh)
model = nnx.eval_shape(lambda: recipe.model(nnx.Rngs(params=stream(config.train.seed, "init"))))
plan = make_plan(config, model, platform="cpu", num_devices=1)
tx = optimizer.build(config.optimizer, config.train.steps)
features = features_of(config)
blueprint = draw(recipe, plan, tx, devices, seed=config.train.seed, features=features)
step = make_step(recipe, blueprint, tx, features, seed=0, accumulation=plan.accumulation)
batch = read_batch(recipe.data("train"), config.train.seed, config.train.batch, 0)
jitted = jax.jit(step, donate_argnums=0, in_shardings=(blueprint.shardings, mesh.batch_sharding(devices)),
                 out_shardings=(blueprint.shardings, mesh.replicated(devices)))
compiled = jitted.lower(blueprint.state, batch).compile()
state, metrics = compiled(blueprint.initialise(), batch)
print(float(metrics["loss"]), flush=True)
"""


TRAINER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from torch_peer import build
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
case = json.loads(sys.argv[2])
shape = (64 * case["batch"], case["sequence"])
tokens = torch.randint(0, case["vocabulary"], shape, generator=torch.Generator().manual_seed(0))
rows = [{"input_ids": row, "labels": row} for row in tokens]
class Told(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        print(logs["loss"], flush=True)
        os._exit(0)
wish = TrainingArguments(output_dir=sys.argv[3], per_device_train_batch_size=case["batch"], max_steps=2,
                         torch_compile=sys.argv[4] == "compiled", logging_steps=1, report_to="none", use_cpu=True,
                         save_strategy="no", disable_tqdm=True)
model = build(case["model"], case["vocabulary"], case["sequence"])
Trainer(model=model, args=wish, train_dataset=rows, callbacks=[Told()]).train()
"""


def answered(*command: str) -> float:
    """Seconds until a script printed the loss of its first step."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", *command], stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    assert line and process.returncode == 0, "the peer failed"
    return seconds


def trained(arguments: list[str], run: Path, **environment: str) -> float:
    """Seconds until metrics.jsonl of an aurora process grows by a record; the process is then killed."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "aurora_train", *arguments, "--quiet"], stdout=subprocess.DEVNULL,
        env=os.environ | environment,
    )
    while not (metrics.exists() and metrics.stat().st_size > before):
        assert process.poll() is None, "aurora failed"
        time.sleep(0.002)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def against_bare(folder: Path, config: list[str]):
    """(ours, theirs): functions of the number of the round."""
    command = [sys.executable, "-m", "aurora_train", "plan", *config, "--no-compile", "--json"]
    plan = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    config = [*config, f"memory.accumulation={plan['accumulation']}"]  # so that both run the same step
    return (
        lambda number: trained(["train", *config, "--run", str(folder / f"warm-{number}")], folder / f"warm-{number}"),
        lambda number: answered(BARE, *config),
    )


def against_trainer(folder: Path, config: list[str], kind: str = "eager"):
    """The same."""
    case = CASES["10m"]
    path = folder / "cold.yaml"
    path.write_text(json.dumps(case.config("float32")))

    def ours(number: int) -> float:
        run, cache = folder / f"cold-{kind}-{number}", folder / f"programs-{kind}-{number}"
        return trained(["train", str(path), "--run", str(run)], run, JAX_COMPILATION_CACHE_DIR=str(cache))

    def theirs(number: int) -> float:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"inductor-{number}")
        work = json.dumps(asdict(case.work("float32", kind)))
        return answered(TRAINER, str(Path(__file__).parent), work, str(folder / "trainer"), kind)

    return ours, theirs


def against_fresh(folder: Path, config: list[str]):
    """The same; a run of two steps is made to resume from, and `seconds_to_read` of its checkpoint is kept."""
    tree = CASES["30m"].config("float32")
    tree["train"] |= {"batch": 1, "steps": 2}
    tree["data"]["sequence"] = tree["model"]["max_length"] = 64
    tree["evaluate"]["final"] = False
    path, saved = folder / "saved.yaml", folder / "saved"
    path.write_text(json.dumps(tree))
    command = [sys.executable, "-m", "aurora_train", "train", str(path), "--run", str(saved), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def resumed(number: int) -> float:
        run = folder / f"resumed-{number}"
        shutil.copytree(saved, run)
        seconds = trained(["resume", str(run), "train.steps=1000"], run)
        shutil.rmtree(run)
        return seconds

    def fresh(number: int) -> float:
        run = folder / f"fresh-{number}"
        return trained(["train", str(path), "train.steps=1000", "--run", str(run)], run)

    return resumed, fresh


def verification(folder: Path) -> list[str]:
    """Lines: what verifying the checkpoint of `against_fresh` takes, beside reading its files once."""
    step = folder / "saved" / "checkpoints" / "2"
    files = [path for path in step.rglob("*") if path.is_file()]

    def read() -> None:
        chunk = bytearray(1 << 19)
        for path in files:
            with open(path, "rb", buffering=0) as handle:
                while handle.readinto(chunk):
                    pass

    def verify() -> None:
        assert durable.faults(step) == []

    lines = [f"\nchecking the {sum(path.stat().st_size for path in files) / 1e6:.0f} MB of a checkpoint:"]
    for where, forget in (("from the disk", True), ("from the page cache", False)):
        times: dict = {verify: [], read: []}
        for _ in range(9):
            for work, taken in times.items():
                for path in files if forget else ():
                    with open(path, "rb") as handle:
                        os.fsync(handle.fileno())  # only clean pages are forgotten
                        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                began = time.perf_counter()
                work()
                taken.append(time.perf_counter() - began)
        mine, bare = (statistics.median(taken) for taken in times.values())
        lines.append(f"{where} {mine * 1e3:.0f} ms, reading them once {bare * 1e3:.0f} ms")
    return lines


KINDS = {
    "bare": (against_bare, "warm `aurora train`", "a bare script, the same cached step", 1.5),
    "trainer": (against_trainer, "cold `aurora train`", "transformers' Trainer", 0.7),
    "compiled": (functools.partial(against_trainer, kind="compiled"), "cold `aurora train`",
                 "transformers' Trainer, torch_compile", 0.7),
    "fresh": (against_fresh, "`aurora resume`", "a fresh `aurora train`, warm", 1.3),
}


def measure(kinds: list[str], config: list[str], repeats: int, folder: Path) -> tuple[list[dict], list[str]]:
    """Rows of medians, and further lines. The first round fills the caches and does not count."""
    rows, further = [], []
    for kind in kinds:
        make, mine, theirs, goal = KINDS[kind]
        ours, peer = make(folder, config)
        times = [(ours(number), peer(number)) for number in range(repeats + 1)][1:]
        ratios = sorted(one / other for one, other in times)
        ours_s, peer_s = (statistics.median(side) for side in zip(*times, strict=True))
        rows.append({
            "kind": kind, "ours": mine, "peer": theirs, "ours_s": ours_s, "peer_s": peer_s, "goal": goal,
            "ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1],
        })  # fmt: skip
        if kind == "fresh":
            further += verification(folder)
    return rows, further


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--config", nargs="+", default=["quickstart"], help="for `bare`: CONFIG [KEY=VALUE ...]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, further = measure(asked.against, asked.config, asked.repeats, Path(folder))
    print(f"| to the first step | seconds | against | seconds | ratio, median of {asked.repeats} | at most |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['ours']} | {row['ours_s']:.2f} | {row['peer']} | {row['peer_s']:.2f} | {row['ratio']:.2f} "
              f"({row['least']:.2f} to {row['most']:.2f}) | {row['goal']} |")  # fmt: skip
    print("\n".join(further))
    print(f"\n{cpu_model()}, {os.cpu_count()} cores, Python {platform.python_version()}, {date.today()}")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
