"""A user's own recipe that is small enough to train in a second: rows of noise through a stack to a smooth function.

It has what the trainer has to get right: a stack with tags, dropout, biases and norms, targets that do not count, and
on request one example whose loss is not a number. `TOY_SIGNAL=take:13:SIGTERM` sends its own process a real signal
when the batch of that data step is read, `TOY_SIGNAL=prepare:0:SIGINT` while it prepares, `score:0:SIGKILL` in its
score, `take:13:HANG` never returns from reading it and `take:13:DIE` ends the thread that reads; `TOY_HANG=step` and
`TOY_HANG=save` hang there.
"""

from __future__ import annotations

from pathlib import Path

RECIPE = '''"""Noise to a smooth function of it."""
import os
import signal
import time

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.recipe import Loss
from aurora_train.recipe import Recipe as Base


class Model(Section):
    width: int = setting(16, ge=1, help="residual stream")
    layers: int = setting(3, ge=1, help="units")
    dropout: float = setting(0.1, ge=0, lt=1, help="rate")


class Data(Section):
    rows: int = setting(50, ge=0, help="training rows")
    bad: int | None = setting(None, help="the row whose target is not a number")
    loud: int | None = setting(None, help="the row whose target is a thousand times too large")


class Config(Section):
    model: Model = Model()
    data: Data = Data()


def told(place, number):
    at, _, rest = os.environ.get("TOY_SIGNAL", "").partition(":")
    when, _, name = rest.partition(":")
    if at == place and int(when) == number:
        if name == "HANG":
            time.sleep(3600)
        if name == "DIE":
            raise SystemExit
        os.kill(os.getpid(), getattr(signal, name))


def hang_in_a_save():
    """From its second call on, what makes a save durable waits for a disk that never answers."""
    from aurora_train.checkpoint import durable

    real, calls = durable.seal, []

    def seal(*arguments):
        calls.append(arguments)
        return real(*arguments) if len(calls) < 2 else time.sleep(3600)

    durable.seal = seal


def hang_in_a_step(x):
    """The device stops answering at the batch whose first example is of that stream position."""
    import jax

    turns = []

    def wait(_):
        turns.append(0)
        if len(turns) > 20:
            time.sleep(3600)

    jax.debug.callback(wait, x.sum())


if os.environ.get("TOY_HANG") == "save":
    hang_in_a_save()


class Rows:
    def __init__(self, seed, rows, bad=None, loud=None):
        draw = np.random.default_rng(seed)
        self.x = draw.standard_normal((rows, 8)).astype(np.float32)
        self.y = np.sin(self.x[:, ::-1] * 2).astype(np.float32)
        if bad is not None:
            self.y[bad] = np.nan
        if loud is not None:
            self.y[loud] *= 1000
        self.fingerprint = f"{seed}{rows}".rjust(64, "0")
        self.taken = 0

    def __len__(self):
        return len(self.x)

    def take(self, indices):
        told("take", self.taken)
        self.taken += 1
        return {"x": self.x[indices], "y": self.y[indices], "weights": (indices % 5 != 0).astype(np.float32)}

    def describe(self):
        return {"source": "noise", "rows": len(self.x)}


def make_model(config, rngs):
    import jax
    from flax import nnx
    from jax.ad_checkpoint import checkpoint_name

    from aurora_train.nn import param
    from aurora_train.nn.dropout import dropout
    from aurora_train.nn.norms import Norm
    from aurora_train.nn.stack import Stack

    class Unit(nnx.Module):
        tags = ("normed", "hidden")

        def __init__(self, rngs):
            self.norm = Norm(config.width, "layernorm")
            self.up = param.kernel(rngs, (config.width, 2 * config.width), ("embed", "mlp"))
            self.bias = param.zeros(2 * config.width, "mlp")
            self.down = param.kernel(rngs, (2 * config.width, config.width), ("mlp", "embed"))

        def __call__(self, x, context, index, keys=None, cache=None):
            normed = checkpoint_name(self.norm(x), "normed")
            hidden = checkpoint_name(jax.nn.gelu(normed @ self.up[...] + self.bias[...]), "hidden")
            return x + dropout(hidden @ self.down[...], config.dropout, keys, 0), cache

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embedding = param.kernel(rngs, (8, config.width), (None, "embed"))
            self.stack = Stack(Unit, config.layers, rngs)
            self.head = param.kernel(rngs, (config.width, 8), ("embed", None))

        def __call__(self, x, keys=None):
            return self.stack(x @ self.embedding[...], None, keys)[0] @ self.head[...]

    return Net(rngs)


class Toy(Base):
    Config = Config

    def prepare(self, progress):
        told("prepare", 0)

    def data(self, split):
        told("data", 0)
        rows = self.config.data.rows if split == "train" else 40
        harm = (self.config.data.bad, self.config.data.loud) if split == "train" else ()
        return Rows(len(split), rows, *harm)

    def model(self, rngs):
        return make_model(self.config.model, rngs)

    def loss(self, model, batch, key):
        import jax.numpy as jnp

        if os.environ.get("TOY_HANG") == "step":
            hang_in_a_step(batch["x"])
        errors = jnp.square(model(batch["x"], key) - batch["y"]).mean(-1)
        return Loss((errors * batch["weights"]).sum(), batch["weights"].sum())

    def predict(self, model, batch):
        return model(batch["x"])

    def score(self, predict, split, key, workdir, progress):
        told("score", 0)
        batch = self.data(split).take(np.arange(40))
        return {"mse": float(np.square(predict(batch) - batch["y"]).mean())}
'''

CONFIG = """recipe: toy.py
model: {width: 16, layers: 3, dropout: 0.1}
train: {steps: 30, batch: 8}
optimizer: {name: adamw, lr: 1e-2, ema: 0.9, schedule: {warmup: 3}}
memory: {accumulation: 2}
checkpoint: {every: 10, keep: 5}
evaluate: {every: 10, examples: 16}
"""


def write(folder: Path, **changes: str) -> Path:
    """toy.py and toy.yaml in a folder; `changes` replace text of the config. Returns the config's path."""
    text = CONFIG
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.py").write_text(RECIPE)
    (folder / "toy.yaml").write_text(text)
    return folder / "toy.yaml"

