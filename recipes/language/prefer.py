"""Learn from preferences: DPO on pairs of a chosen and a rejected answer, KTO on answers that were judged one by one.

The policy is compared with a reference, the model that the run starts from. What the reference says of the data is
computed once and stored beside them, or, with adapters, by the frozen base under them in every step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from aurora_train.config import Section, setting
from aurora_train.errors import UserError
from aurora_train.evals.intervals import comparison_table
from aurora_train.recipe import Loss, few
from language import conversations
from language.settings import ALL_HELD_OUT, use_of
from language.starting import ModelConfig
from language.text_recipe import Samples, Writer
from language.tune import DataConfig, Tune

SPLITS = ("train", "validation", "test")


class Objective(Section):
    """The loss; its formulas and their sources are in recipes/language/preferences.py."""

    loss: Literal["dpo", "kto"] = setting("dpo", help="dpo: rows of prompt, chosen and rejected; kto: rows of prompt, "
                                          "completion and label")  # fmt: skip
    beta: float = setting(0.1, gt=0, help="how closely the policy is held to the reference: smaller, further away")
    smoothing: float = setting(0.0, ge=0, lt=0.5, help="dpo: the share of pairs that are labelled the wrong way round")
    length: Literal["sum", "mean"] = setting(
        "sum", help="dpo: log-probabilities summed over an answer's tokens, or their mean, with a beta of about 5"
    )
    desirable: float = setting(1.0, gt=0, help="kto: weight of a desirable answer's loss")
    undesirable: float = setting(1.0, gt=0, help="kto: weight of an undesirable answer's loss")
    reference: Literal["start", "base"] = setting(
        "start", help="start: the model that the run starts from, asked once before training; base: the frozen base "
        "under the adapters, asked in every step"
    )  # fmt: skip


class Config(Section):
    model: ModelConfig = setting(ModelConfig())
    data: DataConfig = setting(DataConfig())
    objective: Objective = setting(Objective())
    samples: Samples = setting(Samples())


_OF_ONE_LOSS = {"dpo": ("smoothing", "length"), "kto": ("desirable", "undesirable")}


class Prefer(Tune):
    """Batches are those of `pairs.PairSource`: two rows for each example."""

    Config = Config
    unit, metric, targets_per_example = "examples", ("pair_accuracy", "max"), 1.0
    references = None  # what the reference says of each split, once there is any
    _is_stored = property(lambda self: self.config.objective.reference == "start")

    @property
    def couples(self) -> str:
        """KTO's reference point is a mean over a microbatch; pairs are independent of each other."""
        return "microbatch" if self.config.objective.loss == "kto" else "example"

    @classmethod
    def check(cls, config) -> None:
        objective = config.objective
        if config.init.from_ is None:
            raise UserError("preferences are learned by a model that answers already", where="model.from",
                            why="the loss compares it with the model that the run starts from",
                            hint="model.from=SOURCE: an open model's folder or GGUF file, or a run")  # fmt: skip
        if objective.reference == "base" and config.model.lora is None:
            raise UserError("there is no frozen base without adapters", where="objective.reference",
                            hint="model.lora.rank=16, or objective.reference=start")  # fmt: skip
        if objective.reference == "start" and config.train.precision == "fp8":
            raise UserError("the reference is asked in bfloat16, as all that is not trained", where="train.precision",
                            why="the loss would compare it with a policy in fp8",
                            hint="train.precision=bfloat16, or objective.reference=base")  # fmt: skip
        for loss, names in _OF_ONE_LOSS.items():
            for name in names:
                if loss != objective.loss and getattr(objective, name) != getattr(Objective(), name):
                    raise UserError(f"it is for objective.loss={loss} only", where=f"objective.{name}",
                                    hint="leave it out")  # fmt: skip
        super().check(config)

    @classmethod
    def check_rows(cls, config) -> None:
        is_pairs = config.objective.loss == "dpo"
        conversations.check(config.data, reader=conversations.read_pairs if is_pairs else conversations.read_judged)

    def shapes(self) -> dict:
        import jax

        rows = {name: jax.ShapeDtypeStruct((2, *row.shape), row.dtype) for name, row in super().shapes().items()}
        stored = {"reference": jax.ShapeDtypeStruct((2,), "float32")} if self._is_stored else {}
        judged = {"desirable": jax.ShapeDtypeStruct((), "float32")} if self.config.objective.loss == "kto" else {}
        return rows | stored | judged

    # ---- data

    def prepare(self, progress) -> None:
        from language import pairs

        tokenizer, learned, decisive = self.reading()
        prepare = pairs.prepare_pairs if self.config.objective.loss == "dpo" else pairs.prepare_judged
        self.store = prepare(self.config.data, self.cache / "data", learned, decisive, tokenizer, progress)
        (split, use), rows = use_of(self.config.data), self.store.manifest["rows_are"]
        self.sum_up(progress, n := self.store.manifest["splits"][split][rows], f"{n:,} {rows} to {use}")
        self.references = self._asked(progress) if self._is_stored else None

    def _asked(self, progress) -> dict[str, np.ndarray]:
        """What the reference says of each split: log-probabilities, float32[examples, 2]."""
        from aurora_train.data.prepared import key_of
        from aurora_train.facts import as_kept
        from language.pairs import LAYOUT
        from language.reference import ROWS, measured

        config, train = self.config, self.config.train
        key = key_of({"data": self.store.fingerprint, "rows": [LAYOUT, ROWS], "start": self.start.digest,
                      "model": config.model.model_dump(mode="json", exclude={"from_"}),
                      "code": None if config.recipe_bundled else config.recipe_sha256,
                      "computed": [train.dtype, train.precision, train.forms, config.optimizer.master]})  # fmt: skip
        scorer = type(self)(self.config, self.cache).use(as_kept(self.facts(), where="facts"))

        def predictor():
            predict = self.start.predictor(scorer)
            return lambda batch: predict(_rows(batch))["policy"]

        file = self.cache / "data" / f"reference-{key[:16]}.f32"
        found = measured(file, [self._source(split) for split in SPLITS], predictor, progress)
        return dict(zip(SPLITS, found, strict=True))

    def _source(self, split: str):
        from language.pairs import PairSource

        source = PairSource(self.store, split, self.config.data.sequence, self.weights_of(split))
        return source if self.references is None else source.against(self.references[split])

    def data(self, split: str):
        return None if split == "validation" and self.config.data.holdout_validation == 0 else self._source(split)

    def begun(self) -> list[tuple[str, list[int], dict]]:
        """As of `Tune`; of a pair, the chosen answer is the one to compare with."""
        if self.config.samples.prompts or self.store is None:
            return super().begun()
        pieces = self.store.of_split("test")[:: 1 if self.config.objective.loss == "kto" else 2]
        return [self._held_out(int(piece)) for piece in pieces[: self.config.samples.count]]

    # ---- loss

    def predict(self, model, batch: dict) -> dict:
        """The log-probabilities of each example's two answers, float32[B, 2]: "policy", and "reference" by the base."""
        return {"policy": _answers(model, batch), **({} if self._is_stored else {"reference": _by_base(model, batch)})}

    def loss(self, model, batch: dict, key) -> Loss:
        import jax.numpy as jnp

        from language.pair_scores import wins

        reference = batch["reference"] if self._is_stored else _by_base(model, batch)
        judged, more = self._judged(_answers(model, batch, key), reference, batch)
        first, second = judged.rewards[:, 0], judged.rewards[:, 1]
        count = jnp.float32(len(first))
        if self.config.objective.loss == "dpo":
            metrics = {"accuracy": (wins(first, second).sum(), count), "margin": ((first - second).sum(), count),
                       "chosen_reward": (first.sum(), count), "rejected_reward": (second.sum(), count)}  # fmt: skip
        else:
            good = batch["desirable"]
            metrics = {"desirable_reward": ((first * good).sum(), good.sum()), "kl": (more * count, count),
                       "undesirable_reward": ((first * (1 - good)).sum(), (1 - good).sum())}  # fmt: skip
        return Loss(judged.losses.sum(), count, metrics)

    def _judged(self, policy, reference, batch: dict):
        """(the loss's `Judgement` of log-probabilities [B, 2]; KTO's reference point, or None)."""
        from language import preferences

        of = self.config.objective
        if of.loss == "dpo":
            lengths = batch["weights"].sum(-1) if of.length == "mean" else None
            return preferences.dpo(policy, reference, of.beta, of.smoothing, lengths), None
        return preferences.kto(policy, reference, batch["desirable"], of.beta, (of.desirable, of.undesirable))

    def flops(self, num_trained: int, num_frozen: int) -> float:
        """Of an example: its two rows to their ends, padding included, and once more forward for the frozen base."""
        again = 0.0 if self._is_stored else self.flops_per_target(num_trained + num_frozen) / 3
        return 2 * self.config.data.sequence * (Writer.flops(self, num_trained, num_frozen) + again)

    # ---- score

    def score(self, predict, split, key, workdir, progress) -> dict:
        """Whether the model tells better answers from worse by its implicit reward, beta log(p / p_reference)."""
        from aurora_train.evals.intervals import interval_table
        from language import pair_scores
        from language.reference import in_batches

        source, parts = self._source(split), []
        for done, (count, batch) in enumerate(in_batches(source)):
            progress(done * len(batch["tokens"]), len(source), "scoring held-out answers")
            kept = {name: batch[name] for name in ("desirable", "reference") if name in batch}
            kept["weights"] = batch["weights"].sum(-1, keepdims=True)  # the answers' lengths are all that is needed
            parts.append({name: array[:count] for name, array in (kept | predict(_rows(batch))).items()})
        progress(len(source), len(source), "scoring held-out answers")
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        judged, _ = self._judged(whole["policy"], whole["reference"], whole)
        np.savez(workdir / pair_scores.FILE, **pair_scores.outcomes(judged, whole["policy"], whole.get("desirable")))
        measures = pair_scores.measures(workdir)
        more, apart = "raise data.holdout_test", " held out, no prompt of which was trained on"
        if self.config.data.holdout_test == ALL_HELD_OUT:  # other data, which may hold the same prompts
            more, apart = "more rows", ""
        which = "the model that the run started from" if self._is_stored else "the base without its adapters"
        return {
            **{name: one.value for name, one in measures.items()}, "examples": len(source),
            "tables": [interval_table(measures)], "remarks": few(len(source), "example", more),
            "notes": [f"{len(source):,} {self.store.manifest['rows_are']}{apart}; the reference is {which}"],
        }  # fmt: skip

    def compared(self, before: Path, after: Path) -> dict:
        from language import pair_scores

        return comparison_table(*map(pair_scores.measures, (before, after)))


def _rows(batch: dict) -> dict:
    """The arrays that the model reads, and the weights of their targets."""
    return {name: batch[name] for name in ("tokens", "targets", "segments", "positions", "weights")}


def _answers(model, batch: dict, keys=None):
    """The log-probability of each answer, float32[B, 2]; `keys` key[B] or None."""
    import jax

    from language.preferences import log_probabilities

    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in _rows(batch).items()}
    keys = None if keys is None else jax.vmap(jax.random.split)(keys).reshape(-1)
    hidden = model(flat["tokens"], flat["segments"], flat["positions"], keys)
    return log_probabilities(model.token_nll(hidden, flat["targets"]), flat["weights"]).reshape(-1, 2)


def _by_base(model, batch: dict):
    """The same by the base under the adapters, without gradient."""
    import jax

    from aurora_train.nn.tracing import tracing

    with tracing(adapters=False):
        return jax.lax.stop_gradient(_answers(model, batch))
