"""Copying from the document so far: matches are a function of the document's ids, the same however they are found; the
mixture is a distribution, in training and in sampling; and a run with it is planned, killed, resumed and scored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from language import matches
from language.copying import CopyingDecoder, found
from language.starting import CopyingConfig

CONTEXTS = (1, 2, 3, 5, 8)


def by_definition(document, contexts):
    """int[tokens, contexts, 3], token by token."""
    result = np.zeros((len(document), len(contexts), 3), int)
    for here in range(len(document)):
        for k, length in enumerate(contexts):
            if length > here + 1:
                continue
            last = document[here - length + 1 : here + 1]
            earlier = [s for s in range(length - 1, here) if document[s - length + 1 : s + 1] == last]
            if earlier:
                result[here, k] = document[earlier[-1] + 1], len(earlier), here - earlier[-1]
    return result


def documents(seed=0, lengths=(60, 1, 2, 45, 90)):
    """Few distinct tokens, so that they repeat; 0 begins each."""
    random = np.random.default_rng(seed)
    return [[0, *random.integers(1, 4, length - 1).tolist()] for length in lengths]


def test_matches_are_those_of_their_definition_in_every_document_by_itself():
    texts = documents()
    offsets = np.cumsum([0, *map(len, texts)])
    distance, seen = matches.find(np.concatenate(texts).astype(np.uint16), offsets, CONTEXTS)
    wanted = np.concatenate([by_definition(text, CONTEXTS) for text in texts])
    assert np.array_equal(distance, wanted[..., 2])
    assert np.array_equal(seen, wanted[..., 1])
    assert (distance > 0).any(axis=0).all()  # each length of context was met


def test_a_row_of_several_documents_finds_in_each_what_it_has_by_itself():
    texts = documents()
    row = jnp.asarray([sum(texts, [])])
    segments = jnp.asarray([np.repeat(np.arange(len(texts)), [len(text) for text in texts]) + 1])
    places = jnp.arange(row.shape[1])[None]
    wanted = np.concatenate([by_definition(text, CONTEXTS) for text in texts])
    assert np.array_equal(jax.jit(found, static_argnums=2)(row, places, CONTEXTS, segments)[0], wanted)
