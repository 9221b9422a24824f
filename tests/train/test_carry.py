"""A `predict` that draws and remembers: keys and carry go in with the batch and come out with the result."""

import json

import pytest
from kit import Aurora

POLICY = '''
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aurora_train.config import Section
from aurora_train.recipe import Loss, Recipe


class Rows:
    fingerprint = "policy".ljust(64, "0")

    def __len__(self):
        return 64

    def take(self, indices):
        return {"seen": np.stack([np.sin(indices), np.cos(indices)], -1).astype(np.float32)}

    def describe(self):
        return {"source": "circles"}


class Policy(Recipe):
    Config = Section

    def data(self, split):
        return Rows()

    def model(self, rngs):
        return nnx.Linear(2, 1, rngs=rngs)

    def loss(self, model, batch, key):
        return Loss(jnp.square(model(batch["seen"])).sum(), jnp.float32(len(batch["seen"])))

    def predict(self, model, batch):
        carry = batch.get("carry") or {"total": jnp.zeros_like(batch["seen"])}
        carry = {"total": carry["total"] + batch["seen"]}
        action = model(carry["total"])[:, 0]
        if "key" in batch:
            action = action + jax.vmap(jax.random.normal)(batch["key"])
        return {"action": action, "carry": carry}

    def score(self, predict, split, key, workdir, progress):
        seen, carry, errors = self.data(split).take(np.arange(18))["seen"].reshape(3, 6, 2), {}, []
        for now, keys in zip(seen, jax.random.split(key, (3, 6))):
            calm = predict({"seen": now, **carry})
            drawn = predict({"seen": now, "key": keys, **carry})
            errors.append(drawn["action"] - calm["action"] - np.stack([jax.random.normal(one) for one in keys]))
            carry = {"carry": drawn["carry"]}
        off = carry["carry"]["total"] - seen.sum(0)
        return {"drawn": float(np.abs(errors).max()), "remembered": float(np.abs(off).max())}
'''
CONFIG = "recipe: policy.py\ntrain: {steps: 2, batch: 8}\noptimizer: {lr: 1e-2}\n"


@pytest.fixture
def policy(tmp_path, shared_cache) -> Aurora:
    """A folder with the recipe and its config."""
    (tmp_path / "policy.py").write_text(POLICY)
    (tmp_path / "policy.yaml").write_text(CONFIG)
    return Aurora(tmp_path, shared_cache)


def assert_drawn_and_remembered(aurora: Aurora) -> None:
    score = json.loads((aurora.folder / "run" / "scores.json").read_text())["score"]
    assert score["drawn"] < 1e-6 and score["remembered"] < 1e-6


@pytest.mark.parametrize("devices", [1, 4])  # of which 4 do not divide the six examples of a call
def test_a_score_gives_keys_and_carries_to_predict(policy, devices):
    policy.good("train", "policy.yaml", "--run", "run", devices=devices)
    assert_drawn_and_remembered(policy)


@pytest.mark.slow
def test_so_does_the_score_of_several_processes(policy):
    team = policy.team(2, "train", "policy.yaml", "--run", "run", devices=2)
    said = [process.communicate(timeout=300)[1] for process in team]
    assert [process.returncode for process in team] == [0, 0], said
    assert_drawn_and_remembered(policy)
