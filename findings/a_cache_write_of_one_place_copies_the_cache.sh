#!/usr/bin/env bash
# jax 0.10.2, XLA:CPU, float32: decoding one text writes one place of each layer's donated cache, `cache.at[row, :, place]
# .set(new, mode="drop")`, and attends to it. That one write becomes an update of a slice, which is merged into everything
# that reads the cache, with copies of the whole cache, although the buffer is donated and the result returned. A write of
# two places stays a scatter in place. So it is cheaper to write more: one more place, beyond the end, is dropped.
# Seen, four layers with keys and values of 1 MiB each: 16,778,248 bytes of temporary memory and 48 copies for one place;
# 32,768 bytes and 1 copy for two. Results are equal.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import functools
import re

import jax
import jax.numpy as jnp

LAYERS, HEADS, PLACES, WIDTH = 4, 4, 1024, 64
CACHE = HEADS * PLACES * WIDTH * 4


def step(caches, query, new, place, beyond):
    """One text, one token: write it to every layer's cache and attend to the places so far."""
    seen = jnp.arange(PLACES) <= place[:, :1]
    written = []
    for cache in caches:
        places, values = place, new
        if beyond:  # a second place, which is dropped
            places = jnp.pad(place, ((0, 0), (0, 1)), constant_values=PLACES)
            values = jnp.pad(new, ((0, 0), (0, 1), (0, 0), (0, 0)))
        cache = {name: cache[name].at[jnp.arange(1)[:, None], :, places].set(values, mode="drop") for name in cache}
        scores = jnp.einsum("bhd,bhsd->bhs", query, cache["key"])
        shares = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), -1)
        query = jnp.einsum("bhs,bhsd->bhd", shares, cache["value"])
        written.append(cache)
    return written, query


def arguments():
    keys = jax.random.split(jax.random.key(0), 2 * LAYERS + 2)
    caches = [{name: jax.random.normal(keys[2 * i + j], (1, HEADS, PLACES, WIDTH)) for j, name in enumerate(("key", "value"))}
              for i in range(LAYERS)]
    query, new = jax.random.normal(keys[-2], (1, HEADS, WIDTH)), jax.random.normal(keys[-1], (1, 1, HEADS, WIDTH))
    return caches, query, new, jnp.full((1, 1), 700, jnp.int32)


temporary, results = {}, {}
for beyond in (False, True):
    program = jax.jit(functools.partial(step, beyond=beyond), donate_argnums=0).lower(*arguments()).compile()
    temporary[beyond] = program.memory_analysis().temp_size_in_bytes
    copies = len(re.findall(r" copy\(", program.as_text()))
    results[beyond] = program(*arguments())
    print(f"{2 if beyond else 1} written: {temporary[beyond]:,} bytes of temporary memory, {copies} copies")
assert temporary[False] > 2 * LAYERS * CACHE and temporary[True] < CACHE / 4, temporary
one, two = (jax.tree.leaves(results[beyond]) for beyond in (False, True))
assert all(jnp.allclose(a, b, atol=1e-6) for a, b in zip(one, two))
print("as described")
PY
