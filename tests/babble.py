"""A user's own recipe around the library's decoder, whose data is there at once: a noisy counting language.

Every shape of `DecoderConfig` can be trained with it in a second, which makes it the recipe for tests of meshes.
"""

from __future__ import annotations

from pathlib import Path

RECIPE = '''"""Predict the next token of rows that count up from a drawn token, with noise."""
import numpy as np

from aurora_train.config import Section, setting
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.recipe import Loss
from aurora_train.recipe import Recipe as Base


class Data(Section):
    vocab: int = setting(64, ge=2, help="tokens")
    rows: int = setting(200, ge=1, help="training rows")
    length: int = setting(32, ge=2, help="tokens in a row")


class Config(Section):
    model: DecoderConfig
    data: Data = Data()


class Rows:
    def __init__(self, seed, data, rows):
        draw = np.random.default_rng(seed)
        noise = draw.integers(0, data.vocab, (rows, data.length + 1)) * (draw.random((rows, data.length + 1)) < 0.1)
        count = draw.integers(0, data.vocab, (rows, 1)) + np.arange(data.length + 1)
        self.tokens = ((count + noise) % data.vocab).astype(np.int32)
        self.fingerprint = f"{seed}{rows}".rjust(64, "0")

    def __len__(self):
        return len(self.tokens)

    def take(self, indices):
        return {"tokens": self.tokens[indices]}

    def describe(self):
        return {"source": "counting", "rows": len(self)}


class Babble(Base):
    Config = Config

    def prepare(self, progress):
        pass

    def data(self, split):
        return Rows(len(split), self.config.data, self.config.data.rows if split == "train" else 40)

    def model(self, rngs):
        from aurora_train.nn.decoder import Decoder

        return Decoder(self.config.model, self.config.data.vocab, self.config.train.dtype, rngs)

    def loss(self, model, batch, key):
        import jax.numpy as jnp

        tokens, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        return Loss(*model.nll(model(tokens, keys=key), targets, jnp.ones(targets.shape, jnp.float32)))
'''

CONFIG = """recipe: babble.py
model: {width: 32, layers: 4, heads: 4}
train: {steps: 50, batch: 8, seed: 0, precision: float32}
optimizer: {lr: 1e-2, schedule: {warmup: 3}}
checkpoint: {every: 10}
evaluate: {every: 10, examples: 16, baselines: false}
"""


def write(folder: Path) -> Path:
    """`babble.yaml` in a folder, and its recipe beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "babble.py").write_text(RECIPE)
    (folder / "babble.yaml").write_text(CONFIG)
    return folder / "babble.yaml"
