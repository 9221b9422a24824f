"""A module's state beside its parameters, and its part in a run: carried state, dropout, the two modes.

State that is not a parameter (the statistics of `nnx.BatchNorm`, a counter, any `nnx.Variable`) is an input and an
output of the step. Random state is not carried: a run has none, because keys are functions of (seed, step, example).
"""

from __future__ import annotations

import contextvars
import zlib
from collections import Counter

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.errors import UserError
from aurora_train.nn import lora
from aurora_train.nn.stack import SEGMENTS
from aurora_train.random import stream
from aurora_train.recipe import Loss

_COUPLED = 'couples = "microbatch" in the recipe: its batch is then split only as memory.accumulation says; or "global"'


class KeyedDropout(nnx.Dropout):
    """`nnx.Dropout` whose mask for a row depends on its example's key, its place in the model and the call's number.

    So a mask does not depend on microbatch, plan or number of devices, and there is no random state to save. The
    leading axis of inputs must be the examples; UserError otherwise.
    """

    def __call__(self, inputs, *, deterministic=None, rngs=None):
        """As in nnx; `rngs` passed to the call is used as nnx does."""
        deterministic = self.deterministic if deterministic is None else deterministic
        if rngs is not None or deterministic or self.rate == 0.0:
            return super().__call__(inputs, deterministic=bool(deterministic), rngs=rngs)
        keys_and_calls = _keys.get()
        if keys_and_calls is None:
            return inputs  # no keys: evaluation
        keys, calls = keys_and_calls
        if inputs.ndim == 0 or inputs.shape[0] != keys.shape[0]:
            raise UserError(
                f"the dropout at `{self.place}` is given an array of shape {list(inputs.shape)}, but the batch has "
                f"{keys.shape[0]} examples", where=f"model.{self.place}",
                why="a mask is drawn for each example, so the leading axis must be the examples",
                hint="move the axis of the batch to the front, or use aurora_train.nn.dropout.dropout",
            )  # fmt: skip
        site = (zlib.crc32(self.place.encode()) + calls[self.place]) % 2**32
        calls[self.place] += 1
        shape = [1 if axis in self.shared else size for axis, size in enumerate(inputs.shape)][1:]

        def one(key, row):
            keep = jax.random.bernoulli(jax.random.fold_in(key, jnp.uint32(site)), 1.0 - self.rate, shape)
            return jnp.where(keep, row / max(1.0 - self.rate, 1e-9), 0).astype(row.dtype)

        return jax.vmap(one)(keys, inputs)


_keys: contextvars.ContextVar = contextvars.ContextVar("keys of dropout", default=None)


def build(recipe, seed: int):
    """The recipe's model as a run uses it: drawn from the seed, each `nnx.Dropout` keyed by example, and parameters
    marked as trained or frozen.

    UserError, with the module's path, for state that cannot be carried through a run.
    """
    model = recipe.model(nnx.Rngs(stream(seed, "model"), params=stream(seed, "init")))
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Dropout) and SEGMENTS in map(str, path):
            raise UserError(
                f"the units of a Stack hold a dropout of nnx (`{'.'.join(map(str, path))}`)", where="model",
                why="units are scanned, so all units of a segment would drop the same entries, depending on the plan",
                hint="use aurora_train.nn.dropout.dropout(x, rate, keys, site) with the `keys` passed to the unit",
            )  # fmt: skip
        if type(module) is nnx.Dropout:
            _key_by_example(module, ".".join(map(str, path)))
    _refuse_uncarried(model)
    recipe.is_adapter = lora.is_adapter if lora.has_adapters(model) else None
    lora.mark(model, recipe.trainable)
    return model


def _key_by_example(module: nnx.Dropout, place: str) -> None:
    ndim_free = [axis for axis in module.broadcast_dims if axis <= 0]
    if ndim_free:
        raise UserError(
            f"the dropout at `{place}` shares its mask along axis {ndim_free[0]}", where=f"model.{place}",
            why="the leading axis is the examples, each of which has its own mask",
            hint="count broadcast_dims from the front, without 0",
        )  # fmt: skip
    module.__class__ = KeyedDropout
    module.rngs, module.place, module.shared = nnx.data(None), place, tuple(module.broadcast_dims)


def _refuse_uncarried(model) -> None:
    _, _, others = nnx.split(model, nnx.Param, ...)
    for path, variable in nnx.to_flat_state(others):
        place, kind = ".".join(map(str, path)), type(variable).__name__
        dtype = getattr(variable, "dtype", jnp.float32)
        if isinstance(variable, nnx.RngState) or jnp.issubdtype(dtype, jax.dtypes.prng_key):
            owner = ".".join(map(str, path[:-2])) or place
            raise UserError(
                f"`{owner}` holds random state ({kind}), which a run does not carry", where=f"model.{place}",
                why="a resumed run must draw what the undisturbed one draws: keys come with the batch",
                hint="use nnx.Dropout(rate, rngs=rngs) as a separate module, or keys from the `key` of `loss`",
            )  # fmt: skip
        if SEGMENTS in map(str, path):
            raise UserError(
                f"the units of a Stack hold `{place}` ({kind}), which is not a parameter", where=f"model.{place}",
                why="units are scanned and recomputed, so changes of their state would be lost",
                hint="use an nnx.List of modules instead of the Stack",
            )  # fmt: skip


def training_loss(recipe, model, batch: dict, keys) -> Loss:
    """The recipe's loss with the model in training mode and dropout keyed by example. `keys`: key[B]."""
    model.train()
    token = _keys.set((keys, Counter()))
    try:
        return recipe.loss(model, batch, keys)
    finally:
        _keys.reset(token)


def changed_state(recipe, model, before: dict) -> dict:
    """The state beside the parameters after a call of `training_loss`, structured like `before`, a nested dict.

    UserError for state whose shape or dtype changed, and for any change of state if the recipe declares its examples
    independent of each other.
    """
    nnx.pop(model, nnx.Intermediate)
    _, _, others = nnx.split(model, nnx.Param, ...)
    after, known = nnx.to_pure_dict(others), dict(_leaves(before))
    for place, leaf in _leaves(after):
        was = known.pop(place, None)
        if was is leaf:
            continue
        if was is None or jnp.shape(was) != jnp.shape(leaf) or jnp.result_type(was) != jnp.result_type(leaf):
            had = "was not there before" if was is None else f"was {_described(was)} and is {_described(leaf)}"
            raise UserError(
                f"the loss changes what kind of state the model holds: `{place}` {had}", where=f"model.{place}",
                hint="create it in __init__, and keep its shape and dtype",
            )  # fmt: skip
        if recipe.couples == "example":
            raise UserError(
                f"the loss changes `{place}` of the model, which then depends on all examples of a microbatch",
                where=f"model.{place}", why="the result would depend on how a batch is split", hint=f"set {_COUPLED}",
            )  # fmt: skip
    if known:
        raise UserError(
            f"the loss removes `{next(iter(known))}` from the model", where=f"model.{next(iter(known))}",
            hint="create a model's state in __init__ and keep it",
        )  # fmt: skip
    return after


def _leaves(tree: dict):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield ".".join(str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path), leaf


def _described(leaf) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
