"""Every way in which a text can be read gives the logits of the whole text without a cache, for every kind of layer."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kit import Aurora
from test_engine import ask, request
from test_sampler import LONGROPE, SHAPES, VOCAB, decoder

from aurora_train import mesh as meshes
from aurora_train.generate.engine import Engine
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig

DELTA = {
    "layers": 4, "heads": 2, "activation": "swiglu", "tied": False, "qk_norm": "head", "attention_gate": True,
    "linear": {"key_heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 6},
    "layer_table": [{"kind": "linear"}, {"kind": "linear"}, {"kind": "linear"}, {"rotary": 0.25}],
}  # fmt: skip
FAMILIES = {
    "llama": {"kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm"},
    "windowed": SHAPES["llama"],
    "gemma": SHAPES["gemma"],
    "gpt2": SHAPES["gpt2"] | {"max_length": 80},
    "qwen3.5": DELTA,
    "longrope": {"rope_scaling": LONGROPE | {"original_length": 40}},
    "prefix": {"mask": "prefix", "window": 7},
}
WAYS = {
    "whole prompts, one at a time": {"slots": 1},
    "in chunks, beside others": {"slots": 3, "chunk": 16},
    "all prompts at once": {"slots": 5, "chunk": 32, "together": True},
}
PROMPTS = [np.random.default_rng(length).integers(0, VOCAB, length).tolist() for length in (37, 1, 16, 50, 5)]


def without_a_cache(model, answers):
    """float64 log-probabilities before each token of the answers (prompt, ids) [answers, tokens, vocabulary].

    Each is the end of a row of its own: longrope turns a text by its length, so one row is not all of its beginnings.
    """
    beginnings = [(prompt + ids[:n], len(prompt)) for prompt, ids in answers for n in range(len(ids))]
    tokens, positions = (np.zeros((len(beginnings), 64), np.int32) for _ in range(2))
    for row, (text, _) in enumerate(beginnings):
        tokens[row, : len(text)], positions[row, : len(text)] = text, range(len(text))
    graph, state = nnx.split(model)

    @jax.jit
    def read(state, prefix):
        model = nnx.merge(graph, state)
        beside = {"prefix": prefix} if model.mask == "prefix" else {}
        return model.logits(model(tokens, None, positions, **beside))

    prefix = np.arange(64) < np.array([length for _, length in beginnings])[:, None]
    lasts = [len(text) - 1 for text, _ in beginnings]
    wide = np.asarray(read(state, prefix), np.float64)[np.arange(len(lasts)), lasts]
    return (wide - np.log(np.exp(wide).sum(-1, keepdims=True))).reshape(len(answers), -1, VOCAB)


def assert_alike(model, *heard):
    """Every answer is the likeliest one, with the log-probabilities of the whole text, all of it read at once."""
    answers = [(prompt, one.ids) for each in heard for prompt, one in zip(PROMPTS, each, strict=True)]
    wanted = without_a_cache(model, answers)
    for answer, rows in zip([one for each in heard for one in each], wanted, strict=True):
        for token, row in zip(answer.tokens, rows, strict=True):
            assert row.max() - row[token.id] < 1e-4
            assert len(token.top) == 20 and all(abs(value - row[i]) < 1e-4 for i, value in token.top)


# In the slow tier those with unlike caches: a state, a table of positions, two turnings of one text, a prefix.
SLOW = ("qwen3.5", "gpt2", "longrope", "prefix")
TIERS = {"windowed": ()} | dict.fromkeys(SLOW, pytest.mark.slow)


@pytest.mark.parametrize("family", [pytest.param(f, marks=TIERS.get(f, pytest.mark.release)) for f in FAMILIES])
def test_a_text_has_the_same_logits_however_it_is_read(family):
    model = decoder(**FAMILIES[family])
    asked = [request(prompt, 10, logprobs=20) for prompt in PROMPTS]
    assert_alike(model, *(ask(Engine(model, length=80, **way), *asked) for way in WAYS.values()))


class Decay(nnx.Module):
    """A layer kind of a recipe's own: a moving average of all before, which knows nothing of padding or idle rows."""

    def __init__(self, config, row, rngs, **_):
        self.keeps = 0.7

    @staticmethod
    def empty_cache(config, row, batch, length, dtype):
        return jnp.zeros((batch, config.width), dtype)

    def __call__(self, x, context, cache=None):
        def step(state, x):
            state = self.keeps * state + (1 - self.keeps) * x
            return state, state

        state, y = jax.lax.scan(step, jnp.zeros_like(x[:, 0]) if cache is None else cache, x.swapaxes(0, 1))
        return y.swapaxes(0, 1), None if cache is None else state


class WithDecay(DecoderConfig):
    mixers = {"decay": Decay}


@pytest.mark.slow
def test_a_layer_of_a_recipes_own_kind_sees_neither_padding_nor_idle_rows():
    config = WithDecay(width=32, layers=2, heads=4, layer_table=[{"kind": "decay"}, {}])
    model = Decoder(config, VOCAB, "float32", nnx.Rngs(0))
    asked = [request(prompt, 10, logprobs=20) for prompt in PROMPTS]
    assert_alike(model, ask(Engine(model, 2, 80, chunk=16, together=True), *asked))


@pytest.mark.slow
def test_eight_devices_write_what_one_writes_and_each_holds_its_share_of_slots_and_weights(tmp_path, shared_cache):
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); import test_engine_logits as t; t.on_eight()"
    env = Aurora(tmp_path, shared_cache).environment(devices=8)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(tests)], env=env, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def on_eight():
    """The body of the test above, in a process with eight simulated devices."""
    assert jax.device_count() == 8
    mesh = meshes.make_mesh(4, 2)
    asked = [request(prompt, 10, logprobs=20) for prompt in PROMPTS]
    for family, together in (("windowed", True), ("qwen3.5", False)):
        model = decoder(**FAMILIES[family])
        engine = Engine(model, 8, 80, chunk=16, mesh=mesh, together=together)
        assert_alike(model, ask(engine, *asked))
        planned = engine.planned_bytes()
        held = meshes.bytes_per_device(engine._caches)
        assert len(held) == 8 and set(held.values()) == {planned["caches"] // 8}
        kernels = [a for a in engine._weights if a.ndim == 3 and a.shape[1] % 2 == 0]
        assert any(len({str(s.index) for s in a.addressable_shards}) == 2 for a in kernels)
