"""One transformer block, and the unit that the Stack repeats: a block, or a period of blocks, one per row of the table.

A block mixes tokens (by attention or a recipe's own layer kind) and then feeds each through an MLP. The mixer is called
as `out, cache = mixer(x, context, cache)`, and returns its sums as a third value if it reports any.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aurora_train.nn.attention import Attention, Context
from aurora_train.nn.decoder_config import GATED, KINDS, LINEAR, DecoderConfig, Layer
from aurora_train.nn.delta import DeltaNet
from aurora_train.nn.dropout import dropout
from aurora_train.nn.mlp import Mlp
from aurora_train.nn.norms import Norm
from aurora_train.nn.stack import Stack

ATTENTION_SITE, MLP_SITE = 0, 1  # distinguish the dropout masks of one layer


class Block(nnx.Module):
    """x[B, T, width] -> x plus attention plus MLP, in sequence or in parallel, with norms where the config has them."""

    def __init__(self, config: DecoderConfig, row: Layer, rngs: nnx.Rngs, *, backend: str, mask: str = "causal"):
        def norm():
            return Norm(config.width, config.norm, config.norm_eps, config.norm_offset)

        self.parallel, self.rate, self.has_mlp = config.parallel, config.dropout, row.mlp
        self.pre_norm, self.post_norm = config.norms
        self.sum_norm = config.norm_place == "sum"
        self.tags = tags(config, row, backend)
        self.mixer = "attention" if row.kind in KINDS else row.kind  # the name of its parameters
        if self.pre_norm:
            self.attn_norm = norm()
        setattr(self, self.mixer, mixer_of(config, row)(config, row, rngs, backend=backend, mask=mask))
        if self.post_norm:
            self.attn_post_norm = norm()
        if self.sum_norm:
            self.attn_sum_norm = norm()
        if not self.has_mlp:
            return
        self.mlp = Mlp(config, rngs)
        if self.sum_norm:
            self.mlp_sum_norm = norm()
        if self.pre_norm and not self.parallel:
            self.mlp_norm = norm()
        if self.post_norm:
            self.mlp_post_norm = norm()

    def __call__(self, x: jax.Array, context: Context, index, keys=None, cache=None):
        """`index` is unused: `keys` are already folded with it. Returns (x, cache), and sums if the mixer does."""
        normed = checkpoint_name(self.attn_norm(x), "attn_norm") if self.pre_norm else x
        attended, cache, *sums = getattr(self, self.mixer)(normed, context, cache)
        attended = checkpoint_name(attended, "attn_proj")
        if self.post_norm:
            attended = self.attn_post_norm(attended)
        attended = dropout(attended, self.rate, keys, ATTENTION_SITE)
        if not self.has_mlp:
            return self._attended(x, attended), cache, *sums
        if not self.parallel:
            x = self._attended(x, attended)
            normed = checkpoint_name(self.mlp_norm(x), "mlp_norm") if self.pre_norm else x
        fed = checkpoint_name(self.mlp(normed), "mlp_out")
        if self.post_norm:
            fed = self.mlp_post_norm(fed)
        fed = dropout(fed, self.rate, keys, MLP_SITE)
        x = x + attended + fed if self.parallel else x + fed
        return (self.mlp_sum_norm(x) if self.sum_norm else x), cache, *sums

    def _attended(self, x, attended):
        return self.attn_sum_norm(x + attended) if self.sum_norm else x + attended


class Period(nnx.Module):
    """Blocks with different rows, repeated as one unit (Gemma 2: local, global)."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, backend: str, mask: str):
        self.blocks = nnx.List([Block(config, row, rngs, backend=backend, mask=mask) for row in config.rows])
        self.tags = tuple(dict.fromkeys(tag for block in self.blocks for tag in block.tags))

    def __call__(self, x, context, index, keys=None, cache=None):
        caches, sums = [], {}
        for j, block in enumerate(self.blocks):
            block_keys = None if keys is None else jax.vmap(lambda key, j=j: jax.random.fold_in(key, j))(keys)
            x, out, *reported = block(x, context, index, block_keys, None if cache is None else cache[j])
            caches.append(out)
            for name, value in (reported[0] if reported else {}).items():
                sums[name] = sums[name] + value if name in sums else value
        return x, None if cache is None else caches, sums


def mixer_of(config: DecoderConfig, row: Layer):
    """The class that mixes a layer's tokens: attention, or the config's class for its kind."""
    if row.kind == LINEAR:
        return DeltaNet
    return Attention if row.kind in KINDS else config.mixers[row.kind]


def unit_maker(config: DecoderConfig, backend: str, mask: str = "causal"):
    """(make_unit, number of units) for a Stack with this mask (`attention_kernels.Rule`)."""
    rows = config.rows
    if all(row == rows[0] for row in rows):
        return (lambda rngs: Block(config, rows[0], rngs, backend=backend, mask=mask)), config.layers
    return (lambda rngs: Period(config, rngs, backend=backend, mask=mask)), config.layers // len(rows)


def empty_caches(config: DecoderConfig, stack: Stack, batch: int, length: int, dtype: str) -> list:
    """The initial caches, for `length` positions, of each segment of the Stack of `unit_maker`."""
    rows = config.rows[: config.layers // stack.num_units]
    caches = [mixer_of(config, row).empty_cache(config, row, batch, length, dtype) for row in rows]
    one = caches if len(rows) > 1 else caches[0]
    counts = [segment.stop - segment.start for segment in stack.plan]
    return [jax.tree.map(lambda a, n=count: jnp.tile(a, (n, *[1] * a.ndim)), one) for count in counts]


def tags(config: DecoderConfig, row: Layer, backend: str) -> tuple[str, ...]:
    """Every name that a plan may keep, in the order in which a block makes them."""
    mixer = mixer_of(config, row)
    inside = mixer.tags(backend) if row.kind in KINDS else getattr(mixer, "tags", ())
    names = ["attn_norm"] if config.norms[0] else []
    names += [*inside, *(["attn_gate"] if config.attention_gate and row.kind in KINDS else []), "attn_proj"]
    if not row.mlp:
        return tuple(names)
    names += ["mlp_norm"] if config.norms[0] and not config.parallel else []
    names += ["mlp_gate"] if config.activation in GATED else []
    return (*names, "mlp_up", "mlp_act", "mlp_out")
