"""The contract between a recipe and the trainer: everything that the trainer knows about an objective.

A recipe is one Python file that defines one subclass of `Recipe`. The trainer calls the methods below and never
asks which recipe it runs. A bundled recipe keeps this module's import list free of jax, so that `aurora check`
stays fast; it imports jax inside the methods that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from aurora_train.errors import UserError
from aurora_train.facts import Facts, as_kept


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
        """The data's provenance: source, licence, counts, tokenizer hash. JSON-able."""

    # Optional: reading(arrays, indices, rows) -> JSON-able facts for `aurora inspect` about a batch: "summary", a list
    # of lines, and "rows", for the first rows [{"index", "segments": [{"document", "tokens", "text"}]}]. A segment may
    # have "parts", its text as [[text, is it learned]]; `describe` may have "learned", such segments, for the report.


@dataclass(frozen=True)
class Derived:
    """One value that follows from a dial (`model.size: d6`), with the formula and its source, for the log."""

    key: str
    value: Any
    formula: str
    source: str


def few(number: int, noun: str, hint: str, size: str = "") -> list[str]:
    """A remark for `Recipe.score` if it rests on fewer than thirty things, so that chance affects it; else none."""
    if number >= 30:
        return []
    of = f" of {size}" if size else ""
    return [f"the score rests on {number} {noun}{'' if number == 1 else 's'}{of}: {hint}"]


def makes_experience(recipe) -> bool:
    """Whether a recipe (instance or class) makes its training batches with the model (`Recipe.experience`)."""
    own = recipe if isinstance(recipe, type) else type(recipe)
    return own.experience is not Recipe.experience


