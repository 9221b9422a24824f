"""Masked modelling of a neural population (NDT: Ye & Pandarinath 2021), scored by co-smoothing.

A transformer that sees whole windows, past and future, predicts the firing rates of all units from the spikes of the
held-in ones, of which whole bins and whole units (Zhang et al. 2024) are masked in training. The units that are held
out are never an input, so their rates are inferred from the other units alone. The score is in bits per spike over the
held-out units of held-out trials, as the Neural Latents Benchmark defines it (Pei et al. 2021); Gaussian smoothing with
a Poisson regression is beside it.
"""

from __future__ import annotations

import functools

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.recipe import Loss, few
from neural.settings import SIMULATED, OfRecording, Recorded, refuse_heads

MASK_SITE, UNITS_SITE, INPUT_SITE = 0xB, 0xC, 0xD  # distinguish these masks from the masks inside the model


class ModelConfig(Section):
    """A bidirectional transformer between two linear maps, and what it does not see in training."""

    width: int = setting(96, ge=1, help="size of the residual stream")
    layers: int = setting(3, ge=1, help="number of blocks")
    heads: int = setting(4, ge=1, help="attention heads")
    reach: int | None = setting(8, ge=1, help="bins to either side that a layer sees, itself included; null = all")
    smooth_ms: float = setting(
        60.0, ge=0, help="deviation of a Gaussian, whose mean of the counts is an input beside them; 0 = no such input"
    )
    dropout: float = setting(0.2, ge=0, lt=1, help="share of activations dropped in training")
    input_dropout: float = setting(0.1, ge=0, lt=1, help="share of spike counts dropped in training")
    mask: float = setting(0.25, gt=0, le=0.5, help="share of bins whose spikes are masked in training, and predicted")
    mask_units: float = setting(0.25, ge=0, le=0.5, help="share of held-in units masked in a whole window, likewise")


class DataConfig(Recorded):
    """The recording, how it is binned, and the units that are held out."""

    window: int = setting(64, ge=2, help="bins of a training example; a shorter trial is padded")
    held_out_units: float = setting(0.25, gt=0, lt=1, help="share of units that are never an input, by hash of the id")


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()


