"""Neural decoding: predicts the velocity of the hand from the spikes of motor cortex, bin by bin and causally.

The velocity of bin t is decoded only from the spikes of bins up to t, within `data.window` bins and within the trial,
so the score is what a closed-loop decoder would reach. Whole trials are held out by a hash of (recording, trial). Ridge
regression and a Wiener filter are fitted to the same training trials in the same run and scored beside it.
"""

from __future__ import annotations

import functools
import time
from typing import Literal

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.errors import UserError
from aurora_train.recipe import Loss, Recipe, few

SIMULATED = "simulated"
INPUT_SITE = 0xD  # distinguishes the mask of dropped spikes from the masks inside the model


class ModelConfig(Section):
    """A causal sequence model between two linear maps."""

    kind: Literal["transformer", "gru"] = setting("transformer", help="what mixes the bins")
    width: int = setting(64, ge=1, help="size of the residual stream, or of the GRU's state")
    layers: int = setting(2, ge=1, help="number of blocks")
    heads: int = setting(4, ge=1, help="attention heads (transformer only)")
    dropout: float = setting(0.2, ge=0, lt=1, help="share of activations dropped in training")
    input_dropout: float = setting(0.2, ge=0, lt=1, help="share of spike counts dropped in training")


class DataConfig(Section):
    """The recording, and how it is binned."""

    source: str = setting(
        SIMULATED, resume="located", path_unless=(SIMULATED,), help="simulated, or the path of an NWB (HDF5) file"
    )
    behavior: str = setting("processing/behavior/hand_vel", help="path in the file of the series to decode")
    trials: str = setting("intervals/trials", help="path in the file of the table of trials")
    units: list[int] | None = setting(None, help="ids of the units to use; null = all")
    bin_ms: float = setting(20.0, gt=0, help="length of a bin in milliseconds")
    window: int = setting(32, ge=2, help="bins of history a decoder sees, the current one included")
    held_out: float = setting(0.2, gt=0, lt=0.6, help="share of trials for the test; half as many for validation")
    simulated_trials: int = setting(300, ge=10, help="reaches in the simulated session")
    simulated_units: int = setting(96, ge=1, help="units in the simulated session")
    simulated_seed: int = setting(0, ge=0, help="seed of the simulated session, separate from the run's")


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()


