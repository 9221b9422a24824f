#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2 (seen with flax 0.12.12 and jax 0.12.0.1, too): writing a float into an integer nnx.Variable through the indexed form
# that flax recommends since `.value` is deprecated (`v[...] = x`) keeps the integer dtype and cuts the fraction off,
# with a FutureWarning of a scatter at most; `v.set_value(x)` of the same float replaces array and dtype. So a running
# mean kept in a Variable that was begun as `jnp.zeros((), int)` never moves, and nothing fails.
# Seen: after `v[...] = v[...] + 0.5` three times: 0 (int32); after `v.set_value(v.get_value() + 0.5)` three times: 1.5.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'flax==0.12.8' 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore - <<'P'
import flax
import jax.numpy as jnp
from flax import nnx

written, replaced = nnx.Variable(jnp.zeros((), jnp.int32)), nnx.Variable(jnp.zeros((), jnp.int32))
for _ in range(3):
    written[...] = written[...] + 0.5
    replaced.set_value(replaced.get_value() + 0.5)
print("flax", flax.__version__, "| indexed:", written.get_value(), written.dtype, "| set_value:", replaced.get_value(), replaced.dtype)
assert written.dtype == jnp.int32 and int(written.get_value()) == 0
assert replaced.dtype == jnp.float32 and float(replaced.get_value()) == 1.5
P
echo "as described"
