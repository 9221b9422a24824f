"""Gates may refuse an update and hooks run after it, all in one fixed order.

A gate looks at the state before the step and at the step's numbers, and decides whether the update is good. A hook sees
the state before and after, and returns the state to continue with. The step runs all gates, then all hooks in order,
and knows no feature by name: a moving average is a hook, and a limit on outliers is a gate with a hook for its memory.

A hook's memory is in `TrainState.extra` under its name, so it is saved and restored with everything else. The order
affects bits, so it is part of the run's hash: the built-in order is the one below and is only ever appended to (the
settings that switch a feature on are hashed), and a recipe's own hooks follow in the order of its file, whose sha256 is
in the hash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aurora_train.errors import UserError
from aurora_train.train import outliers

EMA, RECENT = "ema", "recent"  # names in checkpoints


class Gate(NamedTuple):
    """`passes(state, info) -> bool[]`: whether the update is good. `info`: float32 scalars `loss`, `grad_norm`, `lr`.

    `state` is the state before the step.
    """

    name: str
    passes: Callable[[Any, dict[str, jax.Array]], jax.Array]


class Hook(NamedTuple):
    """`after(old, new, info, good) -> new`: the state to continue with, in the shapes and dtypes of `new`.

    `begin(params) -> pytree of arrays` makes the initial `extra[name]`; None for a hook without memory. An array there
    with the name and shape of a parameter is sharded like it; any other is replicated on every device.
    """

    name: str
    after: Callable[[Any, Any, dict[str, jax.Array], jax.Array], Any]
    begin: Callable[[dict], Any] | None = None


class Features(NamedTuple):
    """The gates and the hooks of a run, in their order."""

    gates: tuple[Gate, ...]
    hooks: tuple[Hook, ...]

    def passes(self, state, info) -> jax.Array:
        """Whether every gate lets the update pass, bool[]."""
        good = self.gates[0].passes(state, info)
        for gate in self.gates[1:]:
            good = good & gate.passes(state, info)
        return good

    def begin(self, params: dict) -> dict:
        """`TrainState.extra` at the start."""
        return {hook.name: hook.begin(params) for hook in self.hooks if hook.begin is not None}


def features(*, ema: float | None = None, spike: float | None = None, recipe=None) -> Features:
    """The features that the settings switch on, followed by a recipe's own. UserError if two hooks have one name."""
    gates = [Gate("finite", _is_finite)]
    hooks = [set_back("params", "opt_state", "rest")]
    if ema is not None:
        hooks.append(moving_average(ema))
    if spike is not None:
        gates.append(Gate("spike", lambda state, info: ~outliers.is_outlier(state.extra[RECENT], info, spike)))
        hooks.append(Hook(RECENT, _remember, lambda params: outliers.empty()))
    if recipe is not None:
        gates += recipe.gates()
        hooks += recipe.hooks()
    _refuse_twins([hook.name for hook in hooks], type(recipe).__name__)
    return Features(tuple(gates), tuple(hooks))


def features_of(config, recipe=None) -> Features:
    """The features of a run of this config."""
    return features(ema=config.optimizer.ema, spike=config.train.spike, recipe=recipe)


def set_back(*fields: str) -> Hook:
    """A hook that restores the named fields of the state after an update that is not good."""

    def after(old, new, info, good):
        kept = {name: _where(good, getattr(new, name), getattr(old, name)) for name in fields}
        return new._replace(**kept)

    return Hook("set_back", after)


def moving_average(decay: float) -> Hook:
    """A hook that computes `decay * average + (1 - decay) * parameters` after every good update, in float32."""

    def after(old, new, info, good):
        average = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, old.extra[EMA], new.params)
        return new._replace(extra={**new.extra, EMA: _where(good, average, old.extra[EMA])})

    return Hook(EMA, after, lambda params: jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params))


def _is_finite(state, info):
    return jnp.isfinite(info["loss"]) & jnp.isfinite(info["grad_norm"])


def _remember(old, new, info, good):
    return new._replace(extra={**new.extra, RECENT: outliers.remembered(old.extra[RECENT], info, good)})


def _refuse_twins(names: list[str], recipe: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two hooks are called `{name}`", where=f"{recipe}.hooks",
                why="a checkpoint stores a hook's memory under its name", hint="rename the recipe's hook",
            )  # fmt: skip


def _where(good, new, old):
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


BUILT_IN = features()  # those without any setting: they have no memory