class NeuralDecoding(Recipe):
    """Spikes to velocity. Batches: spikes uint16[B, T, U], velocity float32[B, T, D] standardised, weights [B, T]."""

    Config = Config
    unit, metric = "bins", ("r2", "max")

    @classmethod
    def check(cls, config) -> None:
        width, heads = config.model.width, config.model.heads
        # Rotary positions turn pairs of a head's entries, so the size of a head must be even.
        if config.model.kind == "transformer" and width % (2 * heads):
            fitting = [str(n) for n in range(1, width + 1) if width % (2 * n) == 0]
            raise UserError(
                f"{heads} heads do not divide width {width} into heads of an even size",
                where="model.heads",
                hint=f"use one of these for heads: {', '.join(fitting)}" if fitting else "choose an even width",
            )

    # Data

    def prepare(self, progress) -> None:
        progress(0, 2, "simulating a session" if self.config.data.source == SIMULATED else "reading the recording")
        path = self._path
        progress(1, 2, f"binning {path.name}")
        dropped = self._trials.uncovered
        progress(2, 2, f"{len(self._trials.ids)} trials" + (f", {dropped} without behaviour left out" * bool(dropped)))

    @functools.cached_property
    def _path(self):
        from pathlib import Path

        from neural.reach_simulation import prepare_simulation

        data = self.config.data
        if data.source != SIMULATED:
            return Path(data.source).expanduser()
        return prepare_simulation(self.cache, data.simulated_trials, data.simulated_units, data.simulated_seed)

    @functools.cached_property
    def _trials(self):
        from neural.nwb import read_recording
        from neural.spikes import bin_trials

        data = self.config.data
        recording = read_recording(self._path, behavior=data.behavior, trials=data.trials)
        return bin_trials(recording, data.bin_ms / 1000, data.units)

    def facts(self) -> dict:
        """The numbers of units and axes, and the scale of each axis over the training trials."""
        from neural.spikes import Standard

        velocity = self._trials.split("train", self.config.data.held_out).velocity
        standard = Standard.of(velocity)
        scale = {"velocity_mean": standard.mean, "velocity_deviation": standard.deviation}
        inherited = {name: self.inherited[name] for name in scale if name in self.inherited}
        return {"units": self._trials.spikes.shape[1], "axes": velocity.shape[1], **scale, **inherited}

    @property
    def _standard(self):
        from neural.spikes import Standard

        return Standard(np.array(self.known["velocity_mean"]), np.array(self.known["velocity_deviation"]))

    @functools.cache  # noqa: B019 - a recipe lives as long as its run
    def data(self, split: str):
        """Windows of one split: "train", "validation" or "test"."""
        from neural.spikes import Windows

        return Windows(self._trials.split(split, self.config.data.held_out), self.config.data.window, self._standard)

    # Model and loss

    def model(self, rngs):
        """spikes [B, T, U] -> standardised velocity float32[B, T, D]; output t sees bins up to t."""
        from aurora_train.nn.sequence import CausalGRU, CausalTransformer

        config = self.config.model
        shape = {"width": config.width, "layers": config.layers, "dropout": config.dropout}
        shape |= {"dtype": self.config.train.dtype, "rngs": rngs}
        units, axes = self.known["units"], self.known["axes"]
        if config.kind == "gru":
            return CausalGRU(units, axes, **shape)
        return CausalTransformer(units, axes, heads=config.heads, **shape)

    def loss(self, model, batch, key) -> Loss:
        """Squared error of the standardised velocity, averaged over axes, summed over measured bins."""
        import jax.numpy as jnp

        from aurora_train.nn.dropout import dropout

        spikes = dropout(batch["spikes"].astype(jnp.float32), self.config.model.input_dropout, key, INPUT_SITE)
        error = jnp.square(model(spikes, keys=key) - batch["velocity"]).mean(axis=-1)
        return Loss(jnp.sum(error * batch["weights"]), jnp.sum(batch["weights"]))

    def predict(self, model, batch):
        """Standardised velocity, float32[B, T, D]."""
        return model(batch["spikes"])

    def flops_per_target(self, num_parameters: int) -> float:
        """6 N per bin, forward and backward (Kaplan et al. 2020); attention over so few bins is neglected."""
        return 6.0 * num_parameters

    # Score

    def score(self, predict, split, key, workdir, progress) -> dict:
        """R2 over all bins of the split's trials, and how long one bin takes to decode (milliseconds)."""
        from neural.spikes import scores, velocity_plots

        windows = self.data(split)
        decoded = decode(predict, windows, progress)
        facts = windows.describe()
        notes = [
            f"R2 of the velocity over {facts['bins']} bins of {facts['trials']} held-out trials of {facts['source']}.",
            "Latency: one new bin given its history, batch 1, from counts on the host to velocity on the host.",
        ]
        if self.config.data.source == SIMULATED:
            notes.append("The session is simulated; only a real recording shows what a decoder is worth.")
        shown = {
            "notes": notes, "plots": velocity_plots(windows.trials, decoded),
            "remarks": few(facts["trials"], "trial", "raise data.held_out"),
        }  # fmt: skip
        return scores(windows.trials.velocity, decoded) | latency(predict, windows, progress) | shown

    def baselines(self, workdir, progress) -> dict:
        """R2 of ridge regression over the decoder's history, its penalty chosen on validation, and a Wiener filter."""
        from neural.linear import linear_decoder

        window = self.config.data.window
        progress(0, 2, "fitting ridge")
        fits = {"ridge": linear_decoder(self.data, lags=window, penalties=np.logspace(1, 6, 11))}
        progress(1, 2, "fitting the Wiener filter")
        fits["wiener"] = linear_decoder(self.data, lags=min(10, window), penalties=[1e-6])
        progress(2, 2, "linear decoders")
        table = {
            "title": "Linear decoders, fitted to the same training trials, on the same test trials",
            "columns": ["decoder", *fits["ridge"]],
            "rows": [[name, *fit.values()] for name, fit in fits.items()],
        }
        return {name: fit["r2"] for name, fit in fits.items()} | {"tables": [table]}


def decode(predict, windows, progress, batch: int = 256) -> np.ndarray:
    """Velocity of every bin of the windows' trials in its unit, float64[N, D], each decoded from its last T bins.

    A trial's first window gives its first T bins; every later bin comes from the window that ends with it.
    """
    velocity = np.full(windows.trials.velocity.shape, np.nan)
    last = windows.window - 1
    for start in range(0, len(windows), batch):
        # The last batch is padded with its last window, so that only one shape is compiled.
        wanted = np.minimum(np.arange(start, start + batch), len(windows) - 1)
        decoded = windows.standard.undo(np.asarray(predict({"spikes": windows.take(wanted)["spikes"]}), np.float64))
        for index, values in zip(wanted, decoded, strict=True):
            begin = 0 if windows.leads[index] else last
            rows = np.arange(windows.first[index] + begin, min(windows.first[index] + last + 1, windows.end[index]))
            velocity[rows] = values[begin : begin + len(rows)]
        progress(min(start + batch, len(windows)), len(windows), "decoding held-out trials")
    return velocity


def latency(predict, windows, progress, bins: int = 300) -> dict:
    """Wall time of decoding one new bin given its history, batch 1, from counts on the host to velocity on the host."""
    spikes = windows.take(np.arange(min(bins, len(windows))))["spikes"]
    predict({"spikes": spikes[:1]})  # compiles
    took = []
    for n in range(bins):
        history = spikes[n % len(spikes)][None]
        before = time.perf_counter()
        np.asarray(predict({"spikes": history}))[0, -1]
        took.append(1000 * (time.perf_counter() - before))
    progress(bins, bins, "timing single bins")
    return {"latency_ms_p50": float(np.percentile(took, 50)), "latency_ms_p99": float(np.percentile(took, 99))}
