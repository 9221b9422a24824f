"""Prompts of unlike length are continued in one batch: the padding behind a text changes none of its logits.

A softmax, a windowed and a linear family, because each forgets padding in its own way: attention must not see it, a
window must be counted from real tokens, and a state must pass over it. `tests/parity` holds packed rows and padding on
the left to transformers, for every family.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from open_models import VOCABULARY, decoder_of, write_model

from aurora_train.generate import programs
from aurora_train.generate.engine import empty
from aurora_train.generate.weights import decoded
from aurora_train.interop.placing import matched
from aurora_train.interop.source import open_source

LENGTHS = (3, 16, 10)  # windows are of 8 tokens; the longest prompt has no padding


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama3", "qwen3_5")]


@pytest.fixture(scope="module", params=["gemma3", *SLOW])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("padding")
    write_model(folder, request.param)
    opened = matched(open_source(folder))
    return decoder_of(opened)


@pytest.fixture(scope="module")
def alone(model):
    """(texts, float32 logits of each after each of its tokens), every text in a row of its own and without a cache."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCABULARY, length + 4) for length in LENGTHS]
    longest = max(map(len, texts))
    rows = np.stack([np.pad(text, (0, longest - len(text))) for text in texts])  # causal: what follows is not seen
    graph, state = nnx.split(model)
    read = jax.jit(lambda state, tokens: (m := nnx.merge(graph, state)).logits(m(tokens)))
    return texts, np.asarray(read(state, jnp.asarray(rows)))


def test_prompts_of_unlike_length_are_continued_together_with_the_logits_of_each_alone(model, alone):
    texts, wanted = alone
    lengths = np.array(LENGTHS, np.int32)
    tokens = np.full((len(texts), 16), 7, np.int32)  # a real token as padding: what it adds would be seen
    for row, (text, length) in enumerate(zip(texts, LENGTHS, strict=True)):
        tokens[row, :length] = text[:length]
    form, arrays = decoded(model)
    rows = programs.Rows(np.zeros(3, np.int32), lengths, lengths, np.zeros(3, np.int32))
    caches, logits = programs.read_all(form, 32, arrays, *empty(form, arrays, 3, 32), tokens, rows)
    for step in range(5):
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(logits[row], wanted[row][length - 1 + step], atol=1e-4, err_msg=f"{row} {step}")
        if step < 4:
            drawn = jnp.asarray([text[length + step] for text, length in zip(texts, LENGTHS, strict=True)], jnp.int32)
            rows = programs.Rows(lengths + step, np.ones(3, np.int32), lengths + step + 1, np.zeros(3, np.int32))
            caches, logits = programs.step(form, 32, False, arrays, caches, logits, drawn, rows)
