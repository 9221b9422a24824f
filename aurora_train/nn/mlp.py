"""The feed-forward half of a block, plain or gated (Shazeer 2020)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aurora_train.nn import lora, param
from aurora_train.nn.decoder_config import GATED, DecoderConfig
from aurora_train.nn.tracing import forms


def gelu(x):
    """x Phi(x), exact, through erf, because XLA vectorises erf but not erfc."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def gelu_tanh(x):
    """The tanh approximation of GPT-2 and Gemma (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1.0 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3)))


def silu(x):
    return x * jax.nn.sigmoid(x)


def relu2(x):
    """Squared ReLU (So et al. 2021)."""
    return jnp.square(jnp.maximum(x, 0))


PLAIN = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": jax.nn.relu, "relu2": relu2}
GATES = {"swiglu": silu, "geglu": gelu_tanh}


def lean(function):
    """`function` of arrays, which returns one float array, with a backward pass that keeps only its inputs."""
    form = forms()

    @jax.custom_vjp
    @functools.wraps(function)
    def wrapped(*inputs):
        return function(*inputs)

    def backward(inputs, g):
        return jax.vjp(function, *form.after(inputs, g))[1](g)

    wrapped.defvjp(lambda *inputs: (function(*inputs), inputs), backward)
    return wrapped


def activate(name: str, *inputs: jax.Array) -> jax.Array:
    """`inputs`: (up,) for a plain activation, (gate, up) for a gated one. float32 inside; keeps only its inputs."""

    def function(*inputs):
        wide = [x.astype(jnp.float32) for x in inputs]
        y = GATES[name](wide[0]) * wide[1] if name in GATED else PLAIN[name](wide[0])
        return y.astype(inputs[0].dtype)

    return lean(function)(*inputs)


class Mlp(nnx.Module):
    """[B, T, width] -> [B, T, width]. Kernels `up`, `down` and, gated, `gate`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        width, hidden = config.width, config.hidden_width
        self.activation = config.activation
        self.gated = config.activation in GATED
        self.biased = config.bias == "all"
        if self.gated:
            self.gate = param.kernel(rngs, (width, hidden), ("embed", "mlp"))
        self.up = param.kernel(rngs, (width, hidden), ("embed", "mlp"))
        self.down = param.kernel(rngs, (hidden, width), ("mlp", "embed"), gain=(2 * config.layers) ** -0.5)
        if self.biased:
            if self.gated:
                self.gate_bias = param.zeros(hidden, "mlp")
            self.up_bias = param.zeros(hidden, "mlp")
            self.down_bias = param.zeros(width, "embed")
        lora.adapt(self, config.lora, ("gate", "up", "down") if self.gated else ("up", "down"), rngs, place="mlp")

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = [checkpoint_name(self._linear(x, "up"), "mlp_up")]
        if self.gated:
            inputs.insert(0, checkpoint_name(self._linear(x, "gate"), "mlp_gate"))
        hidden = checkpoint_name(activate(self.activation, *inputs), "mlp_act")
        return self._linear(hidden, "down")

    def _linear(self, x, name):
        bias = getattr(self, f"{name}_bias")[...] if self.biased else None
        return lora.project(self, name, x, bias)
