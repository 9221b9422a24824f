"""The checkpoints of a run as a process sees them that does not lead it: to be read. The leader writes."""

from __future__ import annotations

from aurora_train.checkpoint.store import CheckpointStore


class FollowedStore(CheckpointStore):
    """Reads what the leader wrote; everything that would write returns as if there were nothing to do."""

    def restore(self, step, tree, shardings):
        """As the leader's, of whatever the leader has saved by now."""
        self._outdated = True
        return super().restore(step, tree, shardings)

    def save(self, step, tree, record) -> None:
        """Nothing: the leader holds the same state whole."""

    def sweep(self) -> None:
        """Nothing."""

    def attach_score(self, step, score, *, lower_is_better=True) -> None:
        """Nothing."""

    def retain(self) -> list[int]:
        """Nothing is given up."""
        return []

    def make_room(self, needed) -> list[int]:
        """Nothing is given up."""
        return []
