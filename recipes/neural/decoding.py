"""Neural decoding: predicts the velocity of the hand from the spikes of motor cortex, bin by bin and causally.

The velocity of bin t is decoded only from the spikes of bins up to t, within `data.window` bins and within the trial,
so the score is what a closed-loop decoder would reach. Whole trials are held out by a hash of (recording, trial). Ridge
regression, a Wiener filter and a Kalman filter are fitted to the same training trials in the same run.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.recipe import Loss, few
from neural.settings import SIMULATED, OfRecording, Recorded, refuse_heads

INPUT_SITE = 0xD  # distinguishes the mask of dropped spikes from the masks inside the model


class ModelConfig(Section):
    """A causal sequence model between two linear maps."""

    kind: Literal["transformer", "gru"] = setting("transformer", help="what mixes the bins")
    width: int = setting(64, ge=1, help="size of the residual stream, or of the GRU's state")
    layers: int = setting(2, ge=1, help="number of blocks")
    heads: int = setting(4, ge=1, help="attention heads (transformer only)")
    dropout: float = setting(0.2, ge=0, lt=1, help="share of activations dropped in training")
    input_dropout: float = setting(0.2, ge=0, lt=1, help="share of spike counts dropped in training")


class DataConfig(Recorded):
    """The recording, how it is binned, and the series to decode."""

    behavior: str = setting("processing/behavior/hand_vel", help="path in the file of the series to decode")


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()


class NeuralDecoding(OfRecording):
    """Spikes to velocity. Batches: spikes uint16[B, T, U], velocity float32[B, T, D] standardised, weights [B, T]."""

    Config = Config
    metric = ("r2", "max")

    @classmethod
    def check(cls, config) -> None:
        if config.model.kind == "transformer":
            refuse_heads(config.model.width, config.model.heads)

    # Data

    @property
    def behavior(self) -> str:
        return self.config.data.behavior

    def facts(self) -> dict:
        """The units and the number of axes, and the scale of each axis over the training trials."""
        from neural.windows import Standard

        velocity = self._trials.split("train", self.config.data.held_out).velocity
        standard = Standard.of(velocity)
        scale = {"velocity_mean": standard.mean, "velocity_deviation": standard.deviation}
        inherited = {name: self.inherited[name] for name in scale if name in self.inherited}
        own = {"unit_ids": self._trials.unit_ids.tolist(), "velocity_unit": self._trials.unit}
        return {"units": self._trials.spikes.shape[1], "axes": velocity.shape[1], **own, **scale, **inherited}

    @property
    def _standard(self):
        from neural.windows import Standard

        return Standard(np.array(self.known["velocity_mean"]), np.array(self.known["velocity_deviation"]))

    @functools.cache  # noqa: B019 - a recipe lives as long as its run
    def data(self, split: str):
        """Windows of one split: "train", "validation" or "test"."""
        from neural.windows import Windows

        return Windows(self._trials.split(split, self.config.data.held_out), self.config.data.window, self._standard)

    # Model and loss

    def model(self, rngs):
        """spikes [B, T, U] -> standardised velocity float32[B, T, D]; output t sees bins up to t."""
        from neural.sequence import CausalGRU, CausalTransformer

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

    def responder(self, predict):
        """Answers bins of spikes with velocity in the unit of the recording: see `neural.streaming.Stream`."""
        from neural.streaming import Stream

        unit_ids = self.known.get("unit_ids", list(range(self.known["units"])))
        return Stream(predict, self.config.data.window, unit_ids, self._standard.undo)

    # Score

    def score(self, predict, split, key, workdir, progress) -> dict:
        """R2 over all bins of the split's trials, and how long one bin takes to decode (milliseconds)."""
        from neural.velocity import decode, latency, scores, velocity_plots

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
        """R2 of ridge regression over the decoder's history, a Wiener filter and a Kalman filter.

        The penalty of ridge and the lag of the Kalman filter are chosen on validation trials.
        """
        from neural.kalman import kalman_decoder
        from neural.linear import linear_decoder

        window = self.config.data.window
        progress(0, 3, "fitting ridge")
        fits = {"ridge": linear_decoder(self.data, lags=window, penalties=np.logspace(1, 6, 11))}
        progress(1, 3, "fitting the Wiener filter")
        fits["wiener"] = linear_decoder(self.data, lags=min(10, window), penalties=[1e-6])
        progress(2, 3, "fitting the Kalman filter")
        fits["kalman"] = kalman_decoder(self.data)
        progress(3, 3, "linear decoders")
        columns = list(dict.fromkeys(name for fit in fits.values() for name in fit))
        table = {
            "title": "Linear decoders, fitted to the same training trials, on the same test trials",
            "columns": ["decoder", *columns],
            "rows": [[name, *(fit.get(column) for column in columns)] for name, fit in fits.items()],
        }
        return {name: fit["r2"] for name, fit in fits.items()} | {"tables": [table]}
