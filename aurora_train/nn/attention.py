"""Attention with grouped keys (Ainslie et al. 2023), and the choice of its kernel, which is made once and reported."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aurora_train.errors import UserError
from aurora_train.nn import lora, param
from aurora_train.nn.attention_cached import attend
from aurora_train.nn.attention_kernels import Rule, cudnn, reference, xla
from aurora_train.nn.cpu.blocked import blocked
from aurora_train.nn.decoder_config import DecoderConfig, Layer
from aurora_train.nn.norms import Norm
from aurora_train.nn.positions import rotate
from aurora_train.nn.tracing import current, form_name, forms, platform

BACKENDS = {"reference": reference, "xla": xla, "cudnn": cudnn, "blocked": blocked}


class Context(NamedTuple):
    """Inputs that all layers share.

    With a cache, `segments` is unused, and `prefix` is bool[B, S] over positions.
    """

    positions: jax.Array  # int32[B, T]
    segments: jax.Array | None = None  # int32[B, T]
    rope: Any = ()  # for each of `DecoderConfig.ropes`: cosines and sines, float32[B, T, dims / 2] each
    prefix: jax.Array | None = None  # bool[B, T]: tokens that every token of their document sees
    memory: jax.Array | None = None  # [B, S, memory_width]: an encoder's output, for cross-attention
    memory_segments: jax.Array | None = None  # int32[B, S]: seen only by tokens with the same segment
    # [B, T, width] and [B, S, memory_width]: places of tokens and memory, added to what queries and keys are made of,
    # but not values (Carion et al. 2020)
    places: jax.Array | None = None
    memory_places: jax.Array | None = None
    real: jax.Array | None = None  # bool[B, T], with a cache: False for padding, which no state may take in
    rows: jax.Array | None = None  # int32[B], with a cache of more rows: which of them these are


class Choice(NamedTuple):
    """The attention kernel in use and why, for the log."""

    name: str
    reason: str


def choose_attention(config: DecoderConfig, dtype: str, mask: str = "causal") -> Choice:
    """The kernel for this platform, shape and mask. Raises UserError if the config asks for one that cannot run."""
    setting, target = config.attention, platform()
    if setting == "xla" and config.attention_softcap is not None:
        raise UserError(
            "the xla attention has no soft-cap",
            where="model.attention",
            why="model.attention_softcap is set",
            hint="model.attention=blocked or reference supports it",
        )
    obstacle = _cudnn_obstacle(config, dtype, target, mask)
    if setting == "cudnn":
        if obstacle:
            hint = "model.attention=auto takes the fastest that works"
            raise UserError("cuDNN attention cannot run here", where="model.attention", why=obstacle, hint=hint)
        return Choice("cudnn", "asked for by the config")
    if setting != "auto":
        return Choice(setting, "asked for by the config")
    if form_name() == "cpu":
        return Choice("blocked", "by blocks of queries, a form for CPU")
    if obstacle is None:
        return Choice("cudnn", "cuDNN flash attention serves this shape")
    if config.attention_softcap is not None:
        return Choice("reference", f"no cuDNN ({obstacle}), and xla has no soft-cap")
    return Choice("xla", f"no cuDNN ({obstacle})")


def _cudnn_obstacle(config, dtype, target, mask) -> str | None:
    """Why cuDNN cannot run this attention; None if it can."""
    dim = config.dim_per_head
    if target not in ("gpu", "cuda"):
        return f"the platform is {target}"
    if dtype == "float32":
        return "it needs bfloat16, and the compute dtype is float32"
    if config.attention_softcap is not None:
        return "it has no soft-cap"
    if dim % 8 or dim > 128:
        return f"it needs a head size of at most 128 in steps of 8, not {dim}"
    return None if current().target else _probe_cudnn(config, dtype, mask)


def _probe_cudnn(config, dtype, mask) -> str | None:
    """Compile and run the smallest cases with their gradient, because support depends on chip and cuDNN release."""
    query = jnp.ones((1, 128, config.heads, config.dim_per_head), dtype)
    key = jnp.ones((1, 128, config.num_kv_heads, config.dim_per_head), dtype)
    segments = jnp.ones((1, 128), jnp.int32)
    prefix = jnp.zeros((1, 128), bool) if mask == "prefix" else None
    try:
        for rule in dict.fromkeys(rule_of(config, row, mask) for row in config.rows):

            def total(q, rule=rule):
                return BACKENDS["cudnn"](q, key, key, rule, segments, prefix=prefix).astype(jnp.float32).sum()

            jax.jit(jax.grad(total))(query).block_until_ready()
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        return f"a probe failed: {str(error).splitlines()[0][:160]}"
    return None


def rule_of(config: DecoderConfig, row: Layer, mask: str) -> Rule:
    """The rule of a layer in a model with this mask. Cross-attention is bidirectional: keys are another sequence."""
    scale = config.attention_scale if config.attention_scale is not None else config.dim_per_head**-0.5
    return Rule(scale, row.window, config.attention_softcap, "bidirectional" if row.kind == "cross" else mask)


class Attention(nnx.Module):
    """[B, T, width] -> [B, T, width]. Kernels `query`, `key`, `value`, `out`; of kind full, window or cross.

    A cross layer takes keys and values from `Context.memory`; a token that may see none of it gets zeros.
    """

    def __init__(self, config: DecoderConfig, row: Layer, rngs: nnx.Rngs, *, backend: str, mask: str = "causal"):
        width, dim = config.width, config.dim_per_head
        self.heads, self.kv_heads, self.dim = config.heads, config.num_kv_heads, dim
        self.backend, self.rule, self.is_cross = backend, rule_of(config, row, mask), row.kind == "cross"
        rope = config.rope(row)
        self.rope = None if rope is None else config.ropes.index(rope)
        source = (config.memory_width or width) if self.is_cross else width
        self.query = param.kernel(rngs, (width, self.heads * dim), ("embed", "heads"))
        self.key = param.kernel(rngs, (source, self.kv_heads * dim), ("embed", "kv_heads"))
        self.value = param.kernel(rngs, (source, self.kv_heads * dim), ("embed", "kv_heads"))
        self.out = param.kernel(rngs, (self.heads * dim, width), ("heads", "embed"), gain=(2 * config.layers) ** -0.5)
        self.gated = config.attention_gate
        if self.gated:
            self.out_gate = param.kernel(rngs, (width, self.heads * dim), ("embed", "heads"))
        self.qkv_biased, self.out_biased = config.bias != "none", config.bias == "all"
        if self.qkv_biased:
            self.query_bias = param.zeros(self.heads * dim, "heads")
            self.key_bias = param.zeros(self.kv_heads * dim, "kv_heads")
            self.value_bias = param.zeros(self.kv_heads * dim, "kv_heads")
        if self.out_biased:
            self.out_bias = param.zeros(width, "embed")
        self.qk_norm = "head" if config.qk_norm is True else config.qk_norm
        if self.qk_norm:
            sizes = (dim, dim) if self.qk_norm == "head" else (self.heads * dim, self.kv_heads * dim)
            self.query_norm = Norm(sizes[0], "rmsnorm", config.norm_eps, config.norm_offset)
            self.key_norm = Norm(sizes[1], "rmsnorm", config.norm_eps, config.norm_offset)
        plain = ("out_gate",) if self.gated else ()
        lora.adapt(self, config.lora, ("query", "key", "value", "out"), rngs, place="attention", plain=plain)

    @staticmethod
    def tags(backend: str) -> tuple[str, ...]:
        """Every name that a plan may keep, in the order in which a layer makes them."""
        names = ["query", "key", "value"]
        names += ["attn_stats", "attn_probs"] if backend == "blocked" else []
        # cuDNN's kernel holds residuals that no tag can reach: nn/saving.py names them by the kernel's primitive.
        return (*names, "attn_flash" if backend == "cudnn" else "attn_out")

    @staticmethod
    def empty_cache(config: DecoderConfig, row: Layer, batch: int, length: int, dtype: str):
        """Zero keys and values for `length` positions, of a window for no more than it sees (`nn.attention_cached`);
        those of an encoder's output are not cached."""
        slots = length if row.window is None else min(length, row.window)
        shape = (batch, config.num_kv_heads, slots, config.dim_per_head)
        dtype = forms().cache_dtype(dtype)
        return {} if row.kind == "cross" else {name: jnp.zeros(shape, dtype) for name in ("key", "value")}

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, context: Context, cache=None):
        """Returns (output, cache). `cache`: {"key", "value"} of [B, kv_heads, S, head_dim] (`nn.attention_cached`)."""
        source = _memory(context) if self.is_cross else x
        query = self._project(_placed(x, context.places), "query", self.heads)
        where = context.memory_places if self.is_cross else context.places
        key = self._project(_placed(source, where), "key", self.kv_heads)
        value = checkpoint_name(self._project(source, "value", self.kv_heads), "value")
        if self.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rope is not None:
            query, key = rotate(query, context.rope[self.rope]), rotate(key, context.rope[self.rope])
        query, key = checkpoint_name(query, "query"), checkpoint_name(key, "key")
        if self.is_cross:
            out = self._crossed(query, key, value, context)
        elif cache is None:
            out = BACKENDS[self.backend](query, key, value, self.rule, context.segments, prefix=context.prefix)
        else:
            out, cache = attend(query, key, value, cache, self.rule, context)
        flat = out.reshape(*x.shape[:-1], self.heads * self.dim)
        if self.gated:
            gate = checkpoint_name(lora.project(self, "out_gate", x), "attn_gate")
            flat = (flat * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(x.dtype)
        return lora.project(self, "out", flat, self.out_bias[...] if self.out_biased else None), cache

    def _crossed(self, query, key, value, context: Context):
        kernel, theirs = BACKENDS[self.backend], context.memory_segments
        if theirs is None:
            return kernel(query, key, value, self.rule)
        ours = jnp.ones(query.shape[:2], jnp.int32) if context.segments is None else context.segments
        out = kernel(query, key, value, self.rule, ours, theirs)
        sees = (ours[:, :, None] == theirs[:, None, :]).any(-1)
        return jnp.where(sees[:, :, None, None], out, 0)

    def _project(self, x, name, heads):
        bias = getattr(self, f"{name}_bias")[...] if self.qkv_biased else None
        y = lora.project(self, name, x, bias)
        if self.qk_norm == "projection" and name != "value":
            y = getattr(self, f"{name}_norm")(y)
        return y.reshape(*x.shape[:-1], heads, self.dim)


def _memory(context: Context) -> jax.Array:
    if context.memory is None:
        raise UserError(
            "a layer of kind cross reads an encoder's output, but the model was called without one",
            where="model.layer_table", hint="model(tokens, ..., memory=encoder(inputs)), or kind: full",
        )  # fmt: skip
    return context.memory


def _placed(x: jax.Array, places) -> jax.Array:
    return x if places is None else x + places.astype(x.dtype)
