"""`CopyingDecoder`: a decoder that may also copy what followed earlier occurrences of its last tokens in the document.

Its distribution is a mixture: p = g_0 softmax + sum_k g_k p_k, where p_k puts nearly all on the token that followed
the last earlier occurrence of the last n_k tokens. The gates g are a softmax of the hidden state and of features of the
matches (compare See et al. 2017 and Merity et al. 2017, whose pointers are attention). The candidates' embeddings are
also added to what the first layer reads. Matches are int32[..., contexts, 3] as `language.matches` gives them; without
them, a call finds those of its own rows, and `extend` those of its caches.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.nn import lora, losses, param
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.linear import linear
from language.matches import FARTHEST, MOST_SEEN

COPIED = 0.98  # of p_k, on its candidate; the rest is even over the vocabulary
OWN = 0.3  # weight of the softmax's own loss in training, so that it learns what may be copied too
_NEVER = -1e30  # a logarithm of zero that has a gradient
_HIDDEN = 32  # units of the gates' perceptron


class Copied(NamedTuple):
    """What the mixture is made of, for each token."""

    hidden: jax.Array  # [..., width]
    candidates: jax.Array  # int32[..., contexts]
    gates: jax.Array  # float32[..., 1 + contexts]: log-probabilities, first that of the softmax


class Gates(nnx.Module):
    """Log-probabilities float32[..., 1 + contexts] of hidden states and features; even at the start."""

    def __init__(self, width: int, features: int, contexts: int, rngs: nnx.Rngs):
        self.hidden = param.named(jnp.zeros((width, 1 + contexts), jnp.float32), ("embed", "norm"))
        self.up = param.kernel(rngs, (features, _HIDDEN), ("norm", "norm"))
        self.up_bias = param.zeros(_HIDDEN, "norm")
        self.down = param.named(jnp.zeros((_HIDDEN, 1 + contexts), jnp.float32), ("norm", "norm"))
        self.bias = param.zeros(1 + contexts, "norm")

    def __call__(self, hidden, features, there):
        up = jax.nn.relu(features @ self.up[...] + self.up_bias[...])
        scores = hidden.astype(jnp.float32) @ self.hidden[...] + up @ self.down[...] + self.bias[...]
        possible = jnp.concatenate([jnp.ones_like(there[..., :1]), there], -1)
        return jax.nn.log_softmax(jnp.where(possible, scores, _NEVER), -1)


class CopyingDecoder(Decoder):
    """A `Decoder` for a `starting.CopyingConfig`. Hidden states are `Copied`; caches also hold the texts' ids.

    Parameters beside the decoder's: `copying` [contexts x width + features, width], and `gates`, within `head` because
    they learn at its rate.
    """

    def __init__(self, config, vocab_size: int, dtype: str, rngs: nnx.Rngs):
        super().__init__(config, vocab_size, dtype, rngs)
        contexts = len(config.copying)
        features = 3 * contexts + contexts * (contexts - 1) // 2
        inputs = (contexts * config.width + features, config.width)
        self.copying = param.named(jnp.zeros(inputs, jnp.float32), ("norm", "embed"))
        self.gates = nnx.Dict(head=Gates(config.width, features, contexts, rngs))

    def run(self, tokens, segments=None, positions=None, keys=None, *, matches=None, **beside):
        if matches is None:
            here = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            matches = found(tokens, here, self.config.copying, segments)
        hidden, sums = super().run(tokens, segments, positions, keys, added=self._added(matches), **beside)
        return self._copied(hidden, matches), sums

    def extend(self, tokens, positions, caches, *, real=None, rows=None, **beside):
        caches, texts = caches
        lines = (jnp.arange(len(tokens)) if rows is None else rows)[:, None]
        places = positions if real is None else jnp.where(real, positions, texts.shape[2])  # beyond the end: dropped
        texts = texts.at[0, lines, places].set(tokens, mode="drop")
        matches = found(texts[0] if rows is None else texts[0][rows], positions, self.config.copying)
        hidden, caches = super().extend(
            tokens, positions, caches, real=real, rows=rows, added=self._added(matches), **beside
        )
        return self._copied(hidden, matches), (caches, texts)

    def empty_caches(self, batch: int, length: int):
        return super().empty_caches(batch, length), jnp.zeros((1, batch, length), jnp.int32)

    def logits(self, hidden: Copied):
        """Logarithms of the mixture, float32[..., vocab]: its softmax is itself."""
        own = jax.nn.log_softmax(super().logits(hidden.hidden), -1)
        gates = jnp.exp(hidden.gates[..., 1:])
        copied = (jax.nn.one_hot(hidden.candidates, self.vocab_size) * COPIED * gates[..., None]).sum(-2)
        copied += (1 - COPIED) / self.vocab_size * gates.sum(-1, keepdims=True)
        return jnp.logaddexp(own + hidden.gates[..., :1], jnp.log(copied))

    def nll(self, hidden: Copied, targets, weights, of=None):
        products, head, vocab_first = self._products(hidden.hidden)
        total = losses.chunked_nll(
            products, head, targets, weights, vocab_first=vocab_first, of=of or mixed,
            parts=self._parts(hidden, targets), **self._loss_form(),
        )  # fmt: skip
        return total, weights.sum()

    def objective(self, hidden: Copied, targets, weights):
        """`nll` and `OWN` times that of the softmax alone: what training minimises."""
        return self.nll(hidden, targets, weights, mixed_and_own)

    def token_nll(self, hidden: Copied, targets):
        return mixed(super().token_nll(hidden.hidden, targets), *self._parts(hidden, targets))

    def token_scores(self, hidden: Copied, targets):
        nll = self.token_nll(hidden, targets)
        return nll, self.logits(hidden).argmax(-1) == targets

    def _parts(self, hidden: Copied, targets):
        """(log of the softmax's gate, log of what the others give the target), float32[B, T] each."""
        even = (1 - COPIED) / self.vocab_size
        right = jnp.where(hidden.candidates == targets[..., None], jnp.log(COPIED + even), jnp.log(even))
        return hidden.gates[..., 0], jax.nn.logsumexp(hidden.gates[..., 1:] + right, -1)

    def _copied(self, hidden, matches) -> Copied:
        there = matches[..., 2] > 0
        return Copied(hidden, matches[..., 0], self.gates.head(hidden, features(matches), there))

    def _added(self, matches):
        candidates, there = matches[..., 0], matches[..., 2] > 0
        embedded = jnp.where(there[..., None], lora.look_up(self, candidates, self.dtype), 0)
        embedded = embedded.reshape(*candidates.shape[:-1], -1)
        inputs = jnp.concatenate([embedded, features(matches).astype(self.dtype)], -1)
        return linear(inputs, self.copying[...])


def mixed(nll, gate, copied):
    """-log of the mixture: of the softmax's -log p(target), and `CopyingDecoder._parts`."""
    return -jnp.logaddexp(gate - nll, copied)


def mixed_and_own(nll, gate, copied):
    return mixed(nll, gate, copied) + OWN * nll


def features(matches):
    """float32[..., features] from 0 to 1: for each context, whether it was found, how often, and how near; for each
    two, whether they name the same token."""
    candidates, seen, distance = (matches[..., i] for i in range(3))
    there = distance > 0
    often = jnp.log1p(seen.astype(jnp.float32)) / jnp.log1p(MOST_SEEN)
    near = jnp.where(there, 1 - jnp.log(jnp.maximum(distance, 1).astype(jnp.float32)) / jnp.log(FARTHEST + 1.0), 0)
    first, second = jnp.triu_indices(candidates.shape[-1], 1)
    agree = (candidates[..., first] == candidates[..., second]) & there[..., first] & there[..., second]
    return jnp.concatenate([there, often, near, agree], -1).astype(jnp.float32)


def found(texts, here, contexts: tuple[int, ...], segments=None):
    """`matches.Matches.at` for tokens at `here` int32[B, T] of texts int32[B, L], which may go on beyond them.

    `segments` int32[B, L]: the documents of a row that holds several, where `here` is all of it.
    """
    places = jnp.arange(texts.shape[1])
    same = places < here[..., None]  # bool[B, T, L]: the earlier places that equal the last tokens so far
    if segments is not None:
        same &= segments[:, None] == segments[..., None]
    results = []
    for back in range(max(contexts)):
        earlier = here - back
        token = jnp.take_along_axis(texts, jnp.maximum(earlier, 0), 1)
        shifted = jnp.pad(texts, [(0, 0), (back, 0)], constant_values=-1)[:, : texts.shape[1]]
        same &= (token[..., None] == shifted[:, None]) & (earlier >= 0)[..., None]
        if segments is not None:
            same &= (jnp.take_along_axis(segments, jnp.maximum(earlier, 0), 1) == segments)[..., None]
        if back + 1 in contexts:
            last, seen = jnp.where(same, places, -1).max(-1), jnp.minimum(same.sum(-1), MOST_SEEN)
            there = (last >= 0) & (here - last <= FARTHEST)
            followed = jnp.take_along_axis(texts, last + 1, 1)
            results.append(jnp.where(there[..., None], jnp.stack([followed, seen, here - last], -1), 0))
    return jnp.stack(results, -2).astype(jnp.int32)
