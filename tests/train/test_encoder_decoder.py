"""An encoder beside a decoder that reads it by cross-attention is planned, cut, killed and resumed like any model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kit import Aurora, evaluations, events, final_hash, losses

from aurora_train.cli.main import main
from aurora_train.config import load
from aurora_train.machine.precision import settled
from aurora_train.nn.stack import Segment, named_stacks
from aurora_train.train.planning import plan_config

# Half the compile time, the same mathematics.
QUICK_JIT = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RECIPE = '''"""Write a row of digits backwards: an encoder reads it both ways, a decoder says it token by token."""
import os
import signal
import time

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.recipe import Loss
from aurora_train.recipe import Recipe as Base

DIGITS, START = 10, 10
# Of a decoder (Vaswani et al. 2017): attention to itself, to the encoder, and an MLP.
LAYER = [{"mlp": False}, {"kind": "cross"}]


class Model(Section):
    encoder: DecoderConfig = setting(DecoderConfig(width=24, layers=2, heads=3))
    decoder: DecoderConfig = setting(DecoderConfig(width=32, layers=6, heads=4, dropout=0.1, memory_width=24,
                                                   layer_table=LAYER))


class Data(Section):
    length: int = setting(8, ge=2, help="digits of the longest row")


class Config(Section):
    model: Model = Model()
    data: Data = Data()


class Rows:
    taken = 0

    def __init__(self, split, length):
        self.split, self.length, self.fingerprint = split, length, f"{split}{length}".rjust(64, "0")

    def __len__(self):
        return 256

    def take(self, indices):
        Rows.taken += 1
        if Rows.taken == int(os.environ.get("KILLED_AT", 0)):
            while '"save"' not in open("killed/events.jsonl").read():  # one is whole: the run does not begin anew
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        rows = [self.row(int(i)) for i in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def row(self, index):
        rng = np.random.default_rng([len(self.split), index])
        size = int(rng.integers(2, self.length + 1))
        digits, there = rng.integers(0, DIGITS, self.length), np.arange(self.length) < size
        target = np.where(there, digits[np.maximum(size - 1 - np.arange(self.length), 0)], 0)
        tokens = np.where(there, np.concatenate([[START], target[:-1]]), 0)
        arrays = {"source": np.where(there, digits, 0), "tokens": tokens, "targets": target, "segments": there}
        return {name: array.astype(np.int32) for name, array in arrays.items()}

    def describe(self):
        return {"source": "digits", "split": self.split}


class Reverse(Base):
    Config = Config

    def shapes(self):
        import jax

        row = jax.ShapeDtypeStruct((self.config.data.length,), "int32")
        return dict.fromkeys(("source", "tokens", "targets", "segments"), row)

    def data(self, split):
        return Rows(split, self.config.data.length)

    def model(self, rngs):
        from flax import nnx

        from aurora_train.nn.decoder import Decoder
        from aurora_train.nn.transformer import Transformer

        class Both(nnx.Module):
            def __init__(self, config, dtype, rngs):
                self.encoder = Transformer(config.encoder, DIGITS, dtype, rngs, mask="bidirectional")
                self.decoder = Decoder(config.decoder, DIGITS + 1, dtype, rngs)

            def __call__(self, batch, keys=None):
                segments = batch["segments"]
                memory = self.encoder(batch["source"], segments)
                beside = {"memory": memory, "memory_segments": segments}
                return self.decoder(batch["tokens"], segments, keys=keys, **beside)

        return Both(self.config.model, self.config.train.dtype, rngs)

    def loss(self, model, batch, key):
        weights = batch["segments"].astype("float32")
        return Loss(*model.decoder.nll(model(batch, key), batch["targets"], weights))

    def predict(self, model, batch):
        return model.decoder.logits(model(batch)).argmax(-1)

    def score(self, predict, split, key, workdir, progress):
        batch = self.data(split).take(np.arange(64))
        right = (predict(batch) == batch["targets"])[batch["segments"] == 1]
        return {"right": float(right.mean())}
'''
CONFIG = """recipe: reverse.py
train: {steps: 24, batch: 8}
optimizer: {name: adamw, lr: 3e-3, ema: 0.9, schedule: {warmup: 2}}
memory: {accumulation: 2, save: [query, attn_out, mlp_up], unroll: false}
checkpoint: {every: 5}
evaluate: {every: 12, examples: 16, final: false}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reverse")
    (folder / "reverse.py").write_text(RECIPE)
    (folder / "reverse.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def built(here, *overrides):
    config = settled(load("reverse.yaml", overrides))
    return config, config.recipe_class(config, here / "cache")


@pytest.mark.slow
def test_it_is_killed_and_resumed_to_the_bit(here, shared_cache):
    assert main(["train", "reverse.yaml", "--run", "whole", "--quiet"]) == 0
    command, kill = ("train", "reverse.yaml", "--run", "killed", "--quiet"), {"KILLED_AT": "18"}
    killed = Aurora(here, shared_cache)(*command, environment=kill)
    assert killed.returncode == -9, killed.stderr
    assert main(["resume", "killed", "--quiet"]) == 0
    whole, run = here / "whole", here / "killed"
    assert 0 < events(run, "resume")[0]["step"] < 24
    assert losses(run) == losses(whole) and evaluations(run) == evaluations(whole)
    assert final_hash(run) == final_hash(whole)
    plan = json.loads((run / "plan.json").read_text())["plan"]
    assert {name: cut[0]["save"] for name, cut in plan["stacks"].items()} == dict.fromkeys(
        ("encoder.stack", "decoder.stack"), ["query", "attn_out", "mlp_up"]
    )


def test_it_is_planned_for_a_machine_that_is_not_here(here, monkeypatch):
    """The planner sees both stacks as the loss calls them, the decoder's with the encoder's output beside it."""
    for module in ("train.planning", "train.rehearsal", "plan.account", "plan.verify"):
        monkeypatch.setattr(f"aurora_train.{module}.can_compile_for_gpu", lambda: False)
    free = ["memory.accumulation=auto", "memory.save=auto", "train.batch=64", "data.length=256", "mesh.data=1"]
    config, recipe = built(here, *free, "train.precision=bfloat16")
    roomy = plan_config(config, recipe, machine="h100")
    tight = plan_config(config, recipe, machine="h100", budget=int(0.5 * roomy.predicted_bytes))
    assert set(roomy.stacks) == {"encoder.stack", "decoder.stack"}
    assert tight.predicted_bytes <= 0.5 * roomy.predicted_bytes
    assert tight.work != roomy.work
    assert roomy.details["attention"].startswith("cudnn (")  # what both parts take, and why


def gradients(here, plan):
    """(loss, gradients by path, of all units whatever the cut)"""
    _, recipe = built(here)
    model = recipe.model(nnx.Rngs(params=0))
    for path, stack in named_stacks(model).items():
        stack.cut(tuple(plan.get(path, [Segment(0, stack.num_units)])))
    graph, state = nnx.split(model)
    batch = {name: jnp.asarray(array) for name, array in recipe.data("train").take(np.arange(8)).items()}
    keys = jax.random.split(jax.random.key(1), 8)

    def mean(state):
        found = recipe.loss(nnx.merge(graph, state), batch, keys)
        return found.total / found.weight

    loss, found = QUICK_JIT(jax.value_and_grad(mean))(state)
    found = nnx.to_pure_dict(found)
    for side in found.values():
        parts = side.pop("stack")["segments"]
        side["units"] = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(parts[i] for i in sorted(parts)))
    return float(loss), found


@pytest.mark.slow
def test_save_sets_and_cuts_change_its_gradients_by_rounding_alone(here):
    """A cut of the decoder adds the encoder's gradient up by segments: the same terms in another order."""
    loss, expected = gradients(here, {})
    plan = {
        "encoder.stack": [Segment(0, 2, ("query", "mlp_up"))],
        "decoder.stack": [Segment(0, 1, ()), Segment(1, 3, ("value", "attn_out"))],
    }
    found_loss, found = gradients(here, plan)
    assert found_loss == pytest.approx(loss, rel=1e-6)

    def near(one, other):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * max(np.abs(other).max(), 1e-3))

    jax.tree.map(near, found, expected)
    assert np.abs(expected["encoder"]["units"]["attention"]["query"]).max() > 1e-4  # it is trained through the decoder
