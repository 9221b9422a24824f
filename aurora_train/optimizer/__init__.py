"""The update rule of a run: the direction and length of a step, and the format of the moments."""

from aurora_train.optimizer.stacks import global_norm, join, partition, segments_of
from aurora_train.optimizer.update import Optimizer, build, stored

__all__ = ["Optimizer", "build", "global_norm", "join", "partition", "segments_of", "stored"]
