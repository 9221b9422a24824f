"""`Decoder`: a language model whose config covers GPT-2, Llama, Mistral, Qwen and Gemma 2 shapes.

A call returns the final hidden states; `nll` and `token_nll` compute logits a chunk at a time, and only `logits` holds
all of them.
"""

from __future__ import annotations

import jax
from flax import nnx

from aurora_train.errors import UserError
from aurora_train.nn import lora, losses, param
from aurora_train.nn.block import empty_caches
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.tracing import forms
from aurora_train.nn.transformer import Transformer, make_context


class Decoder(Transformer):
    """A `Transformer`, causal by default, with an output head over a vocabulary: `head` [D, V], unless it is tied."""

    def __init__(self, config: DecoderConfig, vocab_size: int, dtype: str, rngs: nnx.Rngs, mask: str = "causal"):
        super().__init__(config, vocab_size, dtype, rngs, mask)
        if not config.tied:
            self.head = param.kernel(rngs, (config.width, vocab_size), ("embed", "vocab"))
            lora.adapt(self, config.lora, (), rngs, plain=("head",))

    def extend(
        self, tokens, positions, caches, *, prefix=None, memory=None, memory_segments=None, real=None, lasts=None,
        rows=None, added=None,
    ):  # fmt: skip
        """A call with a cache: tokens[B, T] at `positions` int32[B, T] see all cached earlier tokens of their row.

        Args:
            prefix: bool[B, S] over positions. All of a prefix is read in one call, for its tokens see each other.
            real: bool[B, T], False for the padding at the end of a row.
            lasts: int32[B], the last position of each row's text, if a text is read by parts: longrope turns by it.
            rows: int32[B], the row of each text in the caches, if those have more.
            added: see `run`.

        Returns (hidden, caches). UserError for a bidirectional model.
        """
        if self.mask == "bidirectional":
            raise UserError("a bidirectional model reads a whole text at once and cannot continue one", where="model")
        if self.mask == "prefix" and prefix is None:
            raise UserError("the model needs the prefix of each row", where="model", hint="extend(..., prefix=...)")
        x, context = self.embedded(tokens, positions, added), make_context(self.config, positions, None, real, lasts)
        context = context._replace(rope=forms().kept(context.rope), real=real, rows=rows)
        context = context._replace(prefix=prefix, memory=memory, memory_segments=memory_segments)
        x, caches, _ = self.stack(x, context, caches=caches)
        return self.final_norm(x), caches

    def empty_caches(self, batch: int, length: int):
        """Caches of every layer before the first token, for texts of up to `length` positions."""
        return empty_caches(self.config, self.stack, batch, length, self.dtype)

    def logits(self, hidden):
        """float32[..., vocab]."""
        return losses.logits_of(*self._products(hidden), self.config.logit_softcap)

    @jax.named_scope("loss")
    def nll(self, hidden, targets, weights):
        """(sum of weights x -log p(target), sum of weights), float32 scalars."""
        products, head, vocab_first = self._products(hidden)
        total = losses.chunked_nll(products, head, targets, weights, vocab_first=vocab_first, **self._loss_form())
        return total, weights.sum()

    def token_nll(self, hidden, targets):
        """-log p(target) of each token, float32[B, T]."""
        products, head, vocab_first = self._products(hidden)
        return losses.token_nll(products, head, targets, vocab_first=vocab_first, **self._loss_form())

    def token_scores(self, hidden, targets):
        """(-log p(target) float32[B, T], whether the target is the likeliest token, bool[B, T])."""
        products, head, vocab_first = self._products(hidden)
        return losses.token_scores(products, head, targets, vocab_first=vocab_first, **self._loss_form())

    def _loss_form(self):
        return {
            "softcap": self.config.logit_softcap,
            "chunk": losses.chunk_tokens(self.config.loss_chunk, self.vocab_size),
        }

    def _products(self, hidden):
        """(hidden, head, vocab_first) as `nn.losses` takes them, with the product of an adapter where there is one."""
        name, vocab_first = (lora.TABLE, True) if self.config.tied else ("head", False)
        if name in self.turned:
            return hidden, getattr(self, name + lora.TURNED)[...], True
        return *lora.head_products(self, name, hidden, vocab_first), vocab_first
