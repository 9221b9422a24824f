"""Runs a decoder one unit of its stack at a time, so that its float32 weights are never in memory together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from aurora_train.interop.placing import assembled
from aurora_train.nn.decoder_config import DecoderConfig

Read = Callable[[str], np.ndarray]  # a parameter by canonical name
_FIRST = "stack.units.0000"
_BLOCK_BYTES = 1 << 26  # of the output head, in float32


def log_probabilities(config: DecoderConfig, read: Read, rows: list[np.ndarray]) -> list[np.ndarray]:
    """log p of every token at each position, float32[T, vocabulary], for each row of ids int[T].

    In memory are one unit, a part of the head, and the result.
    """
    import jax

    length = max(map(len, rows))
    padded = np.stack([np.pad(row, (0, length - len(row))) for row in rows])  # causal: what comes after is not seen
    with jax.default_matmul_precision("highest"):
        hidden = _hidden(config, read, padded, np.arange(length) < np.array([[len(row)] for row in rows]))
        logits = _logits(config, read, hidden)
        return [np.asarray(jax.nn.log_softmax(one[: len(row)], -1)) for one, row in zip(logits, rows, strict=True)]


class _Unit(NamedTuple):
    """A decoder of one unit: its parameters (abstract), the model of given ones, and its stack, compiled.

    `run` takes (parameters, x, positions, `real`).
    """

    abstract: dict
    model: Callable
    run: Callable


@functools.lru_cache(maxsize=2)  # the two sides of a proof run the same program
def _unit_of(config: DecoderConfig, rows: int) -> _Unit:
    """`config`: of one unit. `rows`: of the embedding."""
    import jax
    from flax import nnx

    from aurora_train.nn.decoder import Decoder
    from aurora_train.nn.transformer import make_context

    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rows, "float32", nnx.Rngs(params=0))))

    def model(arrays) -> Decoder:
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, arrays)
        return nnx.merge(graph, filled)

    def run(arrays, x, positions, real):
        return model(arrays).stack(x, make_context(config, positions, None, real))[0]

    return _Unit(nnx.to_pure_dict(state), model, jax.jit(run))


def _hidden(config: DecoderConfig, read: Read, tokens: np.ndarray, real: np.ndarray):
    """Final hidden states float32[B, T, D] of ids int32[B, T]. `real`: bool[B, T], False for padding."""
    import jax.numpy as jnp

    used, numbers = np.unique(tokens, return_inverse=True)  # of the embedding, only the rows of these tokens are needed
    period = len(config.rows)
    one_unit = config.model_copy(update={"layers": period, "tied": True, "lora": None})
    abstract, model, run = _unit_of(one_unit, len(used))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def unit(number: int):
        at = f"stack.units.{number:04d}"
        return assembled({"stack": abstract["stack"]}, lambda name: read(name.replace(_FIRST, at, 1)))

    def outer_part(name: str) -> np.ndarray:
        array = read(name)
        return array[used] if name == "embedding" else array

    outer = assembled({name: part for name, part in abstract.items() if name != "stack"}, outer_part)
    x = None
    for number in range(config.layers // period):
        arrays = None  # the unit before is released first
        arrays = outer | unit(number)
        if x is None:
            x = model(arrays).embedded(jnp.asarray(numbers.reshape(tokens.shape), jnp.int32), positions)
        x = run(arrays, x, positions, real)
    return model(arrays).final_norm(x)


def _logits(config: DecoderConfig, read: Read, hidden) -> np.ndarray:
    """float32[B, T, vocabulary], a part of the head at a time."""
    import jax.numpy as jnp

    from aurora_train.nn.losses import logits_of

    head = read("embedding" if config.tied else "head")
    vocabulary = head.shape[0 if config.tied else 1]
    step = max(1, _BLOCK_BYTES // (4 * config.width))
    found = np.empty((*hidden.shape[:-1], vocabulary), np.float32)
    for start in range(0, vocabulary, step):
        part = head[start : start + step] if config.tied else head[:, start : start + step]
        block = jnp.asarray(part, jnp.float32)
        found[..., start : start + step] = logits_of(hidden, block, config.tied, config.logit_softcap)
    return found
