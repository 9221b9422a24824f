"""Builds the direction of a step from the config, with optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from aurora_train.optimizer.moments import TABLES


def make_direction(config) -> Callable[[Any], optax.GradientTransformation]:
    """A function from a (per-layer) parameter tree to a transformation: Muon depends on which leaves are matrices."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=lambda p: jax.tree.map(lambda a: a.ndim >= 2, p))
    adam = optax.chain(optax.scale_by_adam(config.beta1, config.beta2, config.eps), decay)
    if config.name == "adamw":
        return lambda params: adam
    if config.name == "lion":
        lion = optax.chain(optax.scale_by_lion(config.beta1, config.beta2), decay)
        return lambda params: lion
    if config.name == "adafactor":
        # Shazeer & Stern 2018: factored second moment, update clipping at RMS 1, step relative to the parameter's RMS.
        factored = optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms(), decay
        )
        return lambda params: factored
    # Muon (Jordan et al. 2024) scaled to AdamW's update RMS of 0.2 (Liu et al. 2025, Moonlight, eq. 4), so that one
    # learning rate serves hidden matrices and all other parameters (embeddings, heads, norms, biases), which use Adam.
    orthogonal = optax.contrib.scale_by_muon(
        beta=config.momentum,
        weight_dimension_numbers=lambda p: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), p),
    )
    muon = optax.chain(orthogonal, optax.stateless(_as_adamw_rms), decay)
    adam_rate = 1.0 if config.adam_lr is None else config.adam_lr / config.lr
    rates = {"muon": muon, "adam": optax.chain(adam, optax.scale(adam_rate))}
    return lambda params: optax.partition(rates, jax.tree_util.tree_map_with_path(_muon_label, params))


def _as_adamw_rms(updates, params):
    """An orthogonal matrix [m, n] has RMS 1 / sqrt(max(m, n)); AdamW's updates have about 0.2."""
    return jax.tree.map(lambda u: u * (0.2 * max(u.shape) ** 0.5), updates)


def _muon_label(path, leaf) -> str:
    names = {str(getattr(key, "key", key)) for key in path}
    return "muon" if leaf.ndim == 2 and not names & {*TABLES, "head"} else "adam"
