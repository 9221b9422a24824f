"""The contract between a recipe and the trainer: all that the trainer knows of an objective.

A recipe is one Python file that defines one subclass of `Recipe`. The trainer calls the methods below and never
asks which recipe it runs. A bundled recipe keeps this module's import list free of jax, so that `aurora check`
stays fast; it imports jax inside the methods that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from aurora_train.errors import UserError
from aurora_train.facts import Facts, as_kept

ADAPTERS = ("_lora_a", "_lora_b")  # what the names of low-rank adapters end in


class Loss(NamedTuple):
    """A sum and its weight, never a mean: only sums can be split into microbatches and added up again.

    `total` and `weight` are float32 scalars; the optimised objective is total / weight over the global batch.
    `weight` depends on the batch alone. `metrics` maps a name to its own (sum, weight) pair.
    """

    total: Any
    weight: Any
    metrics: dict[str, tuple[Any, Any]] = {}


class Source(Protocol):
    """Random-access training data. `take` must be a pure function of the indices."""

    fingerprint: str  # sha256 hex over everything that decides what `take` returns; a resume refuses another one

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """int64[B] indices in [0, len) -> arrays of fixed shape and dtype with a leading axis B."""

    def describe(self) -> dict:
        """What a reader of provenance wants: source, licence, counts, tokenizer hash. JSON-able."""


@dataclass(frozen=True)
class Derived:
    """One value that follows from a dial (`model.size: d6`), with the formula and its source, for the log."""

    key: str
    value: Any
    formula: str
    source: str


def few(number: int, noun: str, hint: str, size: str = "") -> list[str]:
    """A remark for `Recipe.score` on how little it rests on, or none: thirty are few enough for luck to show."""
    if number >= 30:
        return []
    of = f" of {size}" if size else ""
    return [f"the score rests on {number} {noun}{'' if number == 1 else 's'}{of}: {hint}"]


def makes_experience(recipe) -> bool:
    """Whether a recipe, or a class of them, makes its training batches with the model (`Recipe.experience`)."""
    own = recipe if isinstance(recipe, type) else type(recipe)
    return own.experience is not Recipe.experience


class Recipe:
    """Base class. `config` is the whole frozen config; `cache` is the folder that prepared data may live in."""

    Config: type  # pydantic model whose fields are the config sections this recipe owns (`model`, `data`, ...)
    dials: tuple[str, ...] = ()  # keys from which `derive` fills others of their section ("model.size")
    # What the loss of one example depends on: itself; its microbatch, as with BatchNorm, so that the number of
    # microbatches is part of the maths and no plan chooses it; or the whole batch, which is then never split.
    couples: Literal["example", "microbatch", "global"] = "example"

    unit = "targets"  # what one unit of `Loss.weight` is called in a rate: "tok", "bins", "images"
    # The headline of `score`, and which way is better. Where an evaluation has it, it decides which checkpoints are the
    # best and when `evaluate.patience` runs out; otherwise the validation loss does.
    metric: tuple[str, Literal["min", "max"]] | None = None
    adapted = False  # whether the model has low-rank adapters; set when it is built

    def __init__(self, config, cache: Path):
        self.config, self.cache = config, Path(cache)
        self.known: Facts = {}  # what `facts` returned when the run began, wherever it is read; see `use`
        self.inherited: Facts = {}  # the facts of this run so far, or of the run it starts from; for `prepare`

    def use(self, facts: Facts) -> Recipe:
        """Take `facts` as known. The trainer calls this before it asks for data or a model."""
        self.known = facts
        return self

    @classmethod
    def derive(cls, given: dict) -> list[Derived]:
        """Values for keys the user left unset, from the raw tree of what was set. Never overrides the user."""
        return []

    @classmethod
    def check(cls, config) -> None:
        """Cross-section checks without jax or data; raises UserError with `where` naming the key."""

    def shapes(self) -> dict | None:
        """One example's arrays as `jax.ShapeDtypeStruct`s, and `model` callable, before any data is prepared.

        It lets a config be planned without its data, and its step be compiled while that is prepared; None (the
        default) has the data prepared first. A recipe with `experience` announces here what that returns.
        """
        return None

    def prepare(self, progress: Callable) -> None:
        """Make the data ready on disk. Idempotent; an interrupted one continues or starts clean.

        `progress(done, total, what)` may be called as often as liked.
        """

    def facts(self) -> Facts:
        """What the model and its use need to know of the prepared data: a tokenizer, sizes, a scale.

        Called once, after `prepare` and before `data`. A value is bytes (kept as a file of that name), an array or
        plain JSON. The run keeps them; `model`, `predict`, `samples` and `generate` read them from `self.known`, never
        from the data, and so work where the data is not.
        """
        return {}

    def ready(self, progress: Callable) -> Recipe:
        """Prepare the data and take its facts as known: what the trainer calls before it asks for `data`."""
        self.prepare(progress)
        return self.use(as_kept(self.facts(), where=f"{type(self).__name__}.facts"))

    def expected_facts(self) -> Facts | None:
        """As much of `facts` as `model` needs, by expectation, for a plan made before there is data (see `shapes`).

        None (the default of a recipe with facts of its own) has the data prepared first.
        """
        return {} if type(self).facts is Recipe.facts else None

    def data(self, split: str) -> Source | None:
        """The prepared data of a split: "train" or "validation"; None for a validation split that was not asked for."""
        raise NotImplementedError

    def on(self, path: str) -> Recipe:
        """A recipe with this one's facts whose "test" split is all of `path`, for `evaluate --on`; not yet prepared."""
        raise UserError(f"the recipe {self.config.recipe!r} cannot be scored on other data", where="--on",
                        hint="a recipe that can defines `on(path)`: docs/extend.md")  # fmt: skip

    def model(self, rngs):
        """Construct the nnx.Module from `self.config` and `self.known` alone: no data, no files, no globals."""
        raise NotImplementedError

    def trainable(self, path: str) -> bool:
        """Whether a parameter is trained, by its dotted path in the model: `student.stack.units.attention.query`.

        The numbers of a Stack's units are left out: what is trained is so in all of them. What is not trained has no
        gradient and no moments, its matrices are held in the compute dtype, and it lies on disk once for all
        checkpoints. By default the adapters are trained where the model has any, else everything.
        """
        return path.endswith(ADAPTERS) or not self.adapted

    def loss(self, model, batch: dict, key) -> Loss:
        """Sums over the batch. `key` is a key array of shape [B], one per example; None means deterministic."""
        raise NotImplementedError

    def experience(self, actor, indices: np.ndarray, key) -> dict:
        """A training batch that the model makes itself, in place of `take`: optional, and then `shapes` is owed, too.

        Args:
            actor: an `aurora_train.train.experience.Actor`. `actor.run(function, *arrays)` runs the model as it is
                before this step; `actor.ask(name, function, *arguments)` asks something outside, once and on record.
            indices: int64[B], the examples of `data("train")` whose turn it is.
            key: a key array of shape [B], one per example.

        Returns arrays of shape [B, ...] by name, as `shapes` announced them. Must be a function of the model, the
        arguments and the answers of `actor.ask` alone: a resumed run makes its batches again.
        """
        raise NotImplementedError

    def gates(self) -> list:
        """This recipe's own `aurora_train.train.hooks.Gate`s, after the built-in ones: which updates may count."""
        return []

    def hooks(self) -> list:
        """This recipe's own `aurora_train.train.hooks.Hook`s, after the built-in ones: what follows an update."""
        return []

    def predict(self, model, batch: dict) -> Any:
        """What scoring needs of the model: a pytree of arrays with a leading batch axis. Jitted by the trainer."""
        raise NotImplementedError

    def score(self, predict: Callable[[dict], Any], split: str, key, workdir: Path, progress: Callable) -> dict:
        """The numbers a user would quote. `predict(batch)` runs `self.predict` on host arrays, returns numpy.

        `split` is "test" (the full answer, at the end), or "validation" while training, where `evaluate.score_every`
        asks for that. The first key of the result is the headline number. These keys
        are shown by the report: "tables", a list of {"title": str, "columns": [str], "rows": [[cell]]}; "plots", a list
        of {"title", "x_label", "y_label", "series": {name: (x, y)}} with equally long lists of numbers; "notes" and
        "remarks", lists of str: how it was measured, and what a reader should be warned of (printed, too).
        """
        raise NotImplementedError

    def samples(self, model, key) -> list[dict]:
        """A few things the model made, for the report ({"prompt": ..., "text": ...}); [] where it makes none."""
        return []

    def generate(self, model, prompt: str, options: dict, on_text: Callable[[str], None]) -> str:
        """Continue a prompt. `options`: max_tokens, temperature, top_k, top_p, seed. UserError where it makes none."""
        raise UserError(f"the recipe {self.config.recipe!r} has nothing to generate", where="recipe")

    def logits(self, model, tokens):
        """Scores of the next token after each position, float32[..., T, vocabulary]; UserError without a vocabulary."""
        raise UserError(f"the recipe {self.config.recipe!r} has no vocabulary to score", where="recipe")

    def baselines(self, workdir: Path, progress: Callable) -> dict:
        """Scores of simple rivals on the same held-out data, by the rival's name; may hold "tables" and "notes"."""
        return {}

    def remarks(self, model) -> list[str]:
        """What a user should know of the model as built: which attention was chosen and why. Lines for the log."""
        return []

    def flops_per_target(self, num_parameters: int) -> float | None:
        """Training FLOPs (forward and backward) for one real target; None where the recipe cannot say."""
        return None

    def looked_up(self) -> int:
        """Parameters that are looked up and in no product: the embedding of a model with a head of its own."""
        return 0

    def flops(self, num_trained: int, num_frozen: int) -> float | None:
        """`flops_per_target` of both, less what frozen weights do not cost: 2 FLOPs of 6, as they have no gradient."""
        per_target = self.flops_per_target(num_trained + num_frozen)
        return per_target and per_target - 2.0 * max(num_frozen - self.looked_up(), 0)
