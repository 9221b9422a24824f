"""The settings that the recipes of neural recordings share, and how a recording becomes the trials that they name."""

from __future__ import annotations

import functools
from pathlib import Path

from aurora_train.config import Section, setting
from aurora_train.errors import UserError
from aurora_train.recipe import Recipe

SIMULATED = "simulated"


class Recorded(Section):
    """A recording, how it is binned, and what is held out."""

    source: str = setting(
        SIMULATED, resume="located", path_unless=(SIMULATED,), help="simulated, or the path of an NWB (HDF5) file"
    )
    trials: str | None = setting(
        "intervals/trials", help="path in the file of the table of trials or epochs; null = stretches of equal length"
    )
    stretch_s: float = setting(5.0, gt=0, help="with trials: null, the length of such a stretch in seconds")
    units_table: str = setting("units", help="path in the file of the table of units")
    units: list[int] | None = setting(None, help="ids of the units to use; null = all")
    bin_ms: float = setting(20.0, gt=0, help="length of a bin in milliseconds")
    window: int = setting(32, ge=2, help="bins of a training example")
    held_out: float = setting(0.2, gt=0, lt=0.6, help="share of trials for the test; half as many for validation")
    simulated_trials: int = setting(300, ge=10, help="reaches in the simulated session")
    simulated_units: int = setting(96, ge=1, help="units in the simulated session")
    simulated_seed: int = setting(0, ge=0, help="seed of the simulated session, separate from the run's")


def recording_path(data: Recorded, cache: Path) -> Path:
    """The NWB file of a config; the simulated session is written into `cache` if it is not there yet."""
    from neural.reach_simulation import prepare_simulation

    if data.source != SIMULATED:
        return Path(data.source).expanduser()
    return prepare_simulation(cache, data.simulated_trials, data.simulated_units, data.simulated_seed)


def binned_trials(path: Path, data: Recorded, behavior: str | None):
    """The `neural.spikes.Trials` of a recording; without `behavior` they have no velocity. UserError as its readers."""
    from neural.nwb import read_recording
    from neural.spikes import bin_trials, in_stretches

    recording = read_recording(path, behavior=behavior, units=data.units_table, trials=data.trials)
    if data.trials is None:
        recording = in_stretches(recording, data.stretch_s)
    return bin_trials(recording, data.bin_ms / 1000, data.units)


class OfRecording(Recipe):
    """What the recipes of a recording share: its trials, and their preparation."""

    unit = "bins"
    behavior: str | None = None  # path in the file of the series that is needed beside the spikes

    def prepare(self, progress) -> None:
        """Reports the trials, and those that were left out."""
        simulated = self.config.data.source == SIMULATED
        progress(0, 2, "simulating a session" if simulated else "reading the recording")
        path = self._path
        progress(1, 2, f"binning {path.name}")
        trials = self._trials
        reasons = "".join(f", {number} {reason} left out" for reason, number in trials.left_out.items())
        progress(2, 2, f"{len(trials.ids)} trials{reasons}")

    @functools.cached_property
    def _path(self) -> Path:
        return recording_path(self.config.data, self.cache)

    @functools.cached_property
    def _trials(self):
        return binned_trials(self._path, self.config.data, self.behavior)

    def flops_per_target(self, num_parameters: int) -> float:
        """6 N per bin, forward and backward (Kaplan et al. 2020); attention over so few bins is neglected."""
        return 6.0 * num_parameters


def refuse_heads(width: int, heads: int) -> None:
    """UserError if a head's size is not even: rotary positions turn pairs of its entries."""
    if width % (2 * heads):
        fitting = [str(n) for n in range(1, width + 1) if width % (2 * n) == 0]
        raise UserError(
            f"{heads} heads do not divide width {width} into heads of an even size",
            where="model.heads",
            hint=f"use one of these for heads: {', '.join(fitting)}" if fitting else "choose an even width",
        )
