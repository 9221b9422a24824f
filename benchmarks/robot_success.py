"""Success of ACT at Meta-World's pick-place-v3, trained by `aurora train` and by LeRobot on torch: the same
demonstrations, sizes, batch, steps and optimizer (AdamW at a constant rate), 50 episodes on the same goals.

    python benchmarks/robot_success.py --python /path/to/venv/bin/python [--steps 1500]

`--python` is one that has lerobot (0.4.4). What LeRobot trained is carried over into our model, which says the same
with the same weights (`tests/parity/test_lerobot_act.py`), so that both act in one simulation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

from aurora_train.machine.profile import cpu_model

TOP = Path(__file__).parents[1]
sys.path[:0] = [str(TOP / "recipes"), str(TOP / "tests" / "parity")]
RATE = 1e-3
OVERRIDES = ["model.activation=relu", "model.norm_place=sum", "model.vision.shift=0", f"optimizer.lr={RATE}",
             "optimizer.ema=null", "optimizer.clip=10.0", "optimizer.schedule.name=constant",
             "optimizer.schedule.warmup=0", "evaluate.baselines=false", "evaluate.every=null",
             "score.gifs=0"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=os.environ.get("AURORA_LEROBOT_PYTHON"), help="a Python that has lerobot")
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    if options.python is None:
        parser.error("--python (or AURORA_LEROBOT_PYTHON) has to name a Python that has lerobot")
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores; pick-place-v3, {options.steps} steps\n")
    with tempfile.TemporaryDirectory() as folder:
        run, before = Path(folder) / "run", time.perf_counter()
        train = ["train", "robot/pick_place_act", *OVERRIDES, f"train.steps={options.steps}", "--run", str(run)]
        subprocess.run([sys.executable, "-m", "aurora_train", *train, "--quiet"], check=True)
        print(shown("ours", json.loads((run / "scores.json").read_text())["score"], time.perf_counter() - before))
        before = time.perf_counter()
        print(shown("lerobot", theirs(run, options.python, options.steps, Path(folder)), time.perf_counter() - before))


def shown(name: str, score: dict, seconds: float) -> str:
    """One line."""
    return (f"{name}: {score['success']:.0%} of {score['episodes']} episodes (Wilson {score['success_low']:.2f} to "
            f"{score['success_high']:.2f}); {seconds:.0f} s with the rollouts")  # fmt: skip


def theirs(run: Path, python: str, steps: int, folder: Path) -> dict:
    """The score of what LeRobot trains on the training chunks of a run of ours, by our model with its weights."""
    import jax
    from flax import nnx
    from test_lerobot_act import as_ours

    from aurora_train.checkpoint import layout
    from aurora_train.loading import load
    from robot.scaling import Scaling

    recipe = load(run).recipe
    source, scaling, sizes = recipe.data("train"), Scaling(recipe.known), recipe.config.model
    chunks = source.take(np.arange(len(source)))
    seen, first = np.asarray(scaling.seen(chunks)["state"], np.float32), recipe.known["shapes"]["observation.state"][0]
    np.savez(folder / "chunks.npz", state=seen[:, :first], environment=seen[:, first:], padded=chunks["padded"],
             action=np.asarray(scaling.scaled(chunks["action"]), np.float32))  # fmt: skip
    told = {"state": first, "environment": seen.shape[1] - first, "actions": chunks["action"].shape[2],
            "latent": sizes.latent, "chunk": recipe.config.data.chunk, "width": sizes.width, "heads": sizes.heads,
            "mlp": sizes.mlp_width, "layers": sizes.layers, "decoder_layers": sizes.decoder_layers,
            "posterior_layers": sizes.posterior_layers, "batch": recipe.config.train.batch}  # fmt: skip
    subprocess.run(
        [python, str(TOP / "benchmarks" / "lerobot_peer.py"), json.dumps(told), str(folder / "chunks.npz"), "train",
         str(steps), str(RATE), str(folder / "weights.npz")],
        check=True, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    found = np.load(folder / "weights.npz")
    weights = as_ours({name.removeprefix("model."): found[name] for name in found.files})
    graph, state = nnx.split(recipe.model(nnx.Rngs(0)))
    drawn = nnx.to_pure_dict(state)
    assert layout.snapshot(drawn).keys() == weights.keys()
    nnx.replace_by_pure_dict(state, layout.assemble(weights, drawn, jax.tree.map(lambda leaf: leaf.sharding, drawn)))
    act = jax.jit(lambda batch: recipe.predict(nnx.merge(graph, state), batch))
    key = jax.random.key(0)
    return recipe.score(lambda batch: jax.device_get(act(batch)), "test", key, folder, lambda *_: None)


if __name__ == "__main__":
    main()
