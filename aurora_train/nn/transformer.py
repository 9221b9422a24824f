"""`Transformer`: tokens to hidden states, causal or not. It is an encoder by itself and the base of `Decoder`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.errors import UserError
from aurora_train.nn import lora, param
from aurora_train.nn.attention import Context, choose_attention
from aurora_train.nn.block import unit_maker
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.dropout import dropout
from aurora_train.nn.norms import Norm
from aurora_train.nn.positions import rope_table
from aurora_train.nn.stack import Stack

EMBEDDING_SITE = 0xE


class Transformer(nnx.Module):
    """tokens int32[B, T] -> hidden[B, T, width] in `dtype` ("float32" or "bfloat16"); parameters are float32.

    `mask`: which tokens of its document a token sees: "causal", "prefix" or "bidirectional". `attention`: the chosen
    kernel and why. Parameters: `embedding` [V, D], `positions` [max_length, D] if learned, `stack`, `final_norm`.
    """

    def __init__(self, config: DecoderConfig, vocab_size: int, dtype: str, rngs: nnx.Rngs, mask: str = "causal"):
        self.config, self.vocab_size, self.dtype, self.mask = config, vocab_size, dtype, mask
        self.attention = choose_attention(config, dtype, mask)
        self.embedding = param.table(rngs, (vocab_size, config.width), ("vocab", "embed"))
        if config.positions == "learned":
            self.positions = param.table(rngs, (config.max_length, config.width), ("positions", "embed"))
        make_unit, num_units = unit_maker(config, self.attention.name, mask)
        self.stack = Stack(make_unit, num_units, rngs)
        self.final_norm = Norm(config.width, config.norm, config.norm_eps, config.norm_offset)
        lora.adapt(self, config.lora, (), rngs, plain=(lora.TABLE,))

    def __call__(self, tokens, segments=None, positions=None, keys=None, **beside):
        """Final hidden states, without the sums: see `run`."""
        return self.run(tokens, segments, positions, keys, **beside)[0]

    def run(
        self, tokens, segments=None, positions=None, keys=None, *, prefix=None, memory=None, memory_segments=None,
        added=None,
    ):  # fmt: skip
        """Run the model. Returns (final hidden states, the layers' sums by name, as in `Stack`).

        Args:
            segments, positions: int32[B, T]; default to one document per row.
            keys: key[B], or None without dropout.
            prefix: bool[B, T], for mask "prefix": tokens that every token of their document sees.
            memory: [B, S, memory_width], an encoder's output, for layers of kind cross.
            memory_segments: int32[B, S]; tokens see the memory of their own segment. Padding has one of its own.
            added: [B, T, width], added to what the first layer reads of the tokens.
        """
        if (prefix is None) == (self.mask == "prefix"):
            what = "needs the prefix of each row" if prefix is None else f"has no prefix: its mask is {self.mask}"
            raise UserError(f"the model {what}", where="model", hint="Transformer(..., mask='prefix')(..., prefix=...)")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = dropout(self.embedded(tokens, positions, added), self.config.dropout, keys, EMBEDDING_SITE)
        context = make_context(self.config, positions, segments)
        context = context._replace(prefix=prefix, memory=memory, memory_segments=memory_segments)
        x, _, sums = self.stack(x, context, keys)
        return self.final_norm(x), sums

    @jax.named_scope("embedding")
    def embedded(self, tokens, positions, added=None):
        """What the first layer reads: [B, T, width] of tokens and positions int32[B, T], and what is `added`."""
        config = self.config
        x = lora.look_up(self, tokens, self.dtype)
        if config.embed_scale:
            x = x * jnp.asarray(config.width**0.5, self.dtype)
        if config.positions == "learned":
            x = x + self.positions[...][positions].astype(self.dtype)
        return x if added is None else x + added


def make_context(config: DecoderConfig, positions: jax.Array, segments, real=None, lasts=None) -> Context:
    """The inputs that all layers share, for any model built of these blocks. `real`, `lasts`: see `Decoder.extend`."""
    return Context(positions, segments, tuple(rope_table(positions, rope, real, lasts) for rope in config.ropes))
