"""`Decoder`: a causal language model whose config covers GPT-2, Llama, Mistral, Qwen and Gemma 2 shapes.

Calling it gives the final hidden states; logits are formed by `nll` and `token_nll` a chunk at a time, and only
`logits` holds them all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.nn import losses, param
from aurora_train.nn.attention import Context, choose_attention
from aurora_train.nn.block import unit_maker
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.dropout import dropout
from aurora_train.nn.norms import Norm
from aurora_train.nn.positions import rope_frequencies, rope_table
from aurora_train.nn.stack import Stack

EMBEDDING_SITE = 0xE


class Decoder(nnx.Module):
    """tokens int32[B, T] -> hidden[B, T, width] in `dtype` ("float32" or "bfloat16"); parameters are float32.

    `attention` says which kernel was chosen and why. Parameters: `embedding` [V, D], `head` [D, V] unless tied,
    `positions` [max_length, D] if learned, `stack`, `final_norm`.
    """

    def __init__(self, config: DecoderConfig, vocab_size: int, dtype: str, rngs: nnx.Rngs):
        self.config, self.vocab_size, self.dtype = config, vocab_size, dtype
        self.attention = choose_attention(config, dtype)
        self.embedding = param.table(rngs, (vocab_size, config.width), ("vocab", "embed"))
        if config.positions == "learned":
            self.positions = param.table(rngs, (config.max_length, config.width), ("positions", "embed"))
        make_unit, num_units = unit_maker(config, self.attention.name)
        self.stack = Stack(make_unit, num_units, rngs)
        self.final_norm = Norm(config.width, config.norm, config.norm_eps, config.norm_offset)
        if not config.tied:
            self.head = param.kernel(rngs, (config.width, vocab_size), ("embed", "vocab"))

    def __call__(self, tokens, segments=None, positions=None, keys=None):
        """Final hidden states. `segments`, `positions` int32[B, T] default to one document a row; `keys`: key[B]."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, context = self._enter(tokens, positions, segments)
        x = dropout(x, self.config.dropout, keys, EMBEDDING_SITE)
        x, _, _ = self.stack(x, context, keys)
        return self.final_norm(x)

    def extend(self, tokens, positions, caches):
        """The same with a cache: tokens[B, T] at `positions` int32[B, T] see all cached earlier ones of their row.

        Returns (hidden, caches).
        """
        x, context = self._enter(tokens, positions, None)
        x, caches, _ = self.stack(x, context, caches=caches)
        return self.final_norm(x), caches

    def empty_caches(self, batch: int, length: int):
        """Keys and values for `length` positions of every layer, zero."""
        config = self.config
        shape = (self.stack.num_units, batch, length, config.num_kv_heads, config.dim_per_head)
        period = config.layers // self.stack.num_units
        layers = [{name: jnp.zeros(shape, self.dtype) for name in ("key", "value")} for _ in range(period)]
        return layers if period > 1 else layers[0]

    def logits(self, hidden):
        """float32[..., vocab]."""
        return losses.logits_of(hidden, *self._head(), self.config.logit_softcap)

    @jax.named_scope("loss")
    def nll(self, hidden, targets, weights):
        """(sum of weights x -log p(target), sum of weights), float32 scalars."""
        head, vocab_first = self._head()
        total = losses.chunked_nll(hidden, head, targets, weights, vocab_first=vocab_first, **self._loss_form())
        return total, weights.sum()

    def token_nll(self, hidden, targets):
        """-log p(target) of each token, float32[B, T]."""
        head, vocab_first = self._head()
        return losses.token_nll(hidden, head, targets, vocab_first=vocab_first, **self._loss_form())

    def _loss_form(self):
        return {
            "softcap": self.config.logit_softcap,
            "chunk": losses.chunk_tokens(self.config.loss_chunk, self.vocab_size),
        }

    def _head(self):
        return (self.embedding[...], True) if self.config.tied else (self.head[...], False)

    @jax.named_scope("embedding")
    def _enter(self, tokens, positions, segments):
        config = self.config
        x = self.embedding[...][tokens].astype(self.dtype)
        if config.embed_scale:
            x = x * jnp.asarray(config.width**0.5, self.dtype)
        if config.positions == "learned":
            x = x + self.positions[...][positions].astype(self.dtype)
        return x, make_context(config, positions, segments)


def make_context(config: DecoderConfig, positions: jax.Array, segments) -> Context:
    """What all layers share, for any model built of these blocks."""
    rope = None
    if config.positions == "rope":
        frequencies = rope_frequencies(config.dim_per_head, config.rope_theta, config.rope_scaling)
        rope = rope_table(positions, frequencies)
    return Context(positions, segments, rope)
