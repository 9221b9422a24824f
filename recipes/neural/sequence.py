"""Models over continuous inputs, [B, T, features] -> [B, T, outputs], for objectives other than text.

They reuse Block and Stack, so plans, meshes and dropout keys apply unchanged. The causal ones also run one bin at a
time with `extend`, with the same result as for the whole sequence.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aurora_train.nn import param
from aurora_train.nn.attention import choose_attention
from aurora_train.nn.block import empty_caches, unit_maker
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.dropout import dropout
from aurora_train.nn.linear import linear
from aurora_train.nn.norms import Norm
from aurora_train.nn.stack import Stack
from aurora_train.nn.transformer import make_context

ENTRY_SITE = 0xE
GRU_SITE = 0


class _Sequence(nnx.Module):
    """Input projection, dropout, a Stack, a norm and an output projection. float32 out."""

    def _build(self, inputs_dim, outputs_dim, width, rate, dtype, rngs):
        self.rate, self.dtype = rate, dtype
        self.entry = param.kernel(rngs, (inputs_dim, width), ("inputs", "embed"))
        self.entry_bias = param.zeros(width, "embed")
        self.final_norm = Norm(width)
        self.exit = param.kernel(rngs, (width, outputs_dim), ("embed", "outputs"))
        self.exit_bias = param.zeros(outputs_dim, "outputs")

    def __call__(self, inputs, segments=None, positions=None, keys=None):
        """float32[B, T, F] -> float32[B, T, O]; an output sees its own segment only. `keys`: key[B] or None."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
        x = dropout(self._enter(inputs), self.rate, keys, ENTRY_SITE)
        x, _, _ = self.stack(x, self._context(positions, segments), keys)
        return self._leave(x)

    def extend(self, inputs, positions, caches):
        """Run further bins [B, T, F] at `positions` int32[B, T] on the caches so far. Returns (outputs, caches)."""
        x, caches, _ = self.stack(self._enter(inputs), self._context(positions, None), caches=caches)
        return self._leave(x), caches

    def _enter(self, inputs):
        return linear(inputs.astype(self.dtype), self.entry[...], self.entry_bias[...])

    def _leave(self, x):
        return linear(self.final_norm(x).astype(jnp.float32), self.exit[...], self.exit_bias[...])


class _Transformer(_Sequence):
    """A rotary, SwiGLU, pre-norm transformer; `window` bounds how many bins away a layer sees."""

    mask = "causal"

    def __init__(
        self,
        inputs_dim: int,
        outputs_dim: int,
        *,
        width: int,
        layers: int,
        heads: int,
        window: int | None = None,
        dropout: float = 0.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.config = DecoderConfig(width=width, layers=layers, heads=heads, window=window, dropout=dropout)
        self.attention = choose_attention(self.config, dtype, self.mask)
        self._build(inputs_dim, outputs_dim, width, dropout, dtype, rngs)
        make_unit, num_units = unit_maker(self.config, self.attention.name, self.mask)
        self.stack = Stack(make_unit, num_units, rngs)

    def _context(self, positions, segments):
        return make_context(self.config, positions, segments)


class CausalTransformer(_Transformer):
    """Output t sees inputs up to t; `window` bounds how many bins back a layer sees."""

    def empty_caches(self, batch: int, length: int):
        """Keys and values for `length` positions of every layer."""
        return empty_caches(self.config, self.stack, batch, length, self.dtype)


class BidirectionalTransformer(_Transformer):
    """Every output sees all inputs of its segment, so it cannot run one bin at a time."""

    mask = "bidirectional"


class CausalGRU(_Sequence):
    """Residual gated recurrent layers (Cho et al. 2014). The state is cleared where a position is 0."""

    def __init__(
        self,
        inputs_dim: int,
        outputs_dim: int,
        *,
        width: int,
        layers: int,
        dropout: float = 0.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.width = width
        self._build(inputs_dim, outputs_dim, width, dropout, dtype, rngs)
        self.stack = Stack(lambda rngs: GRULayer(width, dropout, rngs), layers, rngs)

    def empty_caches(self, batch: int, length: int = 0):
        """The initial state of every layer. `length` is unused, because a state does not grow."""
        return [jnp.zeros((part.stop - part.start, batch, self.width), jnp.float32) for part in self.stack.plan]

    def _context(self, positions, segments):
        return positions


class GRULayer(nnx.Module):
    """x + GRU(norm(x)), with the reset gate after the recurrent product, as in cuDNN and torch."""

    tags = ("gru_norm", "gru_gates")

    def __init__(self, width: int, rate: float, rngs: nnx.Rngs):
        self.rate = rate
        self.norm = Norm(width)
        self.input = param.kernel(rngs, (width, 3 * width), ("embed", "mlp"))
        self.recurrent = param.kernel(rngs, (width, 3 * width), ("embed", "mlp"))
        self.input_bias = param.zeros(3 * width, "mlp")
        self.recurrent_bias = param.zeros(3 * width, "mlp")

    def __call__(self, x, positions, index, keys=None, cache=None):
        normed = checkpoint_name(self.norm(x), "gru_norm")
        gates = linear(normed, self.input[...], self.input_bias[...])
        gates = checkpoint_name(gates.astype(jnp.float32), "gru_gates")
        recurrent, bias = self.recurrent[...], self.recurrent_bias[...]

        def step(state, inputs):
            gates, starts = inputs
            state = jnp.where(starts[:, None], 0.0, state)
            held = state @ recurrent + bias
            reset_x, update_x, new_x = jnp.split(gates, 3, -1)
            reset_h, update_h, new_h = jnp.split(held, 3, -1)
            update = jax.nn.sigmoid(update_x + update_h)
            new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * new_h)
            state = (1 - update) * new + update * state
            return state, state

        start = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32) if cache is None else cache
        state, outputs = jax.lax.scan(step, start, (gates.swapaxes(0, 1), (positions == 0).T))
        outputs = dropout(outputs.swapaxes(0, 1).astype(x.dtype), self.rate, keys, GRU_SITE)
        return x + outputs, None if cache is None else state