class Recipe:
    """Base class. `config` is the whole frozen config; `cache` is the folder for prepared data."""

    Config: type  # pydantic model whose fields are the config sections this recipe owns (`model`, `data`, ...)
    dials: tuple[str, ...] = ()  # keys from which `derive` fills others of their section ("model.size")
    # What the loss of one example depends on: the example; its microbatch, as with BatchNorm, so that the number of
    # microbatches is part of the maths and no plan chooses it; or the whole batch, which is then never split.
    couples: Literal["example", "microbatch", "global"] = "example"

    unit = "targets"  # the name of one unit of `Loss.weight` in a rate: "tok", "bins", "images"
    # The headline of `score`, and its better direction. If an evaluation has it, it decides which checkpoints are best
    # and when `evaluate.patience` runs out; otherwise the validation loss does.
    metric: tuple[str, Literal["min", "max"]] | None = None
    # What `aurora export --format` may be, beside the formats of language models: "policy". It requires `probe`.
    formats: tuple[str, ...] = ()
    # Tells the low-rank adapters among the parameters by their paths; set when a model that has any is built.
    is_adapter: Callable[[str], bool] | None = None

    def __init__(self, config, cache: Path):
        self.config, self.cache = config, Path(cache)
        self.known: Facts = {}  # what `facts` returned when the run began, on any machine; see `use`
        self.inherited: Facts = {}  # the facts of this run so far, or of its parent; for `prepare`
        self.start: Any = None  # the model that the run starts from, a `train.starting.Start`, if any; for `prepare`

    def use(self, facts: Facts) -> Recipe:
        """Set `facts` as `known`. The trainer calls this before it asks for data or a model."""
        self.known = facts
        return self

    @classmethod
    def derive(cls, given: dict) -> list[Derived]:
        """Values for keys that the user left unset, from the raw tree of set keys. Never overrides the user."""
        return []

    @classmethod
    def check(cls, config) -> None:
        """Cross-section checks without jax or data; raises UserError with `where` naming the key."""

    def shapes(self) -> dict | None:
        """One example's arrays as `jax.ShapeDtypeStruct`s, before any data is prepared; `model` must work then, too.

        It allows a config to be planned without its data. With None (the default) the data are prepared first. A recipe
        with `experience` announces here what that returns.
        """
        return None

    def prepare(self, progress: Callable) -> None:
        """Make the data ready on disk. Idempotent; an interrupted one continues or starts clean.

        `progress(done, total, what)` may be called any number of times.
        """

    def facts(self) -> Facts:
        """What the model and its users need of the prepared data: a tokenizer, sizes, a scale.

        Called once, after `prepare` and before `data`. A value is bytes (kept as a file of that name), an array or
        plain JSON. The run keeps them; `model`, `predict`, `samples` and `generate` read them from `self.known`, never
        from the data, and so work on machines without the data.
        """
        return {}

    def ready(self, progress: Callable) -> Recipe:
        """Prepare the data and set their facts as known. The trainer calls this before it asks for `data`."""
        self.prepare(progress)
        return self.use(as_kept(self.facts(), where=f"{type(self).__name__}.facts"))

    def expected_facts(self) -> Facts | None:
        """The expected values of those `facts` that `model` needs, for a plan made before the data (see `shapes`).

        With None (the default of a recipe that defines `facts`) the data are prepared first.
        """
        return {} if type(self).facts is Recipe.facts else None

    def data(self, split: str) -> Source | None:
        """The prepared data of a split: "train" or "validation"; None if no validation split was asked for."""
        raise NotImplementedError

    def on(self, path: str) -> Recipe:
        """A recipe with this one's facts whose "test" split is all of `path`, for `evaluate --on`; not yet prepared."""
        raise UserError(f"the recipe {self.config.recipe!r} cannot be scored on other data", where="--on",
                        hint="a recipe supports this by defining `on(path)`: docs/extend.md")  # fmt: skip

    def texts(self) -> Iterator[tuple[str, str]]:
        """(name, text) of everything that is trained on, once it is prepared, for the `gates` that search it."""
        raise NotImplementedError

    def model(self, rngs):
        """Construct the nnx.Module from `self.config` and `self.known` alone: no data, no files, no globals."""
        raise NotImplementedError

    def trainable(self, path: str) -> bool:
        """Whether a parameter is trained, by its dotted path in the model: `student.stack.units.attention.query`.

        The path has no numbers of a Stack's units: a parameter is trained in all of them or in none. A frozen parameter
        has no gradient and no moments, its matrices are in the compute dtype, and it is stored once for all
        checkpoints. By default the adapters are trained if the model has any, else everything.
        """
        return self.is_adapter is None or self.is_adapter(path)

    def loss(self, model, batch: dict, key) -> Loss:
        """Sums over the batch. `key` is a key array of shape [B], one per example; None means deterministic."""
        raise NotImplementedError

    def experience(self, actor, indices: np.ndarray, key) -> dict:
        """A training batch that the model makes itself, instead of `take`. Optional; it requires `shapes` as well.

        Args:
            actor: an `aurora_train.train.experience.Actor`. `actor.run(function, *arrays)` runs the model in its state
                before this step; `actor.ask(name, function, *arguments)` asks something outside once and records it.
            indices: int64[B], the current examples of `data("train")`.
            key: a key array of shape [B], one per example.

        Returns arrays of shape [B, ...] by name, as announced by `shapes`. Must depend only on the model, the arguments
        and the answers of `actor.ask`, because a resumed run makes its batches again.
        """
        raise NotImplementedError

    def gates(self) -> list:
        """This recipe's own `aurora_train.train.hooks.Gate`s, which may refuse updates after the built-in ones."""
        return []

    def hooks(self) -> list:
        """This recipe's own `aurora_train.train.hooks.Hook`s, which run on each update after the built-in ones."""
        return []

    def predict(self, model, batch: dict) -> Any:
        """What scoring needs of the model: a pytree of arrays with a leading batch axis. Jitted by the trainer.

        A pure function of its arguments. What `score` needs from one call to the next is part of the batch and of the
        result: `score` may add keys, one per example, as `batch["key"]`, and the carry of a model with a memory, which
        it takes from the previous result. Without them (`batch.get("key")`) it must work too: deterministic, as
        `loss` without a key, and from the model's initial carry.
        """
        raise NotImplementedError

    def score(self, predict: Callable[[dict], Any], split: str, key, workdir: Path, progress: Callable) -> dict:
        """The numbers a user would quote. `predict(batch)` runs `self.predict` on host arrays and returns numpy.

        `key` is one key, the same every time: `jax.random.split(key, len(batch))` makes those of a batch.
        `predict.model()` is the model itself, for a score of what it generates.

        `split` is "test" (the final score), or "validation" while training, if `evaluate.score_every` is set. The first
        key of the result is the headline number. The report shows these keys: "tables", a list of {"title": str,
        "columns": [str], "rows": [[cell]]}; "plots", a list of {"title", "x_label", "y_label", "series": {name: (x,
        y)}} with equally long lists of numbers, or of {"title", "file"} with the name of an SVG, PNG or GIF in
        `workdir`; "notes", a list of str on how it was measured; and "remarks", a list of warnings for the reader,
        which are printed as well.
        """
        raise NotImplementedError

    def compared(self, before: Path, after: Path) -> dict | None:
        """One table, {"title", "columns", "rows"}, of what training changed, if `evaluate.before` is set.

        `before` and `after` are the folders that were the `workdir` of `score` for the model that the run started with
        and for the trained one. With None (the default) the table has the numbers of both scores.
        """
        return None

    def writes(self) -> tuple[int, int] | None:
        """(texts at once, the most tokens of one with its prompt) that `samples`, `score` and `experience` write with a
        `Decoder` while a run trains, so that its plan leaves room for them; None if they write none."""
        return None

    def samples(self, model, key) -> list[dict]:
        """A few outputs of the model for the report ({"prompt": ..., "text": ...}); [] if it makes none."""
        return []

    def generate(self, model, prompt: str, options: dict, on_text: Callable[[str], None]) -> str:
        """Continue a prompt. `options`: max_tokens, temperature, top_k, top_p, seed. UserError if unsupported."""
        raise UserError(f"the recipe {self.config.recipe!r} has nothing to generate", where="recipe")

    def chat(self, model, messages: list[dict], options: dict, on_text: Callable[[str], None]) -> str:
        """The model's answer to a conversation of {"role", "content"} messages.

        `options` are those of `generate` and `template`, the text of a chat template that replaces the model's own.
        Raises UserError if the model cannot hold a conversation.
        """
        raise UserError(f"the recipe {self.config.recipe!r} cannot hold a conversation", where="recipe")

    def speaker(self, template: str | None = None) -> Any:
        """The texts of this recipe's model for `aurora serve`, as an `aurora_train.serve.speaker.Speaker`.

        It is made from `known` alone. `template` replaces the model's own chat template. Raises UserError if the model
        writes no texts.
        """
        raise UserError(f"the recipe {self.config.recipe!r} writes no texts to serve", where="recipe",
                        hint="`aurora act` serves what answers requests of its own form")  # fmt: skip

    def responder(self, predict: Callable[[dict], Any]) -> Callable[[dict], dict]:
        """The function that answers one client of `aurora act` or `aurora stream`, from an episode's beginning.

        Called once before the server listens, and then for each client and whenever a client begins anew: what the
        function remembers between requests is its own. `predict` is that of `score`; call it once here, so that it is
        compiled before a client waits. Requests and answers are JSON; arrays of a request are nested lists or NumPy
        arrays, and an answer may hold arrays. A UserError is the answer to a bad request: it says what was expected.
        The texts in the list "warnings" of an answer are counted, and the first of each kind (the words before a colon)
        is shown to whoever runs the server. UserError if the recipe answers nothing.
        """
        raise UserError(f"the recipe {self.config.recipe!r} answers no requests", where="recipe",
                        hint="a recipe does by defining `responder(predict)`: docs/extend.md")  # fmt: skip

    def probe(self, examples: int) -> dict:
        """A batch for `predict`, arrays by name, by which an export is compared with its run. Required by `formats`.

        Made from the facts alone, and the same every time.
        """
        raise NotImplementedError

    def exceeded(self, scores: dict[str, float]) -> list[str]:
        """The limits of the config that these numbers of `score` exceed, a line for each that names key and number.

        A limit whose number is missing counts as exceeded. A run, an export or a server that exceeds any says so and
        ends with a status of its own, unless its user overrides that on record.
        """
        return []

    def logits(self, model, tokens):
        """Scores of the next token after each position, float32[..., T, vocabulary]; UserError without a vocabulary."""
        raise UserError(f"the recipe {self.config.recipe!r} has no vocabulary to score", where="recipe")

    def baselines(self, workdir: Path, progress: Callable) -> dict:
        """Scores of simple baselines on the same held-out data, by name; may hold "tables" and "notes"."""
        return {}

    def remarks(self, model) -> list[str]:
        """Lines for the log about the model as built, such as which attention was chosen and why."""
        return []

    # Real targets in an example on average, such as answers' tokens in a row; None: all entries of `weights` are real.
    targets_per_example: float | None = None

    def flops_per_target(self, num_parameters: int) -> float | None:
        """Training FLOPs (forward and backward) for one real target; None if unknown."""
        return None

    def looked_up(self) -> int:
        """The number of parameters that are only looked up, in no product: the embedding of an untied model."""
        return 0

    def flops(self, num_trained: int, num_frozen: int) -> float | None:
        """`flops_per_target` of both, less 2 of 6 FLOPs for frozen weights, which have no gradient."""
        per_target = self.flops_per_target(num_trained + num_frozen)
        return per_target and per_target - 2.0 * max(num_frozen - self.looked_up(), 0)
