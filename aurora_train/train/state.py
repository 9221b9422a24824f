"""The state of a run as one pytree of plain arrays. It has no random state: keys are functions of the step."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train import mesh as meshes
from aurora_train import optimizer as optimizers
from aurora_train.check.blame import place_of
from aurora_train.errors import UserError
from aurora_train.nn import carried, lora, nf4
from aurora_train.nn import stack as stacked
from aurora_train.train import hooks


class TrainState(NamedTuple):
    """`step`: updates attempted, int32. `data_step`: batches taken, int32. `params`: nested dict of float32 masters.

    `frozen` holds the parameters that are not trained, a nested dict like `params`: neither differentiated nor donated
    nor saved again, with matrices in the compute dtype. `rest` holds the model's other variables; `extra` holds the
    memory of each hook by its name (`train/hooks.py`): the moving average of the parameters is `extra["ema"]`.
    """

    step: Any
    data_step: Any
    params: Any
    frozen: Any
    rest: Any
    opt_state: Any
    extra: Any


class Blueprint(NamedTuple):
    """Everything about a model that is not an array: made once, before anything is allocated."""

    graph: Any
    variables: Any  # the abstract nnx State of parameters, whose structure nested dicts are given by `merge`
    rest: Any
    state: TrainState  # ShapeDtypeStructs
    shardings: TrainState
    initialise: Any  # () -> TrainState, jitted

    def merge(self, params, rest, frozen={}):  # noqa: B006 (never written to)
        """An nnx module around plain arrays; free inside a trace. `frozen` holds the parameters not in `params`."""
        variables = jax.tree.map(lambda leaf: leaf, self.variables)
        nnx.replace_by_pure_dict(variables, _join(params, frozen))
        others = jax.tree.map(lambda leaf: leaf, self.rest)
        nnx.replace_by_pure_dict(others, rest)
        return nnx.merge(self.graph, variables, others)


def draw(
    recipe, plan, optimizer, mesh, *, seed: int, features: hooks.Features = hooks.BUILT_IN, ends: int = 0
) -> Blueprint:
    """The blueprint of a model: abstract state, shardings and the jitted initialiser, without allocating a parameter.

    `features`: the gates and hooks whose memory is part of the state. `ends`: the config's `train.bf16_ends`.
    """

    def construct():
        model = carried.build(recipe, seed)
        plan.apply(model, ends)
        return model

    graph, variables, rest = nnx.split(nnx.eval_shape(construct), nnx.Param, ...)
    trained, still = lora.split(variables)
    if not jax.tree.leaves(trained):
        raise UserError(
            "nothing of this model is trained", where=place_of(type(recipe).trainable),
            hint="`trainable(path)` returns True for the parameters to be trained, such as \"student.head.kernel\"",
        )  # fmt: skip
    dtype = recipe.config.train.dtype

    def initialise() -> TrainState:
        _, everything, others = nnx.split(construct(), nnx.Param, ...)
        params, frozen = map(nnx.to_pure_dict, lora.split(everything))
        params = optimizer.stored(params)
        return TrainState(
            step=jnp.int32(0),
            data_step=jnp.int32(0),
            params=params,
            frozen=jax.tree_util.tree_map_with_path(functools.partial(_at_rest, dtype), frozen),
            rest=nnx.to_pure_dict(others),
            opt_state=optimizer.init(params),
            extra=features.begin(params),
        )

    state = jax.eval_shape(initialise)
    whole = meshes.replicated(mesh)
    parameters = meshes.parameter_shardings(trained, mesh)
    shardings = TrainState(
        step=whole,
        data_step=whole,
        params=parameters,
        frozen=meshes.parameter_shardings(still, mesh),
        rest=jax.tree.map(lambda _: whole, state.rest),
        opt_state=_optimizer_shardings(state.opt_state, nnx.to_pure_dict(trained), parameters, whole),
        extra=_like_parameters(state.extra, nnx.to_pure_dict(trained), parameters, whole),
    )
    return Blueprint(graph, variables, rest, state, shardings, jax.jit(initialise, out_shardings=shardings))


def frozen_as_argument(step):
    """A step `(state, batch) -> (state, metrics)` as `(state, frozen, batch) -> (state, metrics)`.

    Both states lack their frozen leaves, so that all of the first argument can be donated and none of the second. If
    nothing is frozen it is the same program.
    """

    def program(state: TrainState, frozen, batch):
        state, metrics = step(state._replace(frozen=frozen), batch)
        return state._replace(frozen={}), metrics

    return program


def together(compiled):
    """The compiled program of `frozen_as_argument` as its step: `(state, batch) -> (state, metrics)`."""

    def step(state: TrainState, batch):
        new, metrics = compiled(state._replace(frozen={}), state.frozen, batch)
        return new._replace(frozen=state.frozen), metrics

    return step


def _at_rest(dtype: str, path, leaf):
    """A frozen leaf: matrices in the dtype of their products, to which every layer casts; vectors stay float32."""
    layered = any(_key(entry) == stacked.SEGMENTS for entry in path)
    matrix = leaf.ndim - layered >= 2 and not nf4.is_coded(_key(path[-1]))
    return leaf.astype(dtype) if matrix else leaf


def _join(one: dict, other: dict) -> dict:
    """Merge two nested dicts that have no leaf in common."""
    both = {**one, **other}
    return {k: _join(one[k], other[k]) if k in one and k in other else v for k, v in both.items()}


def _like_parameters(tree, params, shardings, whole):
    """Shard each leaf like its parameter, matched by the end of its path and its shape. Others are replicated."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    known = {
        tuple(map(_key, path)): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    }

    def match(path, leaf):
        names = tuple(map(_key, path))
        for start in range(len(names)):
            shape, sharding = known.get(names[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return whole

    return jax.tree_util.tree_map_with_path(match, tree)


def _optimizer_shardings(opt_state, params, shardings, whole):
    """Shard the moments like their parameters. Those of stacks and of the rest are separate parts of the state."""
    rest, stacks = optimizers.partition(params)
    rest_shardings, stack_shardings = optimizers.partition(shardings)
    out = {"rest": _like_parameters(opt_state["rest"], rest, rest_shardings, whole), "stacks": {}}
    for name, stack in opt_state["stacks"].items():
        out["stacks"][name] = {
            stacked.SEGMENTS: {
                i: _like_parameters(
                    s, stacks[name][stacked.SEGMENTS][i], stack_shardings[name][stacked.SEGMENTS][i], whole
                )
                for i, s in stack[stacked.SEGMENTS].items()
            }
        }
    return out


def _key(entry) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))
