"""Takes the first steps of a config as the trainer takes them, under a plan and on a mesh of one's choice.

As a script it prints the losses of several such calls: `python stepping.py CONFIG STEPS '[["model.from=a"], ...]'`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Steps(NamedTuple):
    """`losses`: of each step. `before`, `after`: parameters by canonical name, frozen ones included."""

    losses: list[float]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


def take(config: str | Path, overrides: list[str], steps: int, cut=None) -> Steps:
    """The first steps of a config. `cut`: from the number of units of the stack to its segments; None takes the plan
    that the trainer would take."""
    import jax

    from aurora_train import mesh as meshes
    from aurora_train.config import load
    from aurora_train.data.batches import read_batch
    from aurora_train.run import Run
    from aurora_train.train.session import open_session

    loaded = load(config, overrides)
    session = open_session(loaded, Run(Path("not-a-run")), lambda *_: None)
    if cut is not None:
        ((name, segments),) = session.plan.stacks.items()
        session.plan = dataclasses.replace(session.plan, stacks={name: cut(segments[-1].stop)})
    step, _ = session.compile(fresh=True)
    state, placed = jax.block_until_ready(session.fresh()), meshes.batch_sharding(session.mesh)
    before, losses = _parameters(state), []
    for number in range(steps):
        batch = read_batch(session.source, loaded.train.seed, loaded.train.batch, number)
        # Every device ends a step before any begins the next: two steps' collectives may wait for each other's threads.
        state, metrics = jax.block_until_ready(step(state, jax.device_put(batch, placed)))
        losses.append(float(metrics["loss"]))
    session.store.close()
    return Steps(losses, before, _parameters(state))


def _parameters(state) -> dict[str, np.ndarray]:
    from aurora_train.checkpoint import layout

    found = {}
    for part in (state.params, state.frozen):
        found |= layout.snapshot(part)
    return found


if __name__ == "__main__":
    print(json.dumps([take(sys.argv[1], each, int(sys.argv[2])).losses for each in json.loads(sys.argv[3])]))
