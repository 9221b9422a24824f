"""Mistakes in a user's own recipe: each ends as one line that names file and line, before any training.

The rows are of the list of what a newcomer tried (M1, M2, M3, M15, H2, H3, H7, H10) and their neighbours.
"""

from __future__ import annotations

import re

import pytest
from kit import in_process as aurora

RECIPE = '''"""A small regression, right as it stands; each test breaks one line of it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aurora_train.config import Section, setting
from aurora_train.recipe import Loss, Recipe


class Model(Section):
    width: int = setting(8, ge=1)


class Config(Section):
    model: Model = Model()


class Rows:
    fingerprint = "f" * 64

    def __init__(self, n):
        self.x = np.random.default_rng(n).standard_normal((n, 4)).astype(np.float32)

    def __len__(self):
        return len(self.x)

    def take(self, indices):
        x = self.x[indices]
        return {"x": x, "y": x.sum(1)}

    def describe(self):
        return {"source": "noise"}


class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.a = nnx.Linear(4, width, rngs=rngs)
        self.b = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        return self.b(jax.nn.relu(self.a(x)))[:, 0]


class Sums(Recipe):
    Config = Config

    def data(self, split):
        return Rows(32 if split == "train" else 16)

    def model(self, rngs):
        return Net(self.config.model.width, rngs)

    def loss(self, model, batch, key):
        errors = jnp.square(model(batch["x"]) - batch["y"])
        return Loss(errors.sum(), jnp.float32(len(errors)))

    def predict(self, model, batch):
        return model(batch["x"])

    def score(self, predict, split, key, workdir, progress):
        batch = self.data(split).take(np.arange(16))
        return {"mse": float(np.square(predict(batch) - batch["y"]).mean())}

    def samples(self, model, key):
        return [{"prompt": "0 0 0 0", "text": str(model(jnp.zeros((1, 4)))[0])}]
'''

CONFIG = "recipe: sums.py\ntrain: {steps: 4, batch: 8}\ncheckpoint: {every: 4}\nevaluate: {examples: 8}\n"

