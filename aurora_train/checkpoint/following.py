"""A run's checkpoints as seen by every process but the leader: they are read, and this process's part is written.

A process that holds nothing alone, as under a mesh of `data` only, writes nothing: the leader holds all of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from aurora_train.checkpoint import durable, frozen, layout, parts, writer
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.files import make_folder
from aurora_train.machine import processes


class FollowedStore(CheckpointStore):
    """Reads what all wrote, and writes this process's part, which the leader puts beside the others'."""

    def __init__(self, folder: Path, trash: Path, *, owners: tuple[int, ...] = (0,), **policy):
        super().__init__(folder, trash, owners=owners, **policy)
        self._writes = processes.index() in owners
        self._part = folder / parts.folder_of(processes.index())

    def restore(self, step, tree, shardings):
        """Like the leader's, and it sees every checkpoint that the leader has saved by now."""
        self.outdated = True
        return super().restore(step, tree, shardings)

    def save(self, step, tree, record, **how) -> None:
        """Write this process's part, if it has one: as the leader's, without the record."""
        if self._writes:
            super().save(step, tree, {}, **how)

    def sweep(self) -> None:
        """Does nothing: the leader does it."""

    def attach_score(self, step, score, *, lower_is_better=True) -> None:
        """Does nothing."""

    def retain(self) -> list[int]:
        """Deletes nothing."""
        return []

    def make_room(self, needed) -> list[int]:
        """Deletes nothing."""
        return []

    # ---- inside

    def _take_back(self, step) -> None:
        """Nothing counts before the leader has sealed it."""

    def _discard(self, step: int) -> None:
        shutil.rmtree(self._part, ignore_errors=True)

    def _begin(self, step: int, flat: dict):
        from orbax.checkpoint import v1 as ocp

        make_folder(self._part)
        shutil.rmtree(self._part / str(step), ignore_errors=True)  # of a save that did not count
        if not flat:
            return None
        with writer.options():
            return ocp.save_checkpointables_async(self._part / str(step), {writer.STATE: flat})

    def _finish(self, step, response, record, name) -> int:
        with self._told(name, later=False), self._reported(step):
            if response:
                response.result()
                durable.seal(self._part / str(step), {"step": step})
        self.writers.report(name, parts.SEALED if response else parts.NOTHING)
        self.writers.settle(name, step, self._part)
        return step

    def _frozen_written(self, step: int, tree, name: str) -> str:
        flat, folder = layout.unread(tree, frozen.is_frozen), self._part / frozen.FOLDER
        with self._told(name, later=False), self._reported(step):
            make_folder(self._part)
            shutil.rmtree(folder, ignore_errors=True)
            if flat:
                frozen.write(folder, flat)
                frozen.seal(folder, flat, None, [])
        self.writers.report(name, parts.SEALED if flat else parts.NOTHING)
        return self.writers.settle(name, step, self._part)
