"""Calls everything that a recipe defines once before the first step, so that a mistake ends as one line in seconds.

Otherwise a mistake in `score` or `samples` would appear after the last step, one in a batch's shape after minutes of
compiling, and one in the weights or in `take` never, although accumulation and resume would silently be wrong.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aurora_train.check.blame import place_of, recipe_code
from aurora_train.check.limits import exceeded
from aurora_train.check.results import checked_result, checked_samples
from aurora_train.check.source import taken
from aurora_train.errors import UserError
from aurora_train.nn import carried
from aurora_train.nn.param import parameter_count
from aurora_train.nn.tracing import tracing
from aurora_train.random import example_keys, stream
from aurora_train.recipe import Loss, Recipe, makes_experience

_SMALL = 20_000_000  # parameters of a model that is drawn here, to run its score and its samples
_SCORE_SECONDS = 5.0


class _LongEnough(BaseException):  # not an Exception, so that a recipe's `except Exception` does not catch it
    """Raised to leave a score that has run for as long as a start may take."""


def rehearse_recipe(config, recipe, program, source) -> list[str]:
    """Call everything in a prepared recipe once. Returns what was not rehearsed, and why; UserError for a mistake."""
    _signatures(recipe)
    examples = min(config.train.batch, len(source))
    batch = _same_batch_twice(recipe, source, np.arange(examples, dtype=np.int64) * len(source) // examples)
    _model_of_facts_alone(config, recipe, program)
    _validation_arrays(recipe)
    _limits_and_probe(recipe)
    if makes_experience(recipe):  # called here, it might ask something outside in vain
        batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.batch(examples))
    with program.here():
        _losses(recipe, program, batch)
        if config.evaluate.final and not makes_experience(recipe):  # its `predict` may take other batches
            _predictions(recipe, program, batch)
    count = parameter_count(nnx.to_pure_dict(nnx.state(program.model(), nnx.Param)))
    if not config.evaluate.final:
        return []
    if count > _SMALL:
        return [f"not rehearsed: score and samples, which need the whole model ({count:,} parameters)"]
    return _score_and_samples(config, recipe)


def _signatures(recipe) -> None:
    """UserError if a method of the recipe does not accept the trainer's arguments."""
    for name, base in inspect.getmembers(Recipe, inspect.isfunction):
        own = getattr(type(recipe), name)
        if own is base or name.startswith("_"):
            continue
        wanted = list(inspect.signature(base).parameters)
        try:
            inspect.signature(own).bind(*wanted)
        except TypeError:
            raise UserError(
                f"`{name}` takes {inspect.signature(own)}", where=place_of(own), hint=f"def {name}({', '.join(wanted)})"
            ) from None


def _limits_and_probe(recipe) -> None:
    """Call what is needed once the run has its score: for its limits, which also have to do without, and an export."""
    exceeded(recipe, {})
    if recipe.formats:
        with recipe_code(recipe, "probe"):
            recipe.probe(1)


# ---- data


def _validation_arrays(recipe) -> None:
    """A validation batch must hold what the loss is trained on, also where `experience` makes the training batches."""
    source = recipe.data("validation") if makes_experience(recipe) else None
    if source is None or len(source) == 0:
        return
    missing = sorted(recipe.shapes().keys() - source.take(np.zeros(1, np.int64)).keys())
    if missing:
        raise UserError(
            f"the validation split lacks `{missing[0]}`, which `shapes` announces and `loss` is given in training",
            where=place_of(type(recipe).data), hint="return None for \"validation\", or batches with the same arrays",
        )  # fmt: skip


def _same_batch_twice(recipe, source, indices) -> dict:
    once, again, backwards = (taken(recipe, source, chosen) for chosen in (indices, indices, indices[::-1]))
    if not once.keys() == again.keys() == backwards.keys():
        raise UserError("`take` returned other names when it was called again", where=place_of(source.take))
    for name in once:
        same = np.array_equal(once[name], again[name], equal_nan=once[name].dtype.kind == "f")
        if not same or not np.array_equal(once[name], backwards[name][::-1], equal_nan=once[name].dtype.kind == "f"):
            when = "in another order" if same else "a second time"
            raise UserError(
                f"`take` returned another `{name}` when the same examples were asked for {when}",
                where=place_of(source.take),
                why="a resumed run asks for its batches again and must get the same ones",
                hint="draw what is random in an example from a generator seeded by its index, or from the `key` of "
                "`loss`",
            )  # fmt: skip
    return once | {"example": indices.astype(np.uint32)}


# ---- model and loss


def _model_of_facts_alone(config, recipe, program) -> None:
    """UserError unless a recipe without data builds the model that is trained: a run is read without its data."""
    alone = type(recipe)(config, recipe.cache).use(recipe.known)
    with recipe_code(recipe, "model"):
        wanted = _shapes(program.model())
        try:
            built = _shapes(nnx.eval_shape(lambda: carried.build(alone, config.train.seed)))
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"`model` needs more than the config and its facts: {type(error).__name__}: {error}",
                where=place_of(type(recipe).model), why="a run is read, sampled and served where its data is missing",
                hint="return from `facts()` what it needs of the data, and read it from self.known",
            ) from error  # fmt: skip
    if built != wanted:
        raise UserError(
            "`model` returns another model if the data is not prepared", where=place_of(type(recipe).model),
            hint="return from `facts()` what it needs of the data, and read it from self.known",
        )  # fmt: skip


