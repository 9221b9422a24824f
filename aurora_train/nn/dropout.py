"""Dropout (Srivastava et al. 2014) keyed by example: a mask depends on the example's key and the site alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, keys: jax.Array | None, site: int) -> jax.Array:
    """x[B, ...] with each entry kept with probability 1 - rate and scaled up; `keys`: key[B], None is deterministic.

    `site` distinguishes the uses within one layer.
    """
    if keys is None or rate == 0.0:
        return x

    def one(key, row):
        keep = jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, row.shape)
        return jnp.where(keep, row / (1.0 - rate), 0).astype(row.dtype)

    return jax.vmap(one)(keys, x)
