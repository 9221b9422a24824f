"""Attention with grouped keys (Ainslie et al. 2023), and the choice of its kernel, made once and said aloud."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aurora_train.errors import UserError
from aurora_train.nn import lora, ops, param
from aurora_train.nn.attention_kernels import BACKENDS, Rule, masked_attention, visible
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.norms import Norm
from aurora_train.nn.platform import is_remote, platform
from aurora_train.nn.positions import rotate


class Context(NamedTuple):
    """What all layers share.

    With a cache, `positions` are also the cache slots, `segments` is unused, and `prefix` is of the slots, bool[B, S].
    """

    positions: jax.Array  # int32[B, T]
    segments: jax.Array | None = None  # int32[B, T]
    rope: Any = None  # cosines and sines, float32[B, T, head_dim / 2] each
    prefix: jax.Array | None = None  # bool[B, T]: tokens that all of their document see


class Choice(NamedTuple):
    """The attention kernel in use and why, for the log."""

    name: str
    reason: str


def choose_attention(config: DecoderConfig, dtype: str, mask: str = "causal") -> Choice:
    """The kernel for this platform, shape and mask. Raises UserError where an explicit wish cannot be met."""
    wish, target = config.attention, platform()
    if wish == "xla" and config.attention_softcap is not None:
        raise UserError(
            "the xla attention has no soft-cap",
            where="model.attention",
            why="model.attention_softcap is set",
            hint="model.attention=blocked or reference supports it",
        )
    obstacle = _cudnn_obstacle(config, dtype, target, mask)
    if wish == "cudnn":
        if obstacle:
            hint = "model.attention=auto takes the fastest that serves"
            raise UserError("cuDNN attention cannot run here", where="model.attention", why=obstacle, hint=hint)
        return Choice("cudnn", "asked for by the config")
    if wish != "auto":
        return Choice(wish, "asked for by the config")
    how = ops.OPERATIONS["attention"].forms
    if ops.form("attention") == "blocked":
        return Choice("blocked", how["blocked"])
    if obstacle is None:
        return Choice("cudnn", f"{how['cudnn']} serves this shape")
    if config.attention_softcap is not None:
        return Choice("reference", f"no cuDNN ({obstacle}), and xla has no soft-cap")
    return Choice("xla", f"no cuDNN ({obstacle})")


def _cudnn_obstacle(config, dtype, target, mask) -> str | None:
    """Why cuDNN cannot serve; None where it can."""
    dim = config.dim_per_head
    if target not in ("gpu", "cuda"):
        return f"the platform is {target}"
    if dtype == "float32":
        return "it needs bfloat16, the compute dtype is float32"
    if config.attention_softcap is not None:
        return "it has no soft-cap"
    if dim % 8 or dim > 128:
        return f"it needs a head size of at most 128 in steps of 8, not {dim}"
    return None if is_remote() else _probe_cudnn(config, dtype, mask)


def _probe_cudnn(config, dtype, mask) -> str | None:
    """Compile and run the smallest case, gradient included: support differs by chip and cuDNN release."""
    query = jnp.ones((1, 128, config.heads, config.dim_per_head), dtype)
    key = jnp.ones((1, 128, config.num_kv_heads, config.dim_per_head), dtype)
    segments = jnp.ones((1, 128), jnp.int32)
    prefix = jnp.zeros((1, 128), bool) if mask == "prefix" else None
    rule = Rule(1.0, config.window, mask=mask)

    def total(q):
        return BACKENDS["cudnn"](q, key, key, rule, segments, prefix=prefix).astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(total))(query).block_until_ready()
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        return f"a probe failed: {str(error).splitlines()[0][:160]}"
    return None


class Attention(nnx.Module):
    """[B, T, width] -> [B, T, width]. Kernels `query`, `key`, `value`, `out`; under a `mask` as `Rule` has it."""

    def __init__(self, config: DecoderConfig, window: int | None, backend: str, rngs: nnx.Rngs, mask="causal"):
        width, dim = config.width, config.dim_per_head
        self.heads, self.kv_heads, self.dim = config.heads, config.num_kv_heads, dim
        self.backend = backend
        scale = config.attention_scale if config.attention_scale is not None else dim**-0.5
        self.rule = Rule(scale, window, config.attention_softcap, mask)
        self.rotary = config.positions == "rope"
        self.query = param.kernel(rngs, (width, self.heads * dim), ("embed", "heads"))
        self.key = param.kernel(rngs, (width, self.kv_heads * dim), ("embed", "kv_heads"))
        self.value = param.kernel(rngs, (width, self.kv_heads * dim), ("embed", "kv_heads"))
        self.out = param.kernel(rngs, (self.heads * dim, width), ("heads", "embed"), gain=(2 * config.layers) ** -0.5)
        self.qkv_biased, self.out_biased = config.bias != "none", config.bias == "all"
        if self.qkv_biased:
            self.query_bias = param.zeros(self.heads * dim, "heads")
            self.key_bias = param.zeros(self.kv_heads * dim, "kv_heads")
            self.value_bias = param.zeros(self.kv_heads * dim, "kv_heads")
        if self.out_biased:
            self.out_bias = param.zeros(width, "embed")
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.query_norm = Norm(dim, "rmsnorm", config.norm_eps, config.norm_offset)
            self.key_norm = Norm(dim, "rmsnorm", config.norm_eps, config.norm_offset)
        lora.adapt(self, config.lora, ("query", "key", "value", "out"), rngs)

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, context: Context, cache=None):
        """Returns (output, cache). `cache`: {"key", "value"} of [B, S, kv_heads, head_dim], slot = position."""
        query = self._project(x, "query", self.heads)
        key = self._project(x, "key", self.kv_heads)
        value = checkpoint_name(self._project(x, "value", self.kv_heads), "value")
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary:
            query, key = rotate(query, context.rope), rotate(key, context.rope)
        query, key = checkpoint_name(query, "query"), checkpoint_name(key, "key")
        if cache is None:
            out = BACKENDS[self.backend](query, key, value, self.rule, context.segments, prefix=context.prefix)
        else:
            cache = _write(cache, key, value, context.positions)
            slots = jnp.arange(cache["key"].shape[1])[None]
            mask = visible(context.positions, slots, self.rule, prefix=context.prefix)
            out = masked_attention(query, cache["key"], cache["value"], self.rule, mask)
        flat = out.reshape(*x.shape[:-1], self.heads * self.dim)
        return lora.project(self, "out", flat, self.out_bias[...] if self.out_biased else None), cache

    def _project(self, x, name, heads):
        bias = getattr(self, f"{name}_bias")[...] if self.qkv_biased else None
        return lora.project(self, name, x, bias).reshape(*x.shape[:-1], heads, self.dim)


def _write(cache, key, value, positions):
    """Put the new keys and values in the slots of their positions; each row of the batch has its own."""
    rows = jnp.arange(positions.shape[0])[:, None]
    return {
        "key": cache["key"].at[rows, positions].set(key.astype(cache["key"].dtype)),
        "value": cache["value"].at[rows, positions].set(value.astype(cache["value"].dtype)),
    }