def _shapes(model) -> dict:
    flat = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype)) for path, leaf in flat}


def _losses(recipe, program, batch) -> None:
    """Trace the loss of the batch and of its halves, in training and in evaluation; compare their weights."""
    blueprint, key = program.blueprint(program.simplest_plan()), stream(0, "dropout")
    half = len(batch["example"]) // 2

    def loss(batch, training: bool):
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blueprint.state)
        model = blueprint.merge(state.params, state.rest, state.frozen)
        with recipe_code(recipe, "loss", batch):
            if training:
                keys = example_keys(key, jnp.int32(0), batch["example"])
                result = _sound_loss(recipe, carried.training_loss(recipe, model, batch, keys))
                carried.changed_state(recipe, model, state.rest)
                return result
            model.eval()
            return _sound_loss(recipe, recipe.loss(model, batch, None))

    jax.eval_shape(lambda batch: loss(batch, True), batch)
    weight = jax.jit(lambda batch: loss(batch, False).weight)  # it does not need the model, so the compiler drops it
    whole = float(weight(batch))
    if not half or recipe.couples == "global":
        return
    parts = [{name: array[part] for name, array in batch.items()} for part in (slice(half), slice(half, None))]
    summed = sum(float(weight(part)) for part in parts)
    if not np.isclose(whole, summed, rtol=1e-4):
        raise UserError(
            f"the loss of a batch weighs {whole:g}, and its halves weigh {summed:g} together",
            where=place_of(type(recipe).loss), why="a loss is a sum and its weight: the parts of a batch must add up",
            hint="Loss(total=errors.sum(), weight=number of targets), never a mean",
        )  # fmt: skip


def _sound_loss(recipe, result) -> Loss:
    where = place_of(type(recipe).loss)
    if not isinstance(result, Loss):
        raise UserError(
            f"`loss` returned {_named(result)}", where=where,
            hint="return Loss(total, weight): the sum over the batch, and how many targets it sums over",
        )  # fmt: skip
    for name, value in (("total", result.total), ("weight", result.weight)):
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.number):
            hint = "a scalar: the sum over the batch"
            raise UserError(f"the `{name}` of the loss is {_named(value)}", where=where, hint=hint)
    for name, pair in result.metrics.items():
        if not isinstance(pair, tuple) or len(pair) != 2 or any(jnp.shape(part) != () for part in pair):
            hint = "a pair of scalars: (sum, weight)"
            raise UserError(f"the metric `{name}` is {_named(pair)}", where=where, hint=hint)
    return Loss(result.total, jnp.asarray(result.weight, jnp.float32), result.metrics)


def _named(value) -> str:
    return f"an array of shape {list(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"


def _predictions(recipe, program, batch) -> None:
    blueprint = program.blueprint(program.simplest_plan())

    def outputs(state, batch):
        model = blueprint.merge(state.params, state.rest, state.frozen)
        model.eval()
        with recipe_code(recipe, "predict", batch):
            return recipe.predict(model, batch)

    outputs_shape, examples = jax.eval_shape(outputs, blueprint.state, batch), len(batch["example"])
    for leaf in jax.tree.leaves(outputs_shape):
        if leaf.shape[:1] != (examples,):
            raise UserError(
                f"`predict` returned {_named(leaf)} for {examples} examples", where=place_of(type(recipe).predict),
                hint=f"its leading axis is the examples: [{examples}, ...]",
            )  # fmt: skip


# ---- what is made of the model


def _score_and_samples(config, recipe) -> list[str]:
    """Run `score` and `samples` with the model as drawn. A score that takes more than a few seconds is abandoned."""
    model, skipped = carried.build(recipe, config.train.seed), []
    model.eval()
    graph, arrays = nnx.split(model)
    jitted = jax.jit(lambda arrays, batch: recipe.predict(nnx.merge(graph, arrays), batch))
    deadline = time.monotonic() + _SCORE_SECONDS

    def in_time(*_):
        if time.monotonic() > deadline:
            raise _LongEnough

    def predict(batch):
        in_time()
        return jax.device_get(jitted(arrays, batch))

    predict.model = lambda: model
    with tracing(forms=config.train.forms), tempfile.TemporaryDirectory() as folder:
        try:
            with recipe_code(recipe, "score"):
                result = recipe.score(predict, "test", stream(config.train.seed, "score"), Path(folder), in_time)
            headline = next(iter(checked_result(recipe, result)))
            if recipe.metric and recipe.metric[0] != headline:
                raise UserError(
                    f"the recipe's metric is `{recipe.metric[0]}`, and the headline of its score is `{headline}`",
                    where=place_of(type(recipe).score), hint="`metric` names the first key of the score",
                )  # fmt: skip
        except _LongEnough:
            skipped = [f"not rehearsed to its end: score, which takes more than {_SCORE_SECONDS:.0f} s"]
        with recipe_code(recipe, "samples"):
            samples = recipe.samples(model, stream(config.train.seed, "samples"))
        checked_samples(recipe, samples)
    return skipped
