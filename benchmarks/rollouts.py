"""Rollouts of whole scenes a second: many scenes in one program against one scene after the other.

    python benchmarks/rollouts.py [--batch 64] [--rounds 5] [KEY=VALUE ...]

A rollout is 6 s of all agents of a scene together, 12 tokens each, drawn from the model of configs/driving/motion.yaml
with random weights, which take as long as trained ones. Both sides run the same rollouts with the same keys, in turn;
the ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from datetime import date

import jax
import numpy as np
from flax import nnx

from aurora_train import bundled
from aurora_train.config import load
from aurora_train.machine.precision import settled
from aurora_train.machine.profile import cpu_model
from aurora_train.random import stream
from aurora_train.train.rehearsal import make_recipe

sys.path.insert(0, str(bundled.recipes_folder()))  # for the kit, whose modules a recipe has under names of its own


def scenes(recipe, count: int) -> dict[str, np.ndarray]:
    """The arrays of so many generated scenes; of eight maps at most, and then again."""
    from driving.car_following import generate
    from driving.moves import shapes
    from driving.scene_batches import as_arrays, cut_lanes

    data = recipe.config.data
    size = (data.agents, data.pieces, data.lights)
    made = [scene for seed in range(min(count, 8)) for scene in generate(seed, 1)]
    rows = [as_arrays(scene, cut_lanes(scene.lanes, data.piece_m), *size) for scene in made]
    which = np.arange(count) % len(rows)
    return {name: np.stack([rows[row][name] for row in which]) for name in shapes(*size)}


def model_of(recipe, batch: dict):
    """`predict` of a model with random weights, as a function of a batch."""
    from driving.scenes import HISTORY
    from driving.tokens import learn, motions_of

    tokens = recipe.config.model.tokens
    recipe.use({"templates": learn(motions_of(batch["states"], batch["valid"], HISTORY - 1), tokens).tolist()})
    graph, state = nnx.split(recipe.model(nnx.Rngs(params=stream(0, "init"))))
    run = jax.jit(lambda state, batch: recipe.predict(nnx.merge(graph, state), batch))
    return lambda batch: jax.block_until_ready(run(state, batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    recipe = make_recipe(settled(load("driving/motion", options.overrides)))
    batch = scenes(recipe, options.batch)
    predict = model_of(recipe, batch)
    batch |= {"key": jax.random.split(jax.random.key(0), options.batch)}
    singles = [{name: array[row : row + 1] for name, array in batch.items()} for row in range(options.batch)]
    together, apart = predict(batch), [predict(single) for single in singles]  # compiled, and compared
    apart = np.concatenate([out["states"] for out in apart])
    same = np.abs(np.asarray(together["states"]) - apart).max(axis=(1, 2, 3)) < 0.01
    seconds: dict[str, list[float]] = {"batched": [], "one by one": []}
    for _ in range(options.rounds):
        for name, run in (("batched", lambda: predict(batch)), ("one by one", lambda: [predict(s) for s in singles])):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    agents = int(np.asarray(together["present"]).any(-1).sum())
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores; medians of {options.rounds} rounds")
    print(f"{options.batch} scenes with {agents} agents, {int((~same).sum())} of them not the same both ways\n")
    print("| | rollouts/s | agents' moves/s |\n|---|---|---|")
    for name, took in seconds.items():
        median = statistics.median(took)
        print(f"| {name} | {options.batch / median:.1f} | {12 * agents / median:,.0f} |")
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    print(f"\nbatched over one by one: {ratio:.2f}")


if __name__ == "__main__":
    main()
