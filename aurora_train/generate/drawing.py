"""Draws the next token of every row on the device, without sorting a whole vocabulary.

The likeliest `CANDIDATES` tokens are ranked, and a draw is made among them. Where they may not be all that top-k, top-p
or min-p keep, everything is ranked: the draw is exact in any case. A draw by temperature alone ranks nothing. The noise
belongs to a rank, however many are ranked, so that a row's draw does not depend on what other rows need.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aurora_train.generate.requests import MOST_ALTERNATIVES

CANDIDATES = 1024


class Knobs(NamedTuple):
    """How the next token is drawn, as arrays, so that a change compiles nothing: one for all rows, or one for each."""

    temperature: jax.Array  # float32; 0 takes the likeliest
    top_k: jax.Array  # int32
    top_p: jax.Array  # float32
    min_p: jax.Array | float = 0.0  # float32


@jax.jit
def draw(logits, keys, count, knobs: Knobs):
    """float32[B, V] -> int32[B]: temperature, the k likeliest, the nucleus (Holtzman et al. 2020), and what has at
    least the share `min_p` of the likeliest's probability (Nguyen et al. 2024).

    keys: key[B], folded with `count`, int32[] or [B]: the number of the token in its text.
    """
    rows, vocabulary = logits.shape
    knobs = Knobs(*(jnp.broadcast_to(jnp.asarray(knob), (rows,)) for knob in knobs))
    count = jnp.broadcast_to(count, (rows,))
    greedy = knobs.temperature == 0
    likeliest = logits.argmax(-1).astype(jnp.int32)

    def drawn():
        keyed = jax.vmap(jax.random.fold_in)(keys, count)
        return jnp.where(greedy, likeliest, _drawn(logits, keyed, knobs, ~greedy))

    # At temperature 0 nothing is ranked: on a processor that takes as long as the step of a small model.
    return jax.lax.cond(greedy.all(), lambda: likeliest, drawn)


def _drawn(logits, keys, knobs: Knobs, wanted):
    vocabulary = logits.shape[1]
    if vocabulary <= CANDIDATES:
        return _of_ranked(logits, keys, knobs, vocabulary)[0]
    scaled = logits / jnp.maximum(knobs.temperature, 1e-6)[:, None]
    whole = (knobs.top_k >= vocabulary) & (knobs.top_p >= 1) & (knobs.min_p <= 0)

    def of_all():
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

    def of_some():
        few, enough = _of_ranked(logits, keys, knobs, CANDIDATES)
        complete = (enough | whole | ~wanted).all()
        return jax.lax.cond(
            complete, lambda: few, lambda: jnp.where(enough, few, _of_ranked(logits, keys, knobs, vocabulary)[0])
        )

    untouched = jax.lax.cond((whole & wanted).any(), of_all, lambda: jnp.zeros(len(logits), jnp.int32))
    return jnp.where(whole, untouched, jax.lax.cond((whole | ~wanted).all(), lambda: untouched, of_some))


def _of_ranked(logits, keys, knobs: Knobs, number: int):
    """(int32[B], bool[B]: whether the `number` likeliest tokens are all that may be drawn)."""
    vocabulary = logits.shape[1]
    temperature = jnp.maximum(knobs.temperature, 1e-6)[:, None]
    if number == vocabulary:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, -1)
    else:
        ranked, order = jax.lax.top_k(logits, number)
    ranked = ranked / temperature
    kept = jnp.arange(number) < knobs.top_k[:, None]
    total = jax.nn.logsumexp(jnp.where(kept, ranked, -jnp.inf), -1)
    if number < vocabulary:
        total = jnp.where(knobs.top_k > number, jax.nn.logsumexp(logits / temperature, -1), total)
    shares = jnp.where(kept, jnp.exp(ranked - total[:, None]), 0)
    kept &= jnp.cumsum(shares, -1) - shares < knobs.top_p[:, None]
    kept &= shares >= knobs.min_p[:, None] * shares[:, :1]
    rank = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, ranked, -jnp.inf))
    bounded = (knobs.top_k < vocabulary) & (knobs.top_k > number)  # its sum of probabilities is not known
    enough = ~(kept[:, -1] | bounded) | (knobs.top_k <= number) | (number == vocabulary)
    return jnp.take_along_axis(order, rank[:, None], -1)[:, 0].astype(jnp.int32), enough


@jax.jit
def next_tokens(logits, seeds, rows, counts, knobs: Knobs):
    """`draw` with the key of each row: of its seed (key data uint32[B, 2]), folded with its number int32[B]."""
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(seeds), rows)
    return draw(logits, keys, counts, knobs)


@jax.jit
def penalised(logits, seen, penalties):
    """Logits of the tokens that were `seen`, bool[B, V], divided by their row's penalty where above 0, else multiplied
    by it (Keskar et al. 2019, eq. 4; the sign as in transformers)."""
    penalties = penalties[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalties, logits * penalties), logits)


@jax.jit
def measured(logits, drawn):
    """(log-probability of each row's drawn token float32[B], the likeliest tokens' ids and log-probabilities)."""
    logprobs = jax.nn.log_softmax(logits, -1)
    top, ids = jax.lax.top_k(logprobs, min(MOST_ALTERNATIVES, logits.shape[1]))
    return jnp.take_along_axis(logprobs, drawn[:, None], -1)[:, 0], ids, top
