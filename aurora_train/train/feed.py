"""The batches of a run: `feed(step, state) -> batch`, the same call for every kind of data.

Stored data is read ahead by threads and ignores the state. Experience (`Recipe.experience`) is made from the state on
demand. Each of several processes makes or reads only the rows of its own devices; the step always receives global
arrays.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from aurora_train import mesh as meshes
from aurora_train.check.blame import place_of, recipe_code
from aurora_train.data.batches import batches, places, read_batch
from aurora_train.data.order import examples_at
from aurora_train.errors import UserError
from aurora_train.machine import processes
from aurora_train.random import example_keys, stream
from aurora_train.recipe import makes_experience
from aurora_train.train.experience import Actor, Journal, Programs


class StoredFeed:
    """Batches of a Source, from data step `start` up to `stop`, read ahead; a context manager that ends its threads."""

    def __init__(self, session, start: int, stop: int):
        train, self._mesh = session.config.train, session.mesh
        self._batch, self._rows = train.batch, rows_here(session.mesh, train.batch)
        self._ahead = batches(session.source, train.seed, train.batch, start, stop, rows=self._rows)

    def __call__(self, step: int, state) -> dict[str, jax.Array]:
        """The batch of data step `step`, which increases by one from `start`; arrays [B, ...] over all devices."""
        number, rows = next(self._ahead)
        assert number == step, (number, step)
        return put_rows(rows, self._mesh, self._batch, self._rows)

    def __enter__(self) -> StoredFeed:
        return self

    def __exit__(self, *exc) -> None:
        self._ahead.close()


class ExperienceFeed:
    """Batches that the model makes, from data step `start` on; a context manager that closes the run's journal."""

    def __init__(self, session, start: int):
        self._session = session
        self._rows = rows_here(session.mesh, session.config.train.batch)
        self._programs = Programs(session)
        self._journal = Journal(session.run.journal(processes.index()), start)
        self._stream = stream(session.config.train.seed, "experience")

    def __call__(self, step: int, state) -> dict[str, jax.Array]:
        """The batch of data step `step`, made with the model in `state`; arrays [B, ...] over all devices."""
        batch, _ = self.made(step, state)
        return put_rows(batch, self._session.mesh, self._session.config.train.batch, self._rows)

    def made(self, step: int, state) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """This process's rows of a batch on the host, and the indices for which they were made."""
        train, recipe = self._session.config.train, self._session.recipe
        indices = examples_at(self._session.source, train.seed, step, train.batch)[self._rows]
        example = places(step, train.batch)[self._rows]
        actor = Actor(self._programs, meshes.local_view(state), step, self._journal)
        with recipe_code(recipe, "experience"):
            batch = recipe.experience(actor, indices, example_keys(self._stream, step, example))
        batch = {name: np.asarray(array) for name, array in batch.items()}
        _refuse_other_shapes(recipe, batch, self._session.program.shapes, len(indices))
        return {**batch, "example": example}, indices

    def __enter__(self) -> ExperienceFeed:
        return self

    def __exit__(self, *exc) -> None:
        self._journal.close()


def open_feed(session, start: int, stop: int) -> StoredFeed | ExperienceFeed:
    """The feed of a session for the data steps `start` to `stop`: `with open_feed(...) as feed: feed(step, state)`."""
    return ExperienceFeed(session, start) if makes_experience(session.recipe) else StoredFeed(session, start, stop)


def batch_at(session, step: int, state) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One batch on the host for inspection, and its examples' indices: all rows, or for experience this process's."""
    train = session.config.train
    if makes_experience(session.recipe):
        with ExperienceFeed(session, step) as feed:
            return feed.made(step, state)
    indices = examples_at(session.source, train.seed, step, train.batch)
    return read_batch(session.source, train.seed, train.batch, step), indices


def _refuse_other_shapes(recipe, batch: dict, shapes: dict, examples: int) -> None:
    """UserError if a batch differs from what `Recipe.shapes` announced: the step was compiled for that."""
    where = place_of(type(recipe).experience)
    made = {name: (array.shape, str(array.dtype)) for name, array in batch.items()}
    for name, shape in shapes.items():
        wanted = ((examples, *shape.shape), str(np.dtype(shape.dtype)))
        if made.pop(name, None) != wanted:
            known = f"`{name}` of {batch[name].dtype}{list(batch[name].shape)}" if name in batch else f"no `{name}`"
            raise UserError(
                f"`experience` returned {known}", where=where, why=f"`shapes` announced {wanted[1]}{list(wanted[0])}",
                hint="make both agree; the leading axis is the examples",
            )  # fmt: skip
    if made:
        raise UserError(
            f"`experience` returned `{next(iter(made))}`, which `shapes` does not announce", where=where,
            hint="add it to `shapes`, or leave it out",
        )  # fmt: skip


def rows_here(mesh: Mesh, batch: int) -> slice:
    """The rows of a global batch that lie on this process's devices: all of them if there is one process."""
    if processes.count() == 1:
        return slice(0, batch)
    held = meshes.batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    parts = sorted({place[0].indices(batch)[:2] for place in held})
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
