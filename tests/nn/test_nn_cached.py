"""Attention to a cache on a CPU: by blocks and parts it says what all scores at once say, and writes in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_train.nn.attention import Context
from aurora_train.nn.attention_cached import attend, whole
from aurora_train.nn.attention_kernels import Rule, visible
from aurora_train.nn.cpu import cached


def drawn(seed: int, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 2e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("start", [0, 130])
def test_many_queries_by_parts_see_what_they_see_at_once(start, window, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(cached, "PART", 64)
    monkeypatch.setattr(cached, "BLOCK", 96)
    monkeypatch.setattr(cached, "SMALL", 1)
    rule, length, slots = Rule(0.25, window), 128, 300
    query = drawn(0, 2, length, 2, 3, 16, dtype=dtype)
    key, value = (drawn(seed, 3, 2, slots, 16, dtype=dtype).astype("float32") for seed in (1, 2))
    positions = start + jnp.arange(length)
    mask = jnp.broadcast_to(visible(positions, jnp.arange(slots), rule), (2, length, slots))
    given = (query, key, value, rule, mask, start + length, jnp.array([2, 0]))
    found = jax.jit(cached.by_blocks, static_argnums=3)(*given)
    np.testing.assert_allclose(found, whole(*given), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_token_is_written_to_the_cache_in_place(rows):
    """A copy of the caches for each token, of every layer, is more than all else that attention does."""
    slots = 400
    caches = {name: jax.ShapeDtypeStruct((rows, 2, slots, 32), jnp.float32) for name in ("key", "value")}
    new = jax.ShapeDtypeStruct((rows, 1, 2, 32), jnp.float32)

    def step(cache, query, key, value, positions):
        return attend(query, key, value, cache, Rule(0.2), Context(positions, real=positions >= 0))

    positions = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(caches, new, new, new, positions).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * 2 * slots * 32 * 4
