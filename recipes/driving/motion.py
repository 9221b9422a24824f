"""Traffic: road users, half a second at a time, as tokens of motion; forecast, and driven in closed loop.

A transformer over agents and time sees lanes, lights and other agents by relative poses, and gives each agent's next
token. Forecasts are rollouts of all agents together on roads that training has not seen. In closed loop the model
drives the ego car as a bicycle, among agents that replay the recording or that the model moves as well.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from aurora_train.errors import UserError
from aurora_train.recipe import Loss, Recipe
from driving.settings import SIMULATED, SUMO, Config


class Motion(Recipe):
    """Batches are those of `driving.scene_batches`; the tokens' templates float32[V, 5, 3] are a fact of the run."""

    Config = Config
    unit, metric = "moves", ("minADE1_3s", "min")
    is_test_alone = False  # set by `on`: all scenes are in the test split

    @classmethod
    def check(cls, config) -> None:
        width, heads = config.model.width, config.model.heads
        if width % heads:
            fitting = [str(n) for n in range(1, width + 1) if width % n == 0]
            raise UserError(f"{heads} heads do not divide the width {width}", where="model.heads",
                            hint=f"use one of these for heads: {', '.join(fitting)}")  # fmt: skip

    # Data

    def prepare(self, progress) -> None:
        self._open(progress)

    @functools.cached_property
    def _store(self):
        return self._open(lambda *_: None)

    def _open(self, progress):
        data, folder = self.config.data, self.cache / "data"
        if data.source not in (SIMULATED, SUMO):
            from driving.recorded import recorded_scenes

            # On other data everything is the test.
            store = recorded_scenes(folder, Path(data.source), 1.0 if self.is_test_alone else data.held_out, progress)
            wanted = ("test",) if self.is_test_alone else ("train", "test")
            return _with_scenes(store, wanted, data.source)
        from driving import generated

        maps = {"train": data.simulated_maps, "validation": max(data.simulated_held_out // 3, 1),
                "test": data.simulated_held_out}  # fmt: skip
        simulator = SUMO if data.source == SUMO else generated.CAR_FOLLOWING
        return generated.generated_scenes(folder, maps, data.simulated_scenes, data.simulated_seed, progress, simulator)

    def on(self, path: str):
        """The same model on all scenarios of another Argoverse 2 folder."""
        data = self.config.data.model_copy(update={"source": str(Path(path).absolute())})
        other = type(self)(self.config.model_copy(update={"data": data}), self.cache)
        other.is_test_alone = True
        return other.use(self.known)

    @functools.cache  # noqa: B019 - a recipe lives as long as its run
    def data(self, split: str):
        """Scenes of one split: "train", "validation" or "test"; None for a validation split without scenes."""
        from driving.moves import Moves

        data = self.config.data
        if split == "validation" and not self._store.count(split):
            return None
        return Moves(self._store, split, data.agents, data.pieces, data.lights, data.piece_m)

    def shapes(self) -> dict:
        import jax

        from driving.moves import shapes

        data = self.config.data
        return {name: jax.ShapeDtypeStruct(*of) for name, of in shapes(data.agents, data.pieces, data.lights).items()}

    def facts(self) -> dict:
        """The templates, learned from the training scenes alone."""
        from driving.moves import templates_of

        if "templates" in self.inherited:
            known = len(self.inherited["templates"])
            if known != self.config.model.tokens:  # a track that ends would be trained on as a template
                raise UserError(f"the run that is gone on from has {known} templates", where="model.tokens",
                                why=f"model.tokens is {self.config.model.tokens}",
                                hint=f"model.tokens={known}")  # fmt: skip
            return {"templates": self.inherited["templates"]}
        return {"templates": templates_of(self.data("train"), self.config.model.tokens)}

    def expected_facts(self) -> dict:
        from driving.tokens import TOKEN_STEPS

        return {"templates": np.zeros((self.config.model.tokens, TOKEN_STEPS, 3)).tolist()}

    @property
    def _templates(self):
        return np.asarray(self.known["templates"], np.float32)

    # Model and loss

    def model(self, rngs):
        from driving.agents import Driver

        config = self.config.model
        return Driver(width=config.width, layers=config.layers, heads=config.heads, relation=config.relation,
                      tokens=config.tokens, dtype=self.config.train.dtype, rngs=rngs)  # fmt: skip

    def loss(self, model, batch, key) -> Loss:
        """Cross-entropy of every agent's next token, summed over the moves that were recorded."""
        import jax.numpy as jnp
        import optax

        from driving.batches import agents_of, seen_of

        seen, following = seen_of(jnp.asarray(self._templates), batch, self.config.data.noise, key)
        weights = (following < model.num_tokens).astype(jnp.float32)
        logits = model(agents_of(batch), seen)
        targets = jnp.minimum(following, model.num_tokens - 1)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        right = (logits.argmax(-1) == targets) * weights
        return Loss((errors * weights).sum(), weights.sum(), {"accuracy": (right.sum(), weights.sum())})

    def predict(self, model, batch) -> dict:
        """One rollout of 6 s for each scene: states float32[B, A, 60, 5], present bool[B, A, 60], collided bool[B].

        Besides a scene's arrays the batch may hold "key", "replayed" bool[B, A] (agents that replay the recording) and
        "steered" bool[B] (the focal agent is a car that follows its tokens). Without them all agents take their
        likeliest tokens.
        """
        from driving.batches import rolled_out

        rollout = self.config.rollout
        return rolled_out(model, self._templates, batch, rollout.temperature, rollout.top_p)

    # Score

    def score(self, predict, split, key, workdir, progress) -> dict:
        """Errors of forecasts and rates of mishaps in closed loop, on the split's own roads, beside baselines."""
        from driving.rollouts import scored

        config = self.config.rollout
        films = config.films if split == "test" else 0
        return scored(predict, self.data(split), config, key, films, workdir, progress)

    def baselines(self, workdir, progress) -> dict:
        """The headline's error of constant velocity, CTRV and IDM in the same test scenes."""
        from driving.rollouts import baseline_errors

        return baseline_errors(self.data("test"), self.config.rollout, progress)

    def exceeded(self, scores) -> list[str]:
        return self.config.limits.exceeded(scores)


def _with_scenes(store, splits, source: str):
    for split in splits:
        if not store.count(split):
            raise UserError(f"no scene is left for the {split} split", where="data.source", why=source,
                            hint="more scenarios, of several maps, or another data.held_out")  # fmt: skip
    return store
