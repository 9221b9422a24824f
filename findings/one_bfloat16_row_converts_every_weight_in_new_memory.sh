#!/usr/bin/env bash
# jax 0.10.2 on a CPU: one row in bfloat16 through a chain of weights, as a decoder writes a token. XLA:CPU has no kernel for such a product;
# it converts each weight to float32, all of them before the first product, since nothing holds them back. The temporary memory is that of
# all weights in float32, beyond 32 MB it is new in every call, and mapping it takes most of the processor's time (AMD EPYC: 55 ms a call, 41 to 54 of
# them in the kernel, where float32 weights take 4 ms). With 8 rows nothing is converted beforehand. Held back one after another, they share the
# memory of one.
# Seen: 10 weights of [576, 3072]: temporary memory 70.8 MB for one row, 0.0 MB for eight; 7.1 MB held back.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'P'
import os
import jax
import jax.numpy as jnp

weights = [jnp.ones((576, 3072), jnp.bfloat16) for _ in range(10)]


def product(x, weight):
    return jax.lax.dot_general(x, weight, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def held_back(x, weight):
    never = (jax.lax.bitcast_convert_type(x.astype(jnp.float32)[0, 0], jnp.int32) | 1) == 0
    return product(x.astype(jnp.float32), jnp.where(never, 0.0, weight.astype(jnp.float32)))


def compiled(times, rows):
    def chain(x, weights):
        for weight in weights:
            x = (x + times(x, weight)[:, :576]).astype(jnp.bfloat16)
        return x

    x = jnp.ones((rows, 576), jnp.bfloat16)
    return jax.jit(chain).lower(x, weights).compile(), x


megabytes = {}
for name, times, rows in (("one row", product, 1), ("eight rows", product, 8), ("one row, held back", held_back, 1)):
    program, x = compiled(times, rows)
    megabytes[name] = program.memory_analysis().temp_size_in_bytes / 1e6
    program(x, weights).block_until_ready()
    before = os.times()
    for _ in range(10):
        program(x, weights).block_until_ready()
    after = os.times()
    print(f"jax {jax.__version__} | {name}: {megabytes[name]:.1f} MB, {100 * (after.user - before.user):.0f} ms of the "
          f"program and {100 * (after.system - before.system):.0f} ms of the kernel a call")
assert megabytes["one row"] > 60 and megabytes["eight rows"] < 10 and megabytes["one row, held back"] < 20
P
echo "as described"
