"""State that is not a parameter, and dropout as the tutorials of nnx write it. Rows H1, H2 and H3."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from kit import events, final_hash, losses, records
from kit import in_process as aurora

import aurora_train

RECIPE = '''"""A small network with BatchNorm, Dropout and a counter."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aurora_train.config import Section, setting
from aurora_train.recipe import Loss, Recipe


class Data(Section):
    bad: int | None = setting(None, help="the row that is not a number")


class Config(Section):
    data: Data = Data()


class Rows:
    def __init__(self, split, bad=None):
        draw = np.random.default_rng(len(split))
        self.x = (draw.standard_normal((64, 4)) * 3 + 5).astype(np.float32)
        self.y = self.x.sum(1)
        if bad is not None:
            self.x[bad] = np.nan
        self.fingerprint, self.taken = f"{len(split)}{bad}".rjust(64, "0"), 0

    def __len__(self):
        return len(self.x)

    def take(self, indices):
        self.taken += 1
        if self.taken == int(os.environ.get("STOP_AT", -1)):
            os.kill(os.getpid(), signal.SIGTERM)
        return {"x": self.x[indices], "y": self.y[indices]}

    def describe(self):
        return {"source": "noise"}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=DROPOUT)
        self.out = nnx.Linear(8, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.out(self.drop(jax.nn.relu(self.hidden(self.norm(x)))))[:, 0]


class Normed(Recipe):
    Config = Config
    couples = "microbatch"

    def data(self, split):
        return Rows(split, self.config.data.bad if split == "train" else None)

    def model(self, rngs):
        return Net(rngs)

    def loss(self, model, batch, key):
        errors = jnp.square(model(batch["x"]) - batch["y"])
        return Loss(errors.sum(), jnp.float32(len(errors)))

    def predict(self, model, batch):
        return model(batch["x"])

    def score(self, predict, split, key, workdir, progress):
        batch = self.data(split).take(np.arange(64))
        return {"mse": float(np.square(predict(batch) - batch["y"]).mean())}
'''
CONFIG = """recipe: normed.py
train: {steps: 24, batch: 16}
optimizer: {lr: 1e-2, weight_decay: 0.0, schedule: {name: constant}}
checkpoint: {every: 6}
evaluate: {every: 12, examples: 64}
"""
BARE = ("evaluate.every=null", "evaluate.final=false", "--quiet")  # where what is claimed is of training alone


@pytest.fixture
def here(tmp_path, shared_cache, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "normed.yaml").write_text(CONFIG)
    (tmp_path / "normed.py").write_text(RECIPE.replace("DROPOUT", "rngs"))
    return tmp_path


def test_H1_statistics_are_carried_saved_restored_to_the_bit_and_used_in_evaluation(here, monkeypatch):
    assert aurora("train", "normed.yaml", "--run", "whole", "--quiet") == 0
    model = aurora_train.load("whole").model
    assert int(model.calls[...]) == 24 and np.all(np.abs(np.asarray(model.norm.mean[...]) - 5) < 1)
    assert np.all(np.asarray(model.norm.var[...]) > 4) and model.norm.use_running_average
    # One example at a time gives what all together give: the statistics of the batch are in no evaluation.
    predict = aurora_train.load("whole").predict
    x = np.linspace(-5, 15, 32, dtype=np.float32).reshape(8, 4)
    alone = np.concatenate([predict({"x": row[None]}) for row in x])
    np.testing.assert_allclose(predict({"x": x}), alone, rtol=1e-5)
    # Told to stop amid the run and gone on with, it is the same run.
    monkeypatch.setenv("STOP_AT", "20")  # of all calls: the rehearsal before the first step makes some of them
    assert aurora("train", "normed.yaml", "--run", "stopped", "--quiet") == 75
    monkeypatch.delenv("STOP_AT")
    assert 0 < events(here / "stopped", "stop")[0]["step"] < 24
    assert aurora("resume", "stopped", "--quiet") == 0
    assert losses(here / "stopped") == losses(here / "whole")
    assert final_hash(here / "stopped") == final_hash(here / "whole")


@pytest.mark.slow
def test_H1_a_run_that_starts_from_another_starts_with_its_statistics(here):
    assert aurora("train", "normed.yaml", "train.steps=6", "--run", "parent", *BARE) == 0
    barely = ("init.from=parent", "optimizer.lr=1e-9", "train.steps=1", "--run", "child", *BARE)
    assert aurora("train", "normed.yaml", *barely) == 0
    parent, child = (aurora_train.load(run).model for run in ("parent", "child"))
    assert int(child.calls[...]) == int(parent.calls[...]) + 1
    assert np.all(np.abs(np.asarray(child.norm.mean[...] - parent.norm.mean[...])) < 1.5)


def test_H1_a_skipped_step_leaves_the_statistics_as_they_were(here):
    assert aurora("train", "normed.yaml", "data.bad=3", "train.steps=8", "--run", "bad", *BARE) == 0
    skipped = sum(record["skipped"] for record in records(here / "bad") if "skipped" in record)
    model = aurora_train.load("bad").model
    assert skipped == 2 and int(model.calls[...]) == 6
    assert np.isfinite(np.asarray(model.norm.mean[...])).all() and np.isfinite(np.asarray(model.norm.var[...])).all()


@pytest.mark.slow
def test_H1_microbatches_are_the_users_alone_and_stay_what_they_were(here, capsys):
    assert aurora("train", "normed.yaml", "memory.accumulation=2", "train.steps=4", "--run", "two", *BARE) == 0
    assert int(aurora_train.load("two").model.calls[...]) == 8
    assert json.loads((here / "two" / "plan.json").read_text())["plan"]["accumulation"] == 2
    assert aurora("resume", "two", "memory.accumulation=1", "train.steps=6", "--quiet") == 2
    assert "memory.accumulation: 2 -> 1" in capsys.readouterr().err
    text = (here / "normed.py").read_text().replace('couples = "microbatch"', 'couples = "global"')
    (here / "normed.py").write_text(text)
    assert aurora("train", "normed.yaml", "memory.accumulation=2", "--run", "three", "--quiet") == 2
    assert "cannot be split into microbatches" in capsys.readouterr().err


@pytest.mark.parametrize("rngs", [
    pytest.param("rngs", id="H2-rngs"), pytest.param("nnx.Rngs(0)", id="H3-own-rngs"),
    pytest.param("None", id="H3-none", marks=pytest.mark.release),
])  # fmt: skip
def test_dropout_as_it_is_written_drops_in_training_alone(rngs, here):
    (here / "normed.py").write_text(RECIPE.replace("DROPOUT", rngs))
    rest = ("train.steps=1", *BARE)
    assert aurora("train", "normed.yaml", *rest, "--run", "run") == 0
    (here / "normed.py").write_text(RECIPE.replace("DROPOUT", rngs).replace("Dropout(0.3", "Dropout(0.0"))
    assert aurora("train", "normed.yaml", *rest, "--run", "without") == 0
    assert losses(here / "run")[0] != losses(here / "without")[0], "it drops"
    trained = aurora_train.load("run")
    assert trained.model.drop.deterministic and trained.model.drop.rngs is None


def test_H2_a_mask_belongs_to_an_example_and_not_to_its_place(here):
    import jax
    from flax import nnx

    from aurora_train.nn import carried
    from aurora_train.recipe import Recipe

    class Drops(Recipe):
        def model(self, rngs):
            return nnx.Dropout(0.5, rngs=rngs)

        def loss(self, model, batch, key):
            return model(batch["x"])

    recipe = Drops(None, here)
    keys, x = jax.random.split(jax.random.key(0), 8), np.ones((8, 50), np.float32)

    def masked(chosen):
        return np.asarray(carried.training_loss(recipe, carried.build(recipe, 0), {"x": x[chosen]}, keys[chosen]))

    whole = masked(np.arange(8))
    assert set(np.unique(whole)) == {0.0, 2.0} and 0.35 < (whole == 0).mean() < 0.65
    np.testing.assert_array_equal(masked(np.array([5, 2])), whole[[5, 2]])
    assert len({row.tobytes() for row in whole}) == 8


def test_H3_dropout_of_nnx_in_a_scanned_stack_is_refused(here):
    from flax import nnx

    from aurora_train.errors import UserError
    from aurora_train.nn import carried
    from aurora_train.nn.stack import Stack
    from aurora_train.recipe import Recipe

    class Unit(nnx.Module):
        def __init__(self, rngs):
            self.drop = nnx.Dropout(0.5)

    class Deep(Recipe):
        def model(self, rngs):
            return Stack(Unit, 2, rngs)

    with pytest.raises(UserError, match="units of a Stack hold a dropout of nnx"):
        carried.build(Deep(None, here), 0)


@pytest.mark.parametrize(
    "old,new,said",
    [
        ("self.drop(jax.nn.relu(self.hidden(self.norm(x))))", "self.drop(self.hidden(self.norm(x)).T).T",
         "`drop` is given an array of shape [8, 16]"),
        ("self.calls[...] += 1", "self.calls = nnx.Variable(self.calls[...] + 0.5)", "was int32[] and is float32[]"),
        ("self.calls[...] += 1", "self.more = nnx.Variable(jnp.ones(3))", "`more` was not there before"),
        ("nnx.Dropout(0.3,", "nnx.Dropout(0.3, broadcast_dims=(0,),", "shares its mask along axis 0"),
        ("nnx.Variable(jnp.zeros((), jnp.int32))", "nnx.Rngs(3)", "random state"),
    ],
    ids=["H3-leading-axis", "H3-dtype", "H3-new-variable", "H3-shared-mask", "H3-rngs-kept"],
)
def test_what_cannot_be_carried_is_refused_before_the_first_step_by_its_path(old, new, said, here, capsys):
    text = RECIPE.replace("DROPOUT", "rngs").replace(old, new, 1)
    if "Rngs(3)" in new:
        text = text.replace("        self.calls[...] += 1\n", "")
    (here / "normed.py").write_text(text)
    assert aurora("train", "normed.yaml", "--run", "run", "--quiet") == 2
    err = capsys.readouterr().err
    assert said in err and "model." in err and not os.path.exists("run"), err
