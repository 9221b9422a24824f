"""One transformer block, and the unit the Stack repeats: a block, or a period of blocks with unlike windows."""

from __future__ import annotations

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aurora_train.nn.attention import Attention, Context
from aurora_train.nn.decoder_config import GATED, DecoderConfig
from aurora_train.nn.dropout import dropout
from aurora_train.nn.mlp import Mlp
from aurora_train.nn.norms import Norm

ATTENTION_SITE, MLP_SITE = 0, 1  # what tells apart the dropout masks of one layer


class Block(nnx.Module):
    """x[B, T, width] -> x plus attention plus MLP: in turn or in parallel, with sandwich norms if asked."""

    def __init__(self, config: DecoderConfig, window: int | None, backend: str, rngs: nnx.Rngs):
        def norm():
            return Norm(config.width, config.norm, config.norm_eps, config.norm_offset)

        self.parallel, self.post_norm, self.rate = config.parallel, config.post_norm, config.dropout
        self.tags = tags(config, backend)
        self.attn_norm = norm()
        self.attention = Attention(config, window, backend, rngs)
        self.mlp = Mlp(config, rngs)
        if not self.parallel:
            self.mlp_norm = norm()
        if self.post_norm:
            self.attn_post_norm = norm()
            self.mlp_post_norm = norm()

    def __call__(self, x: jax.Array, context: Context, index, keys=None, cache=None):
        """`index` is unused: `keys` are already folded with it. Returns (x, cache)."""
        normed = checkpoint_name(self.attn_norm(x), "attn_norm")
        attended, cache = self.attention(normed, context, cache)
        attended = checkpoint_name(attended, "attn_proj")
        if self.post_norm:
            attended = self.attn_post_norm(attended)
        attended = dropout(attended, self.rate, keys, ATTENTION_SITE)
        if not self.parallel:
            x = x + attended
            normed = checkpoint_name(self.mlp_norm(x), "mlp_norm")
        fed = checkpoint_name(self.mlp(normed), "mlp_out")
        if self.post_norm:
            fed = self.mlp_post_norm(fed)
        fed = dropout(fed, self.rate, keys, MLP_SITE)
        return (x + attended + fed if self.parallel else x + fed), cache


class Period(nnx.Module):
    """Blocks that differ only in their window, repeated as one unit (Gemma 2: local, global)."""

    def __init__(self, config: DecoderConfig, backend: str, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, window, backend, rngs) for window in config.layer_windows])
        self.tags = tags(config, backend)

    def __call__(self, x, context, index, keys=None, cache=None):
        caches = []
        for j, block in enumerate(self.blocks):
            block_keys = None if keys is None else jax.vmap(lambda key, j=j: jax.random.fold_in(key, j))(keys)
            x, out = block(x, context, index, block_keys, None if cache is None else cache[j])
            caches.append(out)
        return x, None if cache is None else caches


def unit_maker(config: DecoderConfig, backend: str):
    """(make_unit, number of units) for a Stack."""
    windows = config.layer_windows
    if len(set(windows)) == 1:
        return (lambda rngs: Block(config, windows[0], backend, rngs)), config.layers
    return (lambda rngs: Period(config, backend, rngs)), config.layers // len(windows)


def tags(config: DecoderConfig, backend: str) -> tuple[str, ...]:
    """Every name a plan may keep, in the order a block makes them."""
    names = ["attn_norm", "query", "key", "value"]
    names += ["attn_stats", "attn_probs"] if backend == "blocked" else []
    # cuDNN's kernel holds residuals of its own that no name reaches: nn/saving.py names them by the kernel.
    names += ["attn_flash" if backend == "cudnn" else "attn_out", "attn_proj"]
    names += [] if config.parallel else ["mlp_norm"]
    names += ["mlp_gate"] if config.activation in GATED else []
    return (*names, "mlp_up", "mlp_act", "mlp_out")
