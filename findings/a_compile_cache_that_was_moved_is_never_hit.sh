#!/usr/bin/env bash
# jax 0.10.2: the persistent compilation cache cannot be moved, copied, baked into an image under one path and mounted
# under another, or reached through a symbolic link: every program is compiled again and stored beside its twin, without
# a word. The key of an entry covers the path of the cache's own folder, because by default jax sets one of XLA's options
# (the folder of autotuning results, for GPUs) to a folder within the cache, and hashes the options; so it is on a CPU,
# where nothing is autotuned. With `jax_persistent_cache_enable_xla_caches` set to "none" a copy is hit everywhere.
# Seen: 3 entries, and 6 after the same program ran with a copy of the folder; with "none" 3 and 3.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
export JAX_PLATFORMS=cpu JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

entries() { # in FOLDER, after a small program ran with it
  JAX_COMPILATION_CACHE_DIR=$1 "$work/venv/bin/python" -c '
import jax
jax.jit(lambda x: jax.numpy.tanh(x) @ x)(jax.numpy.ones((64, 64))).block_until_ready()'
  find "$1" -name '*-cache' | wc -l
}

for caches in default none; do
  if [ "$caches" = none ]; then export JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES=none; fi
  first=$(entries "$work/$caches")
  [ "$(entries "$work/$caches")" = "$first" ] # the folder itself is hit
  cp -r "$work/$caches" "$work/$caches-moved"
  moved=$(entries "$work/$caches-moved")
  echo "$caches: $first entries, $moved after the same program ran with a copy of the folder"
  if [ "$caches" = default ]; then [ "$moved" = $((2 * first)) ]; else [ "$moved" = "$first" ]; fi
done
echo "as described"
