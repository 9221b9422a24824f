"""Rows of unlike length in one batch: padding on either side of a text changes none of its logits.

A softmax, a windowed and a linear family, because each forgets padding in its own way: attention must not see it, a
window must be counted from real tokens, and a state must pass over it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from open_models import VOCABULARY, write_model

from aurora_train.generate.sampler import _read_prompt, _read_token
from aurora_train.interop.placing import decoder_of, matched
from aurora_train.interop.source import open_source

LENGTHS = (3, 16, 10)  # windows are of 8 tokens; the longest prompt has no padding


@pytest.fixture(scope="module", params=["llama3", "gemma3", "qwen3_5"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("padding")
    write_model(folder, request.param)
    opened = matched(open_source(folder))
    return decoder_of(opened.config, opened.vocabulary, opened.read)


@pytest.fixture(scope="module")
def alone(model):
    """(texts, float32 logits of each after each of its tokens), every text by itself and without a cache."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCABULARY, length + 4) for length in LENGTHS]
    read = jax.jit(lambda state, tokens: (m := nnx.merge(graph, state)).logits(m(tokens)))
    graph, state = nnx.split(model)
    return texts, [np.asarray(read(state, jnp.asarray(text)[None]))[0] for text in texts]


def test_prompts_of_unlike_length_are_continued_together_with_the_logits_of_each_alone(model, alone):
    texts, wanted = alone
    lengths = np.array(LENGTHS, np.int32)
    tokens = np.full((len(texts), 16), 7, np.int32)  # a real token as padding: what it adds would be seen
    for row, (text, length) in enumerate(zip(texts, LENGTHS, strict=True)):
        tokens[row, :length] = text[:length]
    graph, state = nnx.split(model)
    logits, caches = _read_prompt(graph, 32, state, tokens, lengths, None)
    for step in range(5):
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(logits[row], wanted[row][length - 1 + step], atol=1e-4, err_msg=f"{row} {step}")
        if step < 4:
            drawn = jnp.asarray([text[length + step] for text, length in zip(texts, LENGTHS, strict=True)], jnp.int32)
            logits, caches = _read_token(graph, state, caches, drawn, jnp.asarray(lengths + step), None)


def test_padding_on_the_left_is_a_document_of_its_own(model, alone):
    texts, wanted = alone
    size = max(map(len, texts))
    tokens = np.full((len(texts), size), 7, np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, text in enumerate(texts):
        tokens[row, -len(text) :], segments[row, -len(text) :] = text, 1
        positions[row, -len(text) :] = np.arange(len(text))
    found = model.logits(model(*map(jnp.asarray, (tokens, segments, positions))))
    for row, text in enumerate(texts):
        np.testing.assert_allclose(found[row, -len(text) :], wanted[row], atol=1e-4)
