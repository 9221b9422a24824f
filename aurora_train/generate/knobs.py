"""How each slot of the engine draws: its settings, its seed, and which tokens its penalty applies to."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from aurora_train.generate.drawing import Knobs, next_tokens, penalised
from aurora_train.generate.requests import Sampling


class SlotKnobs:
    """The settings of `slots` slots, on the host, and on the device as they are needed. A free slot is greedy."""

    def __init__(self, slots: int, vocabulary: int):
        self._vocabulary = vocabulary
        self._knobs = Knobs(np.zeros(slots, np.float32), np.full(slots, vocabulary, np.int32),
                            np.ones(slots, np.float32), np.zeros(slots, np.float32))  # fmt: skip
        self._seeds, self._rows = np.zeros((slots, 2), np.uint32), np.zeros(slots, np.int32)
        self._penalties = np.ones(slots, np.float32)
        self._seen = jax.device_put(np.zeros((slots, vocabulary), bool))  # of texts with a penalty
        self._sent = None

    @staticmethod
    def bytes_per_slot(vocabulary: int) -> int:
        """On the device, but for the few numbers of the settings."""
        return vocabulary

    def set(self, slot: int, sampling: Sampling, text) -> None:
        """Draw in a slot as asked for a text that has these tokens."""
        top_k = self._vocabulary if sampling.top_k is None else min(sampling.top_k, self._vocabulary)
        settings = Knobs(sampling.temperature, top_k, sampling.top_p, sampling.min_p)
        for array, value in zip(self._knobs, settings, strict=True):
            array[slot] = value
        self._seeds[slot], self._rows[slot] = _key(sampling.seed), sampling.row
        self._penalties[slot], self._sent = sampling.repetition_penalty, None
        if sampling.repetition_penalty != 1:
            seen = np.zeros(self._vocabulary, bool)
            seen[list(text)] = True
            self._seen = _with_row(self._seen, slot, seen)

    def clear(self, slot: int) -> None:
        """Free a slot."""
        self._knobs.temperature[slot], self._penalties[slot], self._sent = 0, 1, None

    def saw(self, tokens, counts) -> None:
        """Take note of tokens int32[S] that slots with a count have written."""
        if (self._penalties != 1).any():
            self._seen = _marked(self._seen, tokens, counts)

    def next_tokens(self, logits, counts):
        """int32[S]: a token for every slot, the `counts`-th of its answer; -1 where the scores are not finite."""
        if self._sent is None:  # copies: on a CPU the device reads the very arrays, which change while it works
            own = self._seeds, self._rows, self._penalties, self._knobs
            self._sent = jax.device_put(jax.tree.map(np.copy, own))
        seeds, rows, penalties, knobs = self._sent
        if (self._penalties != 1).any():
            logits = penalised(logits, self._seen, penalties)
        return next_tokens(logits, seeds, rows, counts, knobs)


@functools.lru_cache(1024)
def _key(seed: int) -> np.ndarray:
    return np.array(jax.random.key_data(jax.random.key(seed)))  # a copy: else a device's array is kept for each


@functools.partial(jax.jit, donate_argnums=0)
def _with_row(seen, slot, row):
    return jax.lax.dynamic_update_index_in_dim(seen, row, slot, 0)


@functools.partial(jax.jit, donate_argnums=0)
def _marked(seen, tokens, counts):
    rows = jnp.arange(len(tokens))
    return seen.at[rows, jnp.where(counts > 0, tokens, seen.shape[1])].set(True, mode="drop")
