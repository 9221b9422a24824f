"""Every way in which a text can be read gives the logits of the whole text without a cache, for every kind of layer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from test_engine import ask, request
from test_sampler import LONGROPE, SHAPES, VOCAB, decoder

from aurora_train import mesh as meshes
from aurora_train.generate.engine import Engine

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


def without_a_cache(model, prompt, made):
    """float64 log-probabilities before each token of the answer."""
    wide, text = [], prompt + made
    graph, state = nnx.split(model)

    @jax.jit
    def read(state, tokens, positions, prefix):
        model = nnx.merge(graph, state)
        beside = {"prefix": prefix} if model.mask == "prefix" else {}
        return model.logits(model(tokens, None, positions, **beside))

    # A row for each token: longrope turns a text by its length, so that one row is not all of its beginnings.
    count, longest = len(made), len(text) - 1
    tokens, positions = np.zeros((count, longest), np.int32), np.zeros((count, longest), np.int32)
    for row in range(count):
        size = len(prompt) + row
        tokens[row, :size], positions[row, :size] = text[:size], range(size)
    prefix = np.broadcast_to(np.arange(longest) < len(prompt), tokens.shape)
    logits = np.asarray(read(state, tokens, positions, prefix), np.float64)
    wide = logits[np.arange(count), len(prompt) - 1 + np.arange(count)]
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def assert_alike(model, heard):
    for prompt, one in zip(PROMPTS, heard, strict=True):
        wanted = without_a_cache(model, prompt, one.ids)
        for number, token in enumerate(one.tokens):
            assert wanted[number].max() - wanted[number][token.id] < 1e-4, number
            for i, value in token.top:
                assert abs(value - wanted[number][i]) < 1e-4, (len(prompt), number)


FAST = ("windowed",)


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in FAMILIES])
def test_a_text_has_the_same_logits_however_it_is_read(family):
    model = decoder(**FAMILIES[family])
    for way in WAYS.values():
        engine = Engine(model, length=80, **way)
        assert_alike(model, ask(engine, *(request(prompt, 10, logprobs=20) for prompt in PROMPTS)))


@pytest.mark.slow
def test_eight_devices_write_what_one_writes_and_each_holds_its_share_of_slots_and_weights():
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); import test_engine_logits as t; t.on_eight()"
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(tests)], env=os.environ | env, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def on_eight():
    """The body of the test above, in a process with eight simulated devices."""
    assert jax.device_count() == 8
    mesh = meshes.make_mesh(4, 2)
    for family in ("windowed", "qwen3.5"):
        model = decoder(**FAMILIES[family])
        for together in (False, True):
            engine = Engine(model, 8, 80, chunk=16, mesh=mesh, together=together)
            heard = ask(engine, *(request(prompt, 10, logprobs=20) for prompt in PROMPTS))
            assert_alike(model, heard)
            planned = engine.planned_bytes()
            held = meshes.bytes_per_device(engine._caches)
            assert len(held) == 8 and set(held.values()) == {planned["caches"] // 8}
            kernels = [a for a in engine._weights if a.ndim == 3 and a.shape[1] % 2 == 0]
            assert any(len({s.index for s in a.addressable_shards}) == 2 for a in kernels)
