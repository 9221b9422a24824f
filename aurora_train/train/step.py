"""The step: a pure function `(state, batch) -> (state, metrics)` on plain arrays. It fits on one screen."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.nn.carried import changed_state, training_loss
from aurora_train.nn.stack import summed
from aurora_train.optimizer import join, partition
from aurora_train.random import example_keys, stream
from aurora_train.recipe import Loss
from aurora_train.train import outliers
from aurora_train.train.fused import make_fused
from aurora_train.train.state import Blueprint, TrainState


def make_step(
    recipe, blueprint: Blueprint, optimizer, *, seed: int, accumulation: int, ema: float | None, fuse: bool = False,
    spike: float | None = None,
):  # fmt: skip
    """The training step of a recipe. `metrics`: float32 scalars loss, tokens, grad_norm, lr, skipped, and the recipe's.

    A step whose loss or gradient norm is not finite, or an outlier by `spike` (`train/outliers.py`), is counted in
    `skipped` and changes nothing but the step number; with `fuse` (see `train/fused.py`) a gradient that is not finite
    spares its own unit alone.
    """
    dropout = stream(seed, "dropout")

    def loss_of(model, state, batch):
        loss = training_loss(recipe, model, batch, example_keys(dropout, state.step, batch["example"]))
        return loss.total, (loss, changed_state(recipe, model, state.rest))

    def sums(params, state, batch):
        rest, stacks = partition(params)
        params = join(jax.tree.map(summed, rest), stacks)
        return loss_of(blueprint.merge(params, state.rest, state.frozen), state, batch)

    def gradients(state: TrainState, batch):
        if accumulation == 1:
            return jax.grad(sums, has_aux=True)(state.params, state, batch)
        # Added up in place, each layer's gradient as the reverse scan makes it: there is no second set.
        grads = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), state.params)

        def add(rest, microbatch):
            now = state._replace(rest=rest)
            total, backward, (loss, rest) = jax.vjp(lambda p: sums(p, now, microbatch), state.params, has_aux=True)
            backward.with_refs(grads)(jnp.ones_like(total))
            return rest, loss

        rest, losses = jax.lax.scan(add, state.rest, jax.tree.map(lambda x: split(x, accumulation), batch))
        return jax.tree.map(jax.freeze, grads), (jax.tree.map(sum, losses), rest)

    def passes(state: TrainState, info):
        finite = jnp.isfinite(info["loss"]) & jnp.isfinite(info["grad_norm"])
        return finite if spike is None else finite & ~outliers.is_outlier(state.extra["recent"], info, spike)

    def advance(state: TrainState, batch):
        grads, (loss, rest) = gradients(state, batch)
        loss = Loss(*loss)
        grads = jax.tree.map(lambda g: (g / jnp.maximum(loss.weight, 1e-9)).astype(g.dtype), grads)
        mean = loss.total / jnp.maximum(loss.weight, 1e-9)
        # The barrier keeps XLA from fusing the update into the backward pass, which changes bits with the plan.
        grads, mean = jax.lax.optimization_barrier((grads, mean))
        with jax.named_scope("optimizer"):
            params, opt_state, info = optimizer.update(
                grads, state.opt_state, state.params, state.step, good=jnp.isfinite(mean)
            )
            good = passes(state, info | {"loss": mean})
            params, opt_state = _where(good, (params, opt_state), (state.params, state.opt_state))
        return params, opt_state, (loss, rest), info | {"loss": mean}

    if fuse:
        assert accumulation == 1, "refused where the config is read"
        advance = make_fused(blueprint, optimizer, loss_of)

    def step(state: TrainState, batch):
        params, opt_state, (loss, rest), info = advance(state, batch)
        good, extra = passes(state, info), dict(state.extra)
        rest = _where(good, rest, state.rest)
        if ema is not None:
            average = jax.tree.map(lambda e, p: ema * e + (1 - ema) * p, extra["ema"], params)
            extra["ema"] = _where(good, average, extra["ema"])
        if spike is not None:
            extra["recent"] = outliers.remembered(extra["recent"], info, good)
        metrics = {**info, "tokens": loss.weight, "skipped": 1.0 - good.astype(jnp.float32)}
        metrics |= {name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in loss.metrics.items()}
        state = state._replace(
            step=state.step + 1, data_step=state.data_step + 1,
            params=params, opt_state=opt_state, rest=rest, extra=extra,
        )  # fmt: skip
        return state, metrics

    return step


def _where(good, new, old):
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def split(x, parts: int):
    """[B, ...] -> [parts, B/parts, ...], taking every `parts`-th row so that each device keeps its own rows."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
