#!/usr/bin/env bash
# jax 0.10.2 on a CPU: `np.asarray` of an array is a view of its buffer and takes no memory. While such a view lives, a
# jitted function to which that array is donated does not write into its buffer: it allocates another one. There is no
# warning, not even the one for donated buffers that are of no use; the donated array is simply not deleted. So a training
# loop that hands views of its state to a thread that saves them looks as if it saved without a copy, and holds the state
# twice from the next step on. It shows only in the address of the result, or in `is_deleted()`.
# Seen, 256 MB: without a view the result has the donated buffer's address; with one it has another, both stay resident.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2' psutil
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W error - <<'P'
import functools

import jax
import numpy as np
import psutil

MEGABYTES = 256


@functools.partial(jax.jit, donate_argnums=0)
def step(state):
    return state + 1


def taken(keep_a_view):
    """(whether the donated buffer was reused, MB that became resident)."""
    state = jax.block_until_ready(step(jax.numpy.zeros(MEGABYTES * 2**18, "float32")))
    view = np.asarray(state) if keep_a_view else None
    address, before = state.unsafe_buffer_pointer(), psutil.Process().memory_info().rss
    if keep_a_view:
        assert view.ctypes.data == address, "np.asarray made a copy"
    result = jax.block_until_ready(step(state))
    assert state.is_deleted() is not keep_a_view and float(result[0]) == 2.0
    if keep_a_view:
        assert view[0] == 1.0
    grown = round((psutil.Process().memory_info().rss - before) / 2**20)
    return result.unsafe_buffer_pointer() == address, grown


for keep_a_view in (False, True):
    reused, grown = taken(keep_a_view)
    print(f"{'with' if keep_a_view else 'without'} a view: buffer reused: {reused}, {grown} MB more are resident")
    assert reused is not keep_a_view and abs(grown - (MEGABYTES if keep_a_view else 0)) < 40
P
echo "as described"
