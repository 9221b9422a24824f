"""Batches by number: Grain's threads read ahead, but only `order` decides what batch `data_step` holds.

There is no iterator state to save: to continue at a step is to request batches from that step. There are deliberately
no worker processes: Grain changes the data when their number changes, and a killed trainer leaves them behind.
"""

from __future__ import annotations

import numpy as np

from aurora_train.data.order import examples_at
from aurora_train.errors import UserError
from aurora_train.recipe import Source

_THREADS = 2


class BatchFeed:
    """Iterator of (data_step, batch), and a context manager that ends its threads. Made by `batches`."""

    def __init__(self, iterator):
        self._iterator = iterator

    def __iter__(self) -> BatchFeed:
        return self

    def __next__(self) -> tuple[int, dict[str, np.ndarray]]:
        try:
            return next(self._iterator)
        except StopIteration:
            raise
        except BaseException:
            self.close()  # Grain would continue with the batch after the failed one
            raise

    def close(self) -> None:
        """End the threads and drop what they have read ahead."""
        self._iterator.close()

    def __enter__(self) -> BatchFeed:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def batches(
    source: Source,
    seed: int,
    batch: int,
    start_step: int,
    stop_step: int,
    *,
    prefetch: int = 4,
    rows: slice = slice(None),
) -> BatchFeed:
    """The batches of `start_step <= data_step < stop_step`, in order: `with batches(...) as feed: next(feed)`.

    Each is (data_step, `read_batch` of that step).

    Args:
        source: the data; an error in `take` is raised by `next`, and the feed is then closed.
        batch: examples of the global batch.
        rows: the part of the global batch that this process holds; all of it by default.
        prefetch: batches kept ready; 0 reads in the caller's thread.
    """
    import grain

    def read(data_step: int) -> tuple[int, dict[str, np.ndarray]]:
        try:
            return int(data_step), read_batch(source, seed, batch, int(data_step), rows)
        except SystemExit as error:  # it would end this process with a successful status
            raise UserError(
                f"reading the batch of data step {int(data_step)} ended its thread",
                where=type(source).__name__,
                why="the recipe's data raised SystemExit",
            ) from error

    options = grain.ReadOptions(num_threads=_THREADS if prefetch else 0, prefetch_buffer_size=prefetch)
    return BatchFeed(iter(grain.MapDataset.range(start_step, stop_step).map(read).to_iter_dataset(options)))


def read_batch(
    source: Source, seed: int, batch: int, data_step: int, rows: slice = slice(None)
) -> dict[str, np.ndarray]:
    """The batch of one step: `source.take` of its indices, plus `example`, uint32[B].

    `example` is the place in the endless stream of epochs, data_step * batch + i, modulo 2**32. Unlike an index it
    differs between two visits of one example, even within a batch that spans epochs, and so do random keys made of it.
    """
    chosen = examples_at(source, seed, data_step, batch)[rows]
    return {**source.take(chosen), "example": places(data_step, batch)[rows]}


def places(data_step: int, batch: int) -> np.ndarray:
    """uint32[batch]: `example` of the global batch of one step."""
    first = data_step * batch
    return (np.arange(first, first + batch, dtype=np.int64) & 0xFFFFFFFF).astype(np.uint32)
