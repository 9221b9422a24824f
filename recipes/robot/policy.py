"""Robot policies: from what a robot observes to the chunk of actions that it does next, learned from demonstrations.

`model.kind` chooses ACT, flow matching, diffusion or behaviour cloning, all on one trunk. The demonstrations are a
LeRobot dataset, or those of a world's own expert. The score is what the robot does: the share of episodes in simulation
that succeed. The model works on scaled values; their scale, the features and the instructions are facts of the run.
"""

from __future__ import annotations

import functools

import numpy as np

from aurora_train.errors import UserError
from aurora_train.recipe import Loss, Recipe
from robot.limits import bound_of, refuse_unmeasured
from robot.settings import PICTURE, WORLD, Config

RECORDED = 100  # demonstrations of a world, unless the config says how many


class Policy(Recipe):
    """Batches are those of `robot.chunks.Chunks`: state f32[B, S], image.NAME u8[B, H, W, 3], action f32[B, K, A],
    padded bool[B, K], task i32[B]."""

    Config = Config
    unit, formats = "chunks", ("policy",)
    _read = None  # the episodes, once they are read
    _compiled = None  # the `predict` that has been compiled for a server

    @property
    def metric(self) -> tuple[str, str]:
        """The share of successes where there is a world to act in, else the error of held-out actions."""
        return ("success", "max") if self.world is not None else ("action_error", "min")

    @property
    def world(self) -> str | None:
        """The name of the world in which the policy is scored; None if there is none."""
        source = self.config.data.source
        return self.config.score.world or (source.removeprefix(WORLD) if source.startswith(WORLD) else None)

    @property
    def executed(self) -> int:
        """How many actions of a chunk are carried out before the policy is asked again."""
        score, chunk = self.config.score, self.config.data.chunk
        return 1 if score.ensemble is not None else score.execute or max(chunk // 2, 1)

    @classmethod
    def check(cls, config) -> None:
        data, score = config.data, config.score
        if score.execute is not None and score.execute > data.chunk:
            raise UserError(
                f"{score.execute} actions of a chunk of {data.chunk} cannot be executed", where="score.execute",
                hint=f"score.execute={data.chunk} at most, or a longer data.chunk",
            )  # fmt: skip
        if data.noise and not data.source.startswith(WORLD):
            raise UserError("noise is added while a world's expert is recorded, and a dataset has been recorded",
                            where="data.noise", hint=f"leave it out, or data.source={WORLD}NAME")  # fmt: skip
        has_world = score.world is not None or data.source.startswith(WORLD)
        refuse_unmeasured(config.limits, has_world)
        if has_world:
            return
        if data.test == 0 and config.evaluate.final:
            raise UserError(
                "a dataset without a world needs episodes that are held out, by whose actions it is scored",
                where="data.test", hint="data.test=0.1, score.world=NAME, or evaluate.final=false",
            )  # fmt: skip
        if data.validation == 0 and config.evaluate.score_every:
            raise UserError(
                "the scores while training, which choose checkpoints, need episodes that are held out for them",
                where="data.validation", hint="data.validation=0.1, score.world=NAME, or evaluate.score_every=null",
            )  # fmt: skip

    # Data and facts

    def prepare(self, progress) -> None:
        found = self._episodes(progress)
        progress(len(found), len(found), f"{len(found)} episodes of {found.lengths.sum():,} frames")

    def _episodes(self, progress=lambda done, total, what: None):
        if self._read is None:
            self._read = self._found(progress)
        return self._read

    def _found(self, progress):
        data = self.config.data
        if data.source.startswith(WORLD):
            from robot.demonstrations import record

            return record(data.source.removeprefix(WORLD), data.episodes or RECORDED, data.seed, progress,
                          cache=self.cache, noise=data.noise, cameras=data.cameras,
                          size=data.image or PICTURE)  # fmt: skip
        from robot import lerobot
        from robot.chunks import used_features

        used = list(used_features(data, lerobot.features(data.source)).values())
        return lerobot.read(data.source, self.cache, used, progress, episodes=data.episodes, edge=data.image)

    def facts(self) -> dict:
        """Features with their shapes and names, their scale over the training frames, instructions, the rate."""
        from robot.chunks import split_of, state_features, used_features
        from robot.fitting import continued, refuse_other
        from robot.statistics import of

        episodes, data = self._episodes(), self.config.data
        used = used_features(data, episodes.arrays)
        state, cameras = state_features(data, episodes.arrays), list(data.cameras)
        shapes = {name: list(episodes.feature(feature).shape[1:]) for name, feature in used.items()}
        bound_of(self.config.limits, shapes["action"][-1])  # refuses bounds for other actions, before any training
        train = split_of(episodes, data.test, data.validation, data.action)["train"]
        numbers = of(episodes, train, list(used.values()))
        mine = {
            "state": state, "cameras": cameras, "shapes": shapes, "tasks": sorted(set(episodes.tasks)),
            "scale": {name: numbers[feature] for name, feature in used.items()},
            "names": {name: list(episodes.names.get(feature, ())) for name, feature in used.items()},
            "fps": episodes.fps,
        }  # fmt: skip
        facts = continued(mine, self.inherited, data.language)
        name, evaluate = self.config.score.world, self.config.evaluate
        if name is not None and (evaluate.final or evaluate.score_every):
            refuse_other(facts, name)  # before any training
        return facts

    def expected_facts(self) -> dict | None:
        """Those of a world, by looking at it once. A dataset is read first."""
        data = self.config.data
        if not data.source.startswith(WORLD):
            return None
        from robot.chunks import state_features
        from robot.worlds import world

        on = world(data.source.removeprefix(WORLD), data.cameras, data.image or PICTURE)
        try:
            seen = on.reset(0)
        finally:
            on.close()
        state = state_features(data, seen)
        shapes = {name: list(seen[name].shape) for name in state} | {"action": list(on.action_low.shape)}
        shapes |= {name: [data.image or PICTURE] * 2 + [3] for name in data.cameras}
        expected = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
        scale = {name: {end: np.full(shape[-1], value) for end, value in expected.items()}
                 for name, shape in shapes.items()}  # fmt: skip
        return {"state": state, "cameras": list(data.cameras), "shapes": shapes, "scale": scale, "tasks": [on.task]}

    def shapes(self) -> dict | None:
        import jax

        facts, chunk = self.known or self.expected_facts(), self.config.data.chunk
        if facts is None:
            return None
        sizes, row = facts["shapes"], jax.ShapeDtypeStruct
        arrays = {f"image.{name}": row(tuple(sizes[name]), "uint8") for name in facts["cameras"]}
        if facts["state"]:
            arrays["state"] = row((sum(int(np.prod(sizes[name])) for name in facts["state"]),), "float32")
        return arrays | {"action": row((chunk, *sizes["action"]), "float32"), "padded": row((chunk,), "bool"),
                         "task": row((), "int32")}  # fmt: skip

    @functools.cache  # noqa: B019 - a recipe lives as long as its run
    def data(self, split: str):
        """Chunks of one split: "train", "validation" or "test"; None for a share of 0."""
        from robot.chunks import Chunks

        data = self.config.data
        if split != "train" and getattr(data, split) == 0:
            return None
        return Chunks(self._episodes(), split, chunk=data.chunk, test=data.test, validation=data.validation,
                      state=self.known["state"], cameras=data.cameras, action=data.action,
                      tasks=self.known["tasks"])  # fmt: skip

    # Model and loss

    @property
    def _scaling(self):
        from robot.scaling import Scaling

        return Scaling(self.known)

    def model(self, rngs):
        """One of the four kinds, which all have `losses` and `actions`."""
        from robot.kinds import make_model

        return make_model(self.config, self.known, self._scaling.bounds, rngs)

    def _seen(self, batch: dict, keys=None) -> dict:
        """What the model sees of a batch: scaled, with pictures moved at random if there are keys."""
        from robot.instruction import features_of
        from robot.vision import shifted

        if keys is not None:
            most = self.config.model.vision.shift
            names = [f"image.{name}" for name in self.known["cameras"]]
            batch = batch | {name: shifted(batch[name], keys, most) for name in names}
        return self._scaling.seen(batch) | features_of(batch, self.known)

    def loss(self, model, batch, key) -> Loss:
        """The kind's own loss of scaled actions, one number for each chunk; padded actions do not count."""
        import jax.numpy as jnp

        action = self._scaling.scaled(batch["action"])
        losses, metrics = model.losses(self._seen(batch, key), action, batch["padded"], key)
        return Loss(losses.sum(), jnp.float32(len(losses)), metrics)

    def predict(self, model, batch):
        """A chunk of actions in their own units, float32[B, K, A]. With keys, flow and diffusion draw a sample each."""
        return self._scaling.raw(model.actions(self._seen(batch), batch.get("key")))

    def flops_per_target(self, num_parameters: int) -> float:
        """For each chunk, 6 FLOPs per parameter of a block and token that it reads; the rest is neglected."""
        from robot.kinds import flops

        return flops(self.config, self.known)

    # Score

    def score(self, predict, split, key, workdir, progress) -> dict:
        """Successes in simulation, or the error of held-out actions; see `robot.robot_scores`."""
        from robot.robot_scores import score

        return score(self, predict, split, key, workdir, progress)

    def baselines(self, workdir, progress) -> dict:
        from robot.robot_scores import baselines

        return baselines(self, workdir, progress)

    # Use

    def exceeded(self, scores: dict) -> list[str]:
        from robot.limits import exceeded

        return exceeded(self.config.limits, scores)

    def responder(self, predict):
        """Answers observations with chunks of actions; see `robot.answering`."""
        from aurora_train.random import stream
        from robot.answering import Answers

        bound = bound_of(self.config.limits, self.known["shapes"]["action"][-1])
        answers = Answers(self.known, predict, self.executed, self.config.score.ensemble, bound,
                          stream(self.config.train.seed, "act"))  # fmt: skip
        if predict is not self._compiled:  # once, and not at the beginning of every episode
            answers.compile()
            self._compiled = predict
        return answers

    def probe(self, examples: int) -> dict:
        from robot.answering import probe

        return probe(self.known, examples)