# what is replaced, by what, and what the message has to say; LINE stands for the line that was put in.
MISTAKES = {
    "M1-mean": ("return Loss(errors.sum(), jnp.float32(len(errors)))", "return errors.mean()",
                ["sums.py:", "`loss` returned an array", "return Loss(total, weight)"]),
    "M1-none": ("return Loss(errors.sum(), jnp.float32(len(errors)))", "pass", ["`loss` returned a NoneType"]),
    "M1-vector": ("Loss(errors.sum(), jnp.float32(len(errors)))", "Loss(errors, jnp.float32(len(errors)))",
                  ["the `total` of the loss is an array of shape [8]"]),
    "M1-misses": ("    def loss(self, model, batch, key):", "    def los(self, model, batch, key):",
                  ["Sums defines no `loss`", "def loss(self, model, batch, key)"]),
    "M1-no-key": ("def loss(self, model, batch, key):", "def loss(self, model, batch):",
                  ["sums.py:LINE", "`loss` takes (self, model, batch)", "def loss(self, model, batch, key)"]),
    "M1-shape": ("nnx.Linear(width, 1, rngs=rngs)", "nnx.Linear(width + 1, 1, rngs=rngs)",
                 ["sums.py:43", "`loss` fails", "return self.b(jax.nn.relu(self.a(x)))[:, 0]"]),
    "M1-key-of-batch": ('errors = jnp.square(model(batch["x"]) - batch["y"])',
                        'errors = jnp.square(model(batch["x"]) - batch["label"])',
                        ["sums.py:LINE", "KeyError: 'label'", "the batch has: example, x, y"]),
    "M1-if": ('errors = jnp.square(model(batch["x"]) - batch["y"])',
              'errors = jnp.square(model(batch["x"]) - (batch["y"] if batch["y"].max() > 0 else 0))',
              ["sums.py:LINE", "TracerBoolConversionError", "jnp.where"]),
    "M1-numpy": ('errors = jnp.square(model(batch["x"]) - batch["y"])',
                 'errors = np.square(np.asarray(model(batch["x"])) - batch["y"])',
                 ["sums.py:LINE", "TracerArrayConversionError", "jax.numpy"]),
    "M1-fingerprint": ('    fingerprint = "f" * 64\n', "", ["without `fingerprint`", "sha256"]),
    "M1-list": ('{"x": x, "y": x.sum(1)}', '{"x": x, "y": [float(v) for v in x.sum(1)]}',
                ["`take` returned a list as `y`", "NumPy array"]),
    "M1-text": ('{"x": x, "y": x.sum(1)}', '{"x": x, "y": x.sum(1), "name": np.array(["a"] * len(x), object)}',
                ["as `name`", "NumPy array of numbers"]),
    "M1-axis": ('{"x": x, "y": x.sum(1)}', '{"x": x, "y": x.sum(1), "lr": np.float32([0.1, 0.2])}',
                ["`lr` of shape [2] for"]),
    "M1-plain-class": ("class Sums(Recipe):", "class Sums:", ["defines no subclass of Recipe"]),
    "M2-random": ("x = self.x[indices]", "x = self.x[indices] + np.random.normal(size=(len(indices), 4))",
                  ["`take` returned another `x`", "a second time", "generator seeded by its index"]),
    "M2-place": ("x = self.x[indices]", "x = self.x[indices] + np.arange(len(indices))[:, None]",
                 ["`take` returned another `x`", "in another order"]),
    "M2-weight": ("Loss(errors.sum(), jnp.float32(len(errors)))", "Loss(errors.mean(), jnp.float32(1))",
                  ["the loss of a batch weighs 1, and its halves weigh 2 together", "never a mean"]),
    "M2-weight-coupled": ("return Loss(errors.sum(), jnp.float32(len(errors)))\n",
                          'return Loss(errors.mean(), jnp.float32(1))\n\n    couples = "microbatch"\n',
                          ["and its halves weigh 2 together"]),
    "M1-generate": ("    def samples(self, model, key):",
                    "    def generate(self, model, prompt):\n        pass\n\n    def samples(self, model, key):",
                    ["sums.py:LINE", "`generate` takes (self, model, prompt)", "prompt, options, on_text)"]),
    "M15-metric": ("    Config = Config\n\n    def data",
                   '    Config = Config\n    metric = ("accuracy", "max")\n\n    def data',
                   ["the recipe's metric is `accuracy`", "headline of its score is `mse`"]),
    "M3-predict": ('    def predict(self, model, batch):\n        return model(batch["x"])\n', "",
                   ["Sums defines no `predict`", "def predict(self, model, batch)"]),
    "M3-predict-mean": ('        return model(batch["x"])\n\n    def score',
                        '        return model(batch["x"]).mean()\n\n    def score',
                        ["`predict` returned an array of shape []"]),
    "M15-notes": ('return {"mse": float(np.square(predict(batch) - batch["y"]).mean())}',
                  'return {"mse": 1.0, "notes": "one note"}', ["`notes` of score is a str", "a list of sentences"]),
    "M15-tables": ('return {"mse": float(np.square(predict(batch) - batch["y"]).mean())}',
                   'return {"mse": 1.0, "tables": {"a": 1}}',
                   ["`tables` of score is a dict", '"title", "columns", "rows"']),
    "M15-headline": ('return {"mse": float(np.square(predict(batch) - batch["y"]).mean())}', 'return {"name": "good"}',
                     ["the headline of the score, `name`, is a str"]),
    "H7-samples": ('return [{"prompt": "0 0 0 0", "text": str(model(jnp.zeros((1, 4)))[0])}]', 'return ["0 0 0 0"]',
                   ["what `samples` returned holds a str", '"prompt"']),
    "H7-samples-code": ('return [{"prompt": "0 0 0 0", "text": str(model(jnp.zeros((1, 4)))[0])}]',
                        'return [s.items() for s in ["a"]]', ["sums.py:LINE", "'str' object has no attribute 'items'"]),
    "H7-score-code": ('batch = self.data(split).take(np.arange(16))', "batch = self.data(split).take(np.arange(17))",
                      ["sums.py:", "`score` fails: IndexError"]),
    "limits": ("    def samples(self, model, key):",
               '    def exceeded(self, scores):\n        return ["mse"] if scores["mse"] > 1 else []\n\n'
               "    def samples(self, model, key):", ["sums.py:", "`exceeded` fails: KeyError: 'mse'"]),
    "limits-text": ("    def samples(self, model, key):",
                    '    def exceeded(self, scores):\n        return "mse"\n\n    def samples(self, model, key):',
                    ["`exceeded` has to return a list of texts"]),
    "export": ("    Config = Config\n\n    def data", '    Config = Config\n    formats = ("sums",)\n\n    def data',
               ["Sums defines no `probe`", "def probe(self, examples)"]),
    "H10-import": ("import jax.numpy as jnp", "import jax.nunpy as jnp", ["fails on import", "sums.py:LINE"]),
    "H10-facts": ("        return Net(self.config.model.width, rngs)", "        return Net(self.seen, rngs)",
                  ["`model` needs more than the config and its facts", "facts()"]),
    "H3-attention": ("self.b = nnx.Linear(width, 1, rngs=rngs)",
                     "self.b = nnx.Linear(width, 1, rngs=rngs)\n"
                     "        self.c = nnx.MultiHeadAttention(2, width, dropout_rate=0.1, decode=False, rngs=rngs)",
                     ["model.c.rngs", "random state", "keys come with the batch"]),
    "H1-couples": ("        self.b = nnx.Linear(width, 1, rngs=rngs)",
                   "        self.b = nnx.Sequential(nnx.BatchNorm(width, rngs=rngs), nnx.Linear(width, 1, rngs=rngs))",
                   ["depends on all examples of a microbatch", 'couples = "microbatch"']),
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path, shared_cache, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.yaml").write_text(CONFIG)

    def write(old: str = "", new: str = "") -> int | None:
        assert old in RECIPE
        text = RECIPE.replace(old, new, 1)
        if "self.seen" in text:
            text += "\n    def prepare(self, progress):\n        self.seen = 8\n"
        (tmp_path / "sums.py").write_text(text)
        first = new.splitlines()[0] if new else ""
        return next((n for n, line in enumerate(text.splitlines(), 1) if first and first in line), None)

    return write


def test_the_recipe_that_the_mistakes_are_made_in_is_right_and_check_says_so(recipe, capsys):
    recipe()
    assert aurora("check", "sums.yaml") == 0
    assert "not rehearsed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_recipe_ends_as_one_line_before_any_training(name, recipe, capsys, tmp_path):
    old, new, wanted = MISTAKES[name]
    line = recipe(old, new)
    options = ["--prepare"] if "facts" in name else []
    assert aurora("check", "sums.yaml", *options) == 2
    said = capsys.readouterr().err
    for part in wanted:
        assert part.replace("LINE", str(line)) in said, said
    assert "Traceback" not in said and re.search(r"^error: ", said, re.MULTILINE)


@pytest.mark.parametrize("name", ["M2-weight", "H7-samples-code"])
def test_train_refuses_what_check_refuses_and_leaves_nothing(name, recipe, capsys, tmp_path):
    old, new, wanted = MISTAKES[name]
    line = recipe(old, new)
    assert aurora("train", "sums.yaml", "--run", "run", "--quiet") == 2
    said = capsys.readouterr().err
    assert all(part.replace("LINE", str(line)) in said for part in wanted), said
    assert not (tmp_path / "run").exists()


def test_what_is_not_prepared_is_said_to_be_unrehearsed(recipe, capsys):
    prepare = "    def prepare(self, progress):\n        self.made = 1\n\n    def data(self, split):"
    recipe("    def data(self, split):", prepare)
    assert aurora("check", "sums.yaml") == 0
    assert "not rehearsed: the data are not prepared yet" in capsys.readouterr().out
    assert aurora("check", "sums.yaml", "--prepare") == 0
    assert "not rehearsed" not in capsys.readouterr().out
    assert aurora("check", "sums.yaml") == 0, "once prepared, it is rehearsed without being asked"
    assert "not rehearsed" not in capsys.readouterr().out
