"""Loss and bytes of stored moments and masters: every format against float32, same data, same seeds, same steps.

    python benchmarks/moments.py [CONFIG] [KEY=VALUE ...] [--steps 300] [--seeds 3] [--optimizer adamw] [--lr 3e-3]

Trains the config (quickstart: the standard library's text) once for each format and seed, and prints the mean loss of
the last tenth of the steps, its ratio to float32 with the same seed, and the bytes a parameter takes between steps.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

VARIANTS = {  # name: (moments, master)
    "float32": ("float32", "float32"),
    "bfloat16 moments": ("bfloat16", "float32"),
    "int8 moments": ("int8", "float32"),
    "bfloat16 master": ("float32", "bfloat16"),
    "bfloat16 moments and master": ("bfloat16", "bfloat16"),
    "int8 moments, bfloat16 master": ("int8", "bfloat16"),
}


def train(config, steps: int) -> tuple[float, float, float]:
    """(mean loss of the last tenth, bytes per parameter of masters and moments, median seconds a step)."""
    import jax
    import numpy as np
    from flax import nnx

    from aurora_train import mesh as meshes
    from aurora_train import optimizer as optimizers
    from aurora_train.data.batches import read_batch
    from aurora_train.machine.precision import settled
    from aurora_train.plan.plan import make_plan
    from aurora_train.train.hooks import features
    from aurora_train.train.rehearsal import make_recipe
    from aurora_train.train.state import draw
    from aurora_train.train.step import make_step

    recipe = make_recipe(settled(config))
    recipe.ready(lambda *_: None)
    mesh, seed = meshes.make_mesh(1, 1), config.train.seed
    model = nnx.eval_shape(lambda: recipe.model(nnx.Rngs(params=0)))
    plan = make_plan(config, model, platform=jax.default_backend(), num_devices=1)
    optimizer = optimizers.build(config.optimizer, steps, seed=seed)
    blueprint = draw(recipe, plan, optimizer, mesh, seed=seed)
    step = make_step(recipe, blueprint, optimizer, features(), seed=seed, accumulation=plan.accumulation)
    state, source, losses, seconds = blueprint.initialise(), recipe.data("train"), [], []
    params = optimizers.stored(state.params, config.optimizer)
    state = state._replace(params=params, opt_state=optimizer.init(params))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    jitted = jax.jit(step, donate_argnums=0)
    for number in range(steps):
        batch = read_batch(source, seed, config.train.batch, number)
        began = time.perf_counter()
        state, metrics = jitted(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - began)
    return float(np.mean(losses[-max(steps // 10, 1) :])), held / count, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", default=["quickstart"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--only", nargs="*", help="formats to run besides float32")
    asked = parser.parse_args()

    from aurora_train.config import load
    from aurora_train.machine.profile import prepare_environment

    name, *overrides = asked.config
    overrides += [f"train.steps={asked.steps}", f"optimizer.name={asked.optimizer}", f"optimizer.lr={asked.lr}"]
    if asked.optimizer != "muon":
        overrides.append("optimizer.adam_lr=null")
    prepare_environment(load(name, overrides))
    print(f"| {asked.optimizer} | loss | ratio to float32, each seed | bytes/parameter | ms/step |")
    print("|---|---|---|---|---|")
    baseline: list[float] = []
    for variant, (moments, master) in VARIANTS.items():
        if asked.only is not None and variant not in ("float32", *asked.only):
            continue
        formats = [f"optimizer.moments={moments}", f"optimizer.master={master}"]
        runs = [
            train(load(name, [*overrides, *formats, f"train.seed={seed}"]), asked.steps) for seed in range(asked.seeds)
        ]
        losses = [loss for loss, _, _ in runs]
        baseline = baseline or losses
        ratios = ", ".join(f"{loss / base:.4f}" for loss, base in zip(losses, baseline, strict=True))
        milliseconds = 1000 * statistics.median(seconds for _, _, seconds in runs)
        figures = f"{statistics.mean(losses):.4f} | {ratios} | {runs[0][1]:.2f} | {milliseconds:.0f}"
        print(f"| {variant} | {figures} |", flush=True)
    print(f"\n{asked.steps} steps; {platform.processor() or platform.machine()}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