class MaskedModel(OfRecording):
    """Spikes to rates. Batches: spikes uint16[B, T, U], of all units, and weights float32[B, T], 0 for padding."""

    Config = Config
    metric = ("co_bps", "max")

    @classmethod
    def check(cls, config) -> None:
        refuse_heads(config.model.width, config.model.heads)

    # Data

    def facts(self) -> dict:
        """The columns of held-in and held-out units; the mean and deviation of each unit over the training trials.

        Both are at least those of a Poisson count of FEWEST_COUNTS: a unit that spikes in test trials alone would be an
        input of thousands of deviations.
        """
        from neural.co_smoothing import FEWEST_COUNTS, hold_out_units

        spikes = self._trials.split("train", self.config.data.held_out).spikes.astype(np.float64)
        ids = self._trials.unit_ids
        held_in, held_out = hold_out_units(self._trials.identifier, ids, self.config.data.held_out_units)
        mean, deviation = spikes.mean(axis=0), spikes.std(axis=0)
        return {
            "held_in": held_in.tolist(), "held_out": held_out.tolist(), "units": ids.tolist(),
            "mean": np.maximum(mean, FEWEST_COUNTS), "deviation": np.maximum(deviation, FEWEST_COUNTS**0.5),
        }  # fmt: skip

    @functools.cache  # noqa: B019 - a recipe lives as long as its run
    def data(self, split: str):
        """Windows of one split: "train", "validation" or "test"."""
        from neural.windows import Windows

        return Windows(self._trials.split(split, self.config.data.held_out), self.config.data.window)

    # Model and loss

    def model(self, rngs):
        """float32[B, T, F] as `_inputs` makes them -> float32[B, T, U], log rates about their means."""
        from neural.sequence import BidirectionalTransformer

        config = self.config.model
        inputs = len(self.known["held_in"]) * (2 if config.smooth_ms else 1) + 1
        return BidirectionalTransformer(
            inputs, len(self.known["units"]), width=config.width, layers=config.layers,
            heads=config.heads, window=config.reach, dropout=config.dropout, dtype=self.config.train.dtype, rngs=rngs,
        )  # fmt: skip

    def _log_rates(self, model, batch, masked=None, hidden=None, keys=None):
        """Log of the expected counts, float32[B, T, U].

        Not seen are the bins `masked` bool[B, T] and, of the held-in units, `hidden` bool[B, held-in].
        """
        import jax.numpy as jnp

        real = batch["weights"] > 0  # padding is a segment of its own, which no bin of the trial sees
        seen = real if masked is None else real & ~masked
        inputs = self._inputs(batch["spikes"], seen.astype(jnp.float32), hidden, keys)
        return model(inputs, segments=real.astype(jnp.int32), keys=keys) + np.log(np.asarray(self.known["mean"]))

    def _inputs(self, spikes, seen, hidden, keys):
        """float32[B, T, F]: standardised counts of the held-in units, their Gaussian mean, a mark of unseen bins.

        `seen` float32[B, T] is 0 where the spikes are masked, which no entry then depends on.
        """
        import jax.numpy as jnp

        from aurora_train.nn.dropout import dropout
        from neural.smoothing import gaussian_weights

        held_in, config = np.array(self.known["held_in"]), self.config
        mean, deviation = (np.asarray(self.known[name], np.float32)[held_in] for name in ("mean", "deviation"))
        counts = (spikes[..., held_in].astype(jnp.float32) - mean) / deviation
        counts = dropout(counts, config.model.input_dropout, keys, INPUT_SITE) * seen[..., None]
        if hidden is not None:  # the others are scaled up, as dropout does
            counts = jnp.where(hidden[:, None], 0.0, counts) / (1 - config.model.mask_units)
        inputs = [counts, 1 - seen[..., None]]
        if config.model.smooth_ms:
            weights, scale = gaussian_weights(seen.shape[1], config.model.smooth_ms / config.data.bin_ms)
            total = jnp.einsum("ts,bsu->btu", weights, counts)
            inputs.insert(1, scale * total / jnp.maximum(seen @ weights, 1e-3)[..., None])
        return jnp.concatenate(inputs, axis=-1)

    def loss(self, model, batch, key) -> Loss:
        """Poisson negative log-likelihood in nats per unit, without log n!, summed over the bins.

        Held-out units count in every bin; held-in units where they are masked, divided by the share that is, so that
        the weight does not depend on the mask. Without a key every nth bin is masked, and no unit.
        """
        import jax.numpy as jnp

        held_in, held_out = (np.array(self.known[name]) for name in ("held_in", "held_out"))
        share, shape = self.config.model.mask, batch["weights"].shape
        if key is None:
            every = round(1 / share)
            masked, hidden, share = jnp.broadcast_to(jnp.arange(shape[1]) % every == every // 2, shape), None, 1 / every
            unseen = masked[..., None]
        else:
            of_units = self.config.model.mask_units
            masked, hidden = _drawn(key, MASK_SITE, share, shape[1]), _drawn(key, UNITS_SITE, of_units, len(held_in))
            unseen, share = masked[..., None] | hidden[:, None], 1 - (1 - share) * (1 - of_units)
        log_rates = self._log_rates(model, batch, masked, hidden, key)
        errors = jnp.exp(log_rates) - batch["spikes"].astype(jnp.float32) * log_rates
        inferred = errors[..., held_out].sum(axis=-1)
        filled = (errors[..., held_in] * unseen).sum(axis=-1) / share
        weights, units = batch["weights"], len(self.known["units"])
        total, weight = jnp.sum((inferred + filled) * weights) / units, jnp.sum(weights)
        return Loss(total, weight, {"held_out_nll": (jnp.sum(inferred * weights) / len(held_out), weight)})

    def predict(self, model, batch):
        """Expected counts of all units in each bin, float32[B, T, U], from the held-in units' spikes."""
        import jax.numpy as jnp

        return jnp.exp(self._log_rates(model, batch))

    # Score

    def score(self, predict, split, key, workdir, progress) -> dict:
        """Co-smoothing bits per spike over the held-out units and all bins of the split's trials."""
        from neural.co_smoothing import bits_per_spike, rate_plots, rates_of_trials

        windows, held_out = self.data(split), np.array(self.known["held_out"])
        rates, spikes = rates_of_trials(predict, windows, progress)[:, held_out], windows.trials.spikes[:, held_out]
        facts = windows.describe()
        notes = [
            f"Bits per spike over {int(spikes.sum())} spikes of {len(held_out)} held-out units in {facts['bins']} bins "
            f"of {facts['trials']} held-out trials of {facts['source']}; the null model is each unit's mean there.",
        ]
        if self.config.data.source == SIMULATED:
            notes.append("The session is simulated; only a real recording shows what a model is worth.")
        remarks = few(facts["trials"], "trial", "raise data.held_out") + few(len(held_out), "unit", "record more units")
        names = [self.known["units"][column] for column in held_out]
        return {
            "co_bps": bits_per_spike(rates, spikes), "held_out_units": len(held_out), "notes": notes,
            "plots": rate_plots(windows.trials, rates, spikes, names), "remarks": remarks,
        }  # fmt: skip

    def baselines(self, workdir, progress) -> dict:
        """The same score of Gaussian smoothing with a Poisson regression; of the true rates, if they are known."""
        from neural.co_smoothing import bits_per_spike
        from neural.smoothing import smoothing_baseline

        held_in, held_out = (np.array(self.known[name]) for name in ("held_in", "held_out"))
        trials = {split: self.data(split).trials for split in ("train", "validation", "test")}
        smoothed, table = smoothing_baseline(trials, held_in, held_out, progress)
        scores = {"smoothing": smoothed}
        if self.config.data.source == SIMULATED:
            from neural.reach_simulation import true_counts

            test = trials["test"]
            scores["true_rates"] = bits_per_spike(true_counts(self._path, test)[:, held_out], test.spikes[:, held_out])
        return scores | {"tables": [table]}


def _drawn(keys, site: int, share: float, size: int):
    """bool[B, size], each True with probability `share`, from the key of its example."""
    import jax

    return jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), share, (size,)))(keys)
