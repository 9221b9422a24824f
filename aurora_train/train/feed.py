"""Where the batches of a run come from: `feed(step, state) -> batch`, the same call for every kind of data.

Stored data is read ahead by threads and ignores the state. Several processes read the rows of their own devices and
nothing else; the batch that the step is given is one global array whoever read it.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from aurora_train import mesh as meshes
from aurora_train.data.batches import batches
from aurora_train.machine import processes


class StoredFeed:
    """Batches of a Source, from data step `start` up to `stop`, read ahead; a context manager that ends its threads."""

    def __init__(self, session, start: int, stop: int):
        train, self._mesh = session.config.train, session.mesh
        self._rows = rows_here(session.mesh, train.batch)
        self._batch = train.batch
        self._ahead = batches(session.source, train.seed, train.batch, start, stop, rows=self._rows)

    def __call__(self, step: int, state) -> dict[str, jax.Array]:
        """The batch of data step `step`, which counts up from `start` by one; arrays [B, ...] over all devices."""
        number, rows = next(self._ahead)
        assert number == step, (number, step)
        return put_rows(rows, self._mesh, self._batch, self._rows)

    def __enter__(self) -> StoredFeed:
        return self

    def __exit__(self, *exc) -> None:
        self._ahead.close()


def open_feed(session, start: int, stop: int) -> StoredFeed:
    """The feed of a session for the data steps `start` to `stop`: `with open_feed(...) as feed: feed(step, state)`."""
    return StoredFeed(session, start, stop)


def rows_here(mesh: Mesh, batch: int) -> slice:
    """The rows of a global batch that lie on this process's devices: all of them where there is one process."""
    if processes.count() == 1:
        return slice(0, batch)
    places = meshes.batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    parts = sorted(set(place[0].indices(batch)[:2] for place in places))
    assert all(one[1] == other[0] for one, other in zip(parts, parts[1:], strict=False)), parts
    return slice(parts[0][0], parts[-1][1])


def put_rows(arrays: dict[str, np.ndarray], mesh: Mesh, batch: int, rows: slice) -> dict[str, jax.Array]:
    """This process's `rows` of a global batch of `batch` examples -> the global arrays [batch, ...]."""
    sharding = meshes.batch_sharding(mesh)
    if processes.count() == 1:
        return jax.device_put(arrays, sharding)

    def place(array):
        def part(index):
            start, stop, _ = index[0].indices(batch)
            return array[start - rows.start : stop - rows.start]

        return jax.make_array_from_callback((batch, *array.shape[1:]), sharding, part)

    return jax.tree.map(place, arrays)
