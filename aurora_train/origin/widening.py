"""A source whose embedding and output head get rows for new tokens (`init.tokens`) while they are read.

A new row is the mean of the rows of all tokens that the source has, rounded to its dtype: the model then gives a new
token about the probability of an average one and leaves the others nearly as they were (Hewitt 2021, "Initializing New
Word Embeddings for Pretrained Language Models").
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from aurora_train.errors import UserError
from aurora_train.interop.tokens import WHERE, NewRows
from aurora_train.nn.lora import ADAPTERS

AXES = {"embedding": 0, "head": 1}  # the axis of the tokens


def widened(stored: dict, read: Callable[[dict], dict], rows: NewRows, where: str) -> tuple[dict, Callable]:
    """(shapes by bare name, reader) of a source with rows for new tokens. UserError for one that is not a decoder."""
    if "embedding" not in stored:
        raise UserError(f"{where} has no parameter `embedding` that could get rows for new tokens", where=WHERE)
    grown = {name: axis for name, axis in AXES.items() if name in stored}
    shapes = dict(stored)
    for name, axis in grown.items():
        shape = list(stored[name].shape)
        shape[axis] = max(shape[axis], rows.first + rows.count)
        shapes[name] = jax.ShapeDtypeStruct(tuple(shape), stored[name].dtype)

    def read_wider(wanted: dict) -> dict:
        arrays = read({name: spec for name, spec in wanted.items() if name not in grown})
        for name in wanted.keys() & grown.keys():
            spec = wanted[name]
            narrow = jax.ShapeDtypeStruct(stored[name].shape, spec.dtype, sharding=_whole(spec.sharding))
            array = _with_rows(read({name: narrow})[name], grown[name], rows)
            arrays[name] = jax.device_put(array, spec.sharding)
        return arrays

    return shapes, read_wider


def refuse_frozen(wanted: dict) -> None:
    """UserError if the rows of new tokens would not be trained. `wanted`: the model's parameters by canonical name."""
    frozen = (name for name in AXES if f"frozen.{name}" in wanted and f"params.{name}{ADAPTERS[0]}" not in wanted)
    name = next(frozen, None)
    if name is not None:
        raise UserError(
            f"the rows of new tokens would stay as they begin, because `{name}` is frozen", where=WHERE,
            hint=f"name it in model.lora.targets: [\"*\"] or [..., {name}]; or train without model.lora, and start the "
            "run with adapters from that run",
        )  # fmt: skip


def _whole(sharding):
    """A sharding with a copy on every device: the narrow array's rows may not divide among the devices."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


@functools.partial(jax.jit, static_argnums=(1, 2))
def _with_rows(array: jax.Array, axis: int, rows: NewRows) -> jax.Array:
    known, rest = (jax.lax.slice_in_dim(array, start, stop, axis=axis) for start, stop in (
        (0, rows.first), (min(rows.first + rows.count, array.shape[axis]), array.shape[axis])))  # fmt: skip
    mean = known.astype(jnp.float32).mean(axis, keepdims=True).astype(array.dtype)
    return jnp.concatenate([known, jnp.repeat(mean, rows.count, axis), rest], axis)
