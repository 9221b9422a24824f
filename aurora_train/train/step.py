"""The step: a pure function `(state, batch) -> (state, metrics)` on plain arrays. It fits on one screen."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aurora_train.nn.carried import changed_state, training_loss
from aurora_train.nn.stack import summed
from aurora_train.optimizer import join, partition
from aurora_train.random import example_keys, stream
from aurora_train.recipe import Loss
from aurora_train.train.hooks import Features
from aurora_train.train.state import Blueprint, TrainState


def make_step(recipe, blueprint: Blueprint, optimizer, features: Features, *, seed: int, accumulation: int):
    """The training step of a recipe. `metrics`: float32 scalars loss, tokens, grad_norm, lr, skipped, and the recipe's.

    An update that a gate refuses is counted in `skipped`; hooks decide what it leaves unchanged (`train/hooks.py`).
    """
    gradients = _make_gradients(recipe, blueprint, seed, accumulation)

    def step(state: TrainState, batch):
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
        info = info | {"loss": mean}
        good = features.passes(state, info)
        new = state._replace(params=params, opt_state=opt_state, rest=rest)
        with jax.named_scope("optimizer"):
            for hook in features.hooks:
                new = hook.after(state, new, info, good)
        metrics = {**info, "tokens": loss.weight, "skipped": 1.0 - good.astype(jnp.float32)}
        metrics |= {name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in loss.metrics.items()}
        return new._replace(step=state.step + 1, data_step=state.data_step + 1), metrics

    return step


def _make_gradients(recipe, blueprint: Blueprint, seed: int, accumulation: int):
    """`(state, batch) -> (gradients of the summed loss, (Loss, state beside the parameters))`, over one or several
    microbatches. Dropout is keyed by example."""
    dropout = stream(seed, "dropout")

    def sums(params, state, batch):
        rest, stacks = partition(params)
        params = join(jax.tree.map(summed, rest), stacks)
        model = blueprint.merge(params, state.rest, state.frozen)
        loss = training_loss(recipe, model, batch, example_keys(dropout, state.step, batch["example"]))
        return loss.total, (loss, changed_state(recipe, model, state.rest))

    def at_once(state: TrainState, batch):
        return jax.grad(sums, has_aux=True)(state.params, state, batch)

    def in_parts(state: TrainState, batch):
        # Each layer's gradient is added in place as the reverse scan makes it, so there is no second set.
        grads = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), state.params)

        def add(rest, microbatch):
            now = state._replace(rest=rest)
            total, backward, (loss, rest) = jax.vjp(lambda p: sums(p, now, microbatch), state.params, has_aux=True)
            backward.with_refs(grads)(jnp.ones_like(total))
            return rest, loss

        rest, losses = jax.lax.scan(add, state.rest, jax.tree.map(lambda x: split(x, accumulation), batch))
        return jax.tree.map(jax.freeze, grads), (jax.tree.map(sum, losses), rest)

    return at_once if accumulation == 1 else in_parts


def split(x, parts: int):
    """[B, ...] -> [parts, B/parts, ...], taking every `parts`-th row so that each device keeps its own rows."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
