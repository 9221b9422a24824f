"""The update rule of a run: the direction and length of a step, and the format of the moments."""

from aurora_train.optimizer.schedule import make_schedule
from aurora_train.optimizer.stacks import global_norm, join, norm_of, partition, segments_of, squared
from aurora_train.optimizer.update import Optimizer, build, stored

__all__ = [
    "Optimizer", "build", "global_norm", "join", "make_schedule", "norm_of", "partition", "segments_of", "squared",
    "stored",
]  # fmt: skip
