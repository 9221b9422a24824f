"""A run's checkpoints as seen by every process but the leader. They can be read; only the leader writes them."""

from __future__ import annotations

from aurora_train.checkpoint.store import CheckpointStore


class FollowedStore(CheckpointStore):
    """Reads what the leader wrote. Methods that would write do nothing."""

    def restore(self, step, tree, shardings):
        """Like the leader's, and it sees every checkpoint that the leader has saved by now."""
        self.outdated = True
        return super().restore(step, tree, shardings)

    def save(self, step, tree, record, *, copy=True) -> None:
        """Does nothing: the leader holds the whole of the same state and saves it."""

    def sweep(self) -> None:
        """Does nothing."""

    def attach_score(self, step, score, *, lower_is_better=True) -> None:
        """Does nothing."""

    def retain(self) -> list[int]:
        """Deletes nothing."""
        return []

    def make_room(self, needed) -> list[int]:
        """Deletes nothing."""
        return []
