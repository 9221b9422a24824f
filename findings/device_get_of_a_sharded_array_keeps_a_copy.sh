#!/usr/bin/env bash
# jax 0.10.2: `jax.device_get` of an array that is sharded over several devices leaves a second copy of it in host memory,
# cached inside the array, for as long as the array lives; the result that was asked for is that copy, and dropping it
# frees nothing. Of an array on one CPU device nothing is kept. So a loop that copies a sharded state to the host, to
# save it, holds the state twice from then on, and a program that fitted before its first save may not fit after it.
# Seen: 256 MB over 4 CPU devices: +256 MB of resident memory after the result was deleted; on 1 device: 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2' psutil
for devices in 1 4; do
  XLA_FLAGS="--xla_force_host_platform_device_count=$devices" JAX_PLATFORMS=cpu "$work/venv/bin/python" - "$devices" <<'P'
import gc
import sys

import jax
import numpy as np
import psutil
from jax.sharding import NamedSharding, PartitionSpec

devices, megabytes = int(sys.argv[1]), 256
mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
place = NamedSharding(mesh, PartitionSpec("x"))
made = jax.jit(lambda: jax.numpy.ones((megabytes * 2**18,), "float32"), out_shardings=place)()
made.block_until_ready()
resident = psutil.Process().memory_info
before = resident().rss
copy = jax.device_get(made)
assert isinstance(copy, np.ndarray)
del copy
gc.collect()
kept = round((resident().rss - before) / 2**20)
print(f"{devices} device(s): {kept} MB more are resident after the copy was deleted")
assert abs(kept - (megabytes if devices > 1 else 0)) < 40, kept
P
done
echo "as described"
