"""Gated DeltaNet (Yang et al. 2025), the linear attention of Qwen 3.5: a state of fixed size instead of all keys.

A head's state S [key_dim, value_dim] follows, token by token,

    S <- exp(g) S;   S <- S + k (beta (v - k S))^T;   out = q S

with k and q of unit length, g <= 0 and 0 < beta < 1. A document begins with S = 0, so packed documents do not see each
other. `chunked` computes the same for 64 tokens at a time by matrix products (section 3.3, the WY form of Yang et al.
2024); `recurrent` is the definition above, for one token after another, and for tests.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aurora_train.errors import UserError
from aurora_train.nn import lora, param
from aurora_train.nn.decoder_config import DecoderConfig, Layer
from aurora_train.nn.linear import linear
from aurora_train.nn.norms import Norm

CHUNK = 64
_UNIT_EPS = 1e-6  # inside the root of a length, as in the published code


class DeltaNet(nnx.Module):
    """[B, T, width] -> [B, T, width]. Kernels `query`, `key`, `value`, `out_gate`, `out`; causal by nature.

    Beside them: `write` and `forget` (width, value_heads), from which beta and g follow; `forget_rate` and
    `forget_bias` [value_heads]; `conv` [taps, channels], a causal convolution of queries, keys and values over time.
    """

    tags = ("delta_out",)

    def __init__(self, config: DecoderConfig, row: Layer, rngs: nnx.Rngs, *, backend: str, mask: str = "causal"):
        if mask != "causal":
            raise UserError(f"a layer of kind linear is causal, and the model's mask is {mask}", where="model")
        width, shape = config.width, config.linear
        self.shape = shape
        keys, values = shape.key_heads * shape.key_dim, shape.value_heads * shape.value_dim
        self.query = param.kernel(rngs, (width, keys), ("embed", "heads"))
        self.key = param.kernel(rngs, (width, keys), ("embed", "heads"))
        self.value = param.kernel(rngs, (width, values), ("embed", "heads"))
        self.out_gate = param.kernel(rngs, (width, values), ("embed", "heads"))
        self.out = param.kernel(rngs, (values, width), ("heads", "embed"), gain=(2 * config.layers) ** -0.5)
        self.write = param.kernel(rngs, (width, shape.value_heads), ("embed", "value_heads"))
        self.forget = param.kernel(rngs, (width, shape.value_heads), ("embed", "value_heads"))
        self.forget_rate = param.named(jnp.log(jnp.linspace(1.0, 16.0, shape.value_heads)), ("norm",))
        self.forget_bias = param.ones(shape.value_heads, "norm")
        self.conv = param.kernel(rngs, (shape.taps, 2 * keys + values), ("norm", "heads"))
        self.norm = Norm(shape.value_dim, "rmsnorm", config.norm_eps)
        lora.adapt(self, config.lora, ("query", "key", "value", "out"), rngs, place="linear", plain=("out_gate",))

    @staticmethod
    def empty_cache(config: DecoderConfig, row: Layer, batch: int, length: int, dtype: str):
        """The inputs of the convolution before the first token, and the state: zeros, whatever the length."""
        shape = config.linear
        channels = 2 * shape.key_heads * shape.key_dim + shape.value_heads * shape.value_dim
        return {
            "conv": jnp.zeros((batch, shape.taps - 1, channels), dtype),
            "state": jnp.zeros((batch, shape.value_heads, shape.key_dim, shape.value_dim), jnp.float32),
        }

    @jax.named_scope("delta")
    def __call__(self, x: jax.Array, context, cache=None):
        """Returns (output, cache). With a cache, a text begins at position 0, and what is not `context.real` leaves the
        cache as it was."""
        shape, lead = self.shape, x.shape[:2]
        projected = jnp.concatenate([lora.project(self, name, x) for name in ("query", "key", "value")], -1)
        before, state = (None, None) if cache is None else self._so_far(cache, context)
        mixed = jax.nn.silu(convolve(projected, self.conv[...], context.segments, before).astype(jnp.float32))
        keys = shape.key_heads * shape.key_dim
        query, key, value = jnp.split(mixed, (keys, 2 * keys), -1)
        query, key = (_unit(a.reshape(*lead, shape.key_heads, shape.key_dim)) for a in (query, key))
        repeats = shape.value_heads // shape.key_heads
        query, key = (jnp.repeat(a, repeats, 2) for a in (query * shape.key_dim**-0.5, key))
        value = value.reshape(*lead, shape.value_heads, shape.value_dim)
        beta = jax.nn.sigmoid(linear(x, self.write[...], wide=True).astype(jnp.float32))
        forget = linear(x, self.forget[...], wide=True).astype(jnp.float32) + self.forget_bias[...]
        log_decay = -jnp.exp(self.forget_rate[...].astype(jnp.float32)) * jax.nn.softplus(forget)
        if context.real is not None:
            beta, log_decay = (jnp.where(context.real[..., None], a, 0) for a in (beta, log_decay))
        form = chunked if cache is None or lead[1] > 1 else recurrent  # of one token, its definition is the least work
        out, state = form(query, key, value, log_decay, beta, starts(context.segments), state)
        if cache is not None:
            now, rows = {"conv": _last_inputs(before, projected, context.real), "state": state}, context.rows
            cache = now if rows is None else {name: cache[name].at[rows].set(new) for name, new in now.items()}
        out = checkpoint_name(out.astype(x.dtype), "delta_out")
        gate = lora.project(self, "out_gate", x).reshape(value.shape).astype(jnp.float32)
        out = (self.norm(out).astype(jnp.float32) * jax.nn.silu(gate)).astype(x.dtype)
        return lora.project(self, "out", out.reshape(*lead, -1)), cache

    @staticmethod
    def _so_far(cache, context):
        """(the last inputs of the convolution, the state) of each row: zeros where a text begins."""
        begins = context.positions[:, 0] == 0
        if context.real is not None:
            begins &= context.real[:, 0]
        own = (cache[name] if context.rows is None else cache[name][context.rows] for name in ("conv", "state"))
        return (jnp.where(begins.reshape(-1, *[1] * (a.ndim - 1)), 0, a) for a in own)


def convolve(x: jax.Array, taps: jax.Array, segments, before=None) -> jax.Array:
    """A causal convolution of each channel of x[B, T, C] with taps[K, C]; the last tap is the token itself.

    It does not reach over the beginning of a document. `before`: [B, K - 1, C], the inputs before the first token.
    """
    reach, length = taps.shape[0] - 1, x.shape[1]
    before = jnp.zeros((x.shape[0], reach, x.shape[2]), x.dtype) if before is None else before.astype(x.dtype)
    whole, y = jnp.concatenate([before, x], 1), 0
    for back in range(reach + 1):
        part = whole[:, reach - back : reach - back + length]
        if segments is not None and back:
            there = jnp.pad(segments, ((0, 0), (back, 0)), constant_values=-1)[:, :length]
            part = jnp.where((there == segments)[..., None], part, 0)
        y = y + part * taps[reach - back].astype(x.dtype)
    return y


def _last_inputs(before: jax.Array, x: jax.Array, real) -> jax.Array:
    """The last inputs of the convolution of each row after its real tokens."""
    reach = before.shape[1]
    whole = jnp.concatenate([before, x.astype(before.dtype)], 1)
    count = jnp.full(x.shape[0], x.shape[1]) if real is None else real.sum(-1)
    return jnp.take_along_axis(whole, (count[:, None] + jnp.arange(reach))[..., None], 1)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + _UNIT_EPS)


def starts(segments) -> jax.Array | None:
    """bool[B, T]: the tokens before which the state is emptied; None if there are none."""
    if segments is None:
        return None
    return jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))


def chunked(query, key, value, log_decay, beta, begins=None, state=None):
    """(out float32[B, T, H, V], the state after the last token float32[B, H, K, V]).

    Args:
        query, key: float32[B, T, H, K].
        value: float32[B, T, H, V].
        log_decay, beta: float32[B, T, H].
        begins: bool[B, T], tokens before which the state is emptied, or None.
        state: the state before the first token; zeros by default.
    """
    batch, length, heads, _ = query.shape
    size = min(CHUNK, length)
    pad = -length % size
    begins = jnp.zeros((batch, length), bool) if begins is None else begins

    def chunks(x):  # [B, T, H, ...] -> [N, B, H, C, ...]; what is padded writes nothing and forgets nothing
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(batch, -1, size, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)

    inputs = [chunks(x) for x in (query, key, value, log_decay, beta)]
    documents = jnp.cumsum(chunks(jnp.broadcast_to(begins[..., None], (batch, length, 1))), -1)  # number within a chunk
    if state is None:
        state = jnp.zeros((batch, heads, key.shape[-1], value.shape[-1]), jnp.float32)
    state, out = jax.lax.scan(_chunk, state, (*inputs, documents))
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1).reshape(batch, -1, heads, value.shape[-1])
    return out[:, :length], state


def _chunk(state, inputs):
    """One chunk: [B, H, C, ...] each. A token sees earlier ones of its document, and the state if that is still it."""
    query, key, value, log_decay, beta, document = inputs
    total = jnp.cumsum(log_decay, -1)
    size = total.shape[-1]
    sees = jnp.tril(jnp.ones((size, size), bool)) & (document[..., :, None] == document[..., None, :])
    decay = jnp.exp(jnp.where(sees, total[..., :, None] - total[..., None, :], -jnp.inf))
    from_state = jnp.where(document == 0, jnp.exp(total), 0)[..., None]
    written = beta[..., None] * key
    system = jnp.where(jnp.eye(size, dtype=bool), 1, jnp.einsum("...ik,...jk->...ij", written, key) * decay)
    wanted = beta[..., None] * value - (written * from_state) @ state
    new = jax.scipy.linalg.solve_triangular(system, wanted, lower=True, unit_diagonal=True)
    out = (query * from_state) @ state + (jnp.einsum("...ik,...jk->...ij", query, key) * decay) @ new
    last = document[..., -1:]
    to_end = jnp.where(document == last, jnp.exp(total[..., -1:] - total), 0)[..., None]
    kept = jnp.where(last == 0, jnp.exp(total[..., -1:]), 0)[..., None]
    return state * kept + jnp.einsum("...ck,...cv->...kv", key * to_end, new), out


def recurrent(query, key, value, log_decay, beta, begins=None, state=None):
    """The same as `chunked`, one token at a time: the definition."""
    batch, length, heads, _ = query.shape
    begins = jnp.zeros((batch, length), bool) if begins is None else begins
    if state is None:
        state = jnp.zeros((batch, heads, key.shape[-1], value.shape[-1]), query.dtype)

    def token(state, now):
        query, key, value, log_decay, beta, begins = now
        state = jnp.where(begins[:, None, None, None], 0, state * jnp.exp(log_decay)[..., None, None])
        error = value - jnp.einsum("bhk,bhkv->bhv", key, state)
        state = state + jnp.einsum("bhk,bhv->bhkv", key, beta[..., None] * error)
        return state, jnp.einsum("bhk,bhkv->bhv", query, state)

    inputs = (query, key, value, log_decay, beta, begins)
    state, out = jax.lax.scan(token, state, tuple(jnp.moveaxis(x, 1, 0) for x in inputs))
    return jnp.moveaxis(out, 0, 1), state
