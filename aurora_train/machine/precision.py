"""Resolves `train.precision: auto` or `native`, the number format of a run, once, and writes it into the run's config.

No other module sees these two. A run that has begun keeps its precision on whatever device it continues; otherwise the
device decides. The hash that names a run's folder is that of the config as given, so it does not change.
"""

from __future__ import annotations

from aurora_train.config.schema import UNSETTLED
from aurora_train.config.yaml import read_file
from aurora_train.machine.profile import precision_expected, precision_here
from aurora_train.machine.targets import find_machine


def settled(config, run=None, *, machine: str | None = None):
    """A config without `auto` and `native`: as `run` began, else for `machine` (a name of `machine.targets`), else for
    this one.

    Returns the same object if nothing is to be settled. Jax is asked for the device if neither `run` nor `machine`
    decides.
    """
    if config.train.precision not in UNSETTLED:
        return config
    if run is not None and run.has_begun():
        written = (read_file(run.config).value.get("train") or {}).get("precision", "auto")
        if written not in UNSETTLED:
            return in_precision(config, written)
    if machine is None:
        return in_precision(config, precision_here(config.train.precision))
    return in_precision(config, "bfloat16" if "bfloat16" in find_machine(machine).row.peak_flops else "float32")


def as_in(config, known):
    """A config whose `auto` or `native` is replaced by the precision of `known`, the config of a run."""
    return in_precision(config, known.train.precision) if config.train.precision in UNSETTLED else config


def in_precision(config, precision: str):
    """The same config in another number format."""
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def expected(config) -> str | None:
    """One line on how `auto` or `native` will resolve here, without asking jax; None if neither is set or the result is
    unknown."""
    asked = config.train.precision
    here = precision_expected(asked) if asked in UNSETTLED else None
    said = f"train.precision: {asked} is {here} on this machine; a run settles it at its first start and keeps it"
    return here and said
