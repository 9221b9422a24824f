"""The step: a pure function `(state, batch) -> (state, metrics)` on plain arrays. It fits on one screen."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.random import example_keys, stream
from aurora_train.recipe import Loss
from aurora_train.train.state import Blueprint, TrainState


def make_step(recipe, blueprint: Blueprint, optimizer, *, seed: int, accumulation: int, ema: float | None):
    """The training step of a recipe. `metrics`: float32 scalars loss, tokens, grad_norm, lr, skipped, and the recipe's.

    A step whose loss or gradient norm is not finite is counted in `skipped` and changes nothing but the step number.
    """
    dropout = stream(seed, "dropout")

    def sums(params, rest, batch, step):
        keys = example_keys(dropout, step, batch["example"])
        loss = recipe.loss(blueprint.merge(params, rest), batch, keys)
        return loss.total, loss

    def gradients(state: TrainState, batch):
        grad = jax.grad(sums, has_aux=True)
        if accumulation == 1:
            return grad(state.params, state.rest, batch, state.step)

        def add(carry, microbatch):
            return jax.tree.map(jnp.add, carry, grad(state.params, state.rest, microbatch, state.step)), None

        parts = jax.tree.map(lambda x: split(x, accumulation), batch)
        first, others = jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts)
        return jax.lax.scan(add, grad(state.params, state.rest, first, state.step), others)[0]

    def step(state: TrainState, batch):
        grads, loss = gradients(state, batch)
        loss = Loss(*loss)
        grads = jax.tree.map(lambda g: g / jnp.maximum(loss.weight, 1e-9), grads)
        mean = loss.total / jnp.maximum(loss.weight, 1e-9)
        # The barrier keeps XLA from fusing the update into the backward pass, which changes bits with the plan.
        grads, mean = jax.lax.optimization_barrier((grads, mean))
        params, opt_state, info = optimizer.update(grads, state.opt_state, state.params, state.step)
        extra = state.extra
        if ema is not None:
            extra = {"ema": jax.tree.map(lambda e, p: ema * e + (1 - ema) * p, extra["ema"], params)}
        good = jnp.isfinite(mean) & jnp.isfinite(info["grad_norm"])
        params, opt_state, extra = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, opt_state, extra),
            (state.params, state.opt_state, state.extra),
        )
        metrics = {"loss": mean, "tokens": loss.weight, **info, "skipped": 1.0 - good.astype(jnp.float32)}
        metrics |= {name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in loss.metrics.items()}
        state = state._replace(
            step=state.step + 1, data_step=state.data_step + 1, params=params, opt_state=opt_state, extra=extra
        )
        return state, metrics

    return step


def split(x, parts: int):
    """[B, ...] -> [parts, B/parts, ...], taking every `parts`-th row so that each device keeps its own rows."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
