#!/usr/bin/env bash
# jax 0.10.2: JAX_CPU_ENABLE_ASYNC_DISPATCH does nothing, and nothing says so. The settings that jax documents are read
# from environment variables of their names (JAX_NUM_CPU_DEVICES, JAX_ENABLE_X64), but some are flags of another kind,
# which only `jax.config.update` sets, before the first device is used. Who measures with the variable concludes that
# asynchronous dispatch costs nothing; by `update` it was 0.2 ms of the 0.6 ms that a small program took.
# Seen: with both variables set, 3 devices and asynchronous dispatch as by default; after `update`, off.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=3 JAX_CPU_ENABLE_ASYNC_DISPATCH=0
found=$("$work/venv/bin/python" -c '
import jax
by_variable = jax.config.read("jax_cpu_enable_async_dispatch"), len(jax.devices())
jax.config.update("jax_cpu_enable_async_dispatch", False)
print(*by_variable, jax.config.read("jax_cpu_enable_async_dispatch"))')
echo "asynchronous dispatch and devices by variables, and asynchronous dispatch after an update: $found"
[ "$found" = "True 3 False" ]
echo "as described"
