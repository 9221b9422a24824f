"""Evaluates a model: the validation loss while training, and the recipe's predictions for its score."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from aurora_train import mesh as meshes
from aurora_train.nn.tracing import tracing
from aurora_train.recipe import Loss


class Evaluator:
    """Compiles the recipe's loss and predict once for a blueprint and a mesh."""

    def __init__(self, recipe, blueprint, mesh):
        self._recipe, self._blueprint, self._mesh = recipe, blueprint, mesh
        self._batch = meshes.batch_sharding(mesh)
        self._num_devices = meshes.batch_ways(mesh)
        self._sums, self._predict = jax.jit(self._loss), jax.jit(self._outputs)
        self._compiled: dict[tuple, Callable] = {}

    def under(self, recipe) -> Evaluator:
        """The evaluator of another recipe for the same model."""
        return Evaluator(recipe, self._blueprint, self._mesh)

    def _loss(self, weights, batch):
        with self._tracing():
            return Loss(*self._recipe.loss(self._judged(weights), batch, None))

    def _outputs(self, weights, batch):
        with self._tracing():
            return self._recipe.predict(self._judged(weights), batch)

    def _tracing(self):
        return tracing(forms=self._recipe.config.train.forms, rows=meshes.rows(self._mesh))

    def _judged(self, weights):
        model = self._blueprint.merge(*weights)
        model.eval()
        return model

    def compile(self, weights, batch: dict) -> None:
        """Compile the loss of batches like this one. `weights`: what `weights_of` returns, abstract."""
        arrays = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=self._batch) for k, v in batch.items()}
        self._compiled[_shapes(batch)] = self._sums.lower(weights, arrays).compile()

    def loss(self, state, batches) -> dict[str, float]:
        """Weighted mean loss (and the recipe's metrics) over the batches, without dropout."""
        weights, totals = weights_of(state), None
        for batch in batches:
            sums = self._compiled.get(_shapes(batch), self._sums)(weights, self._put(batch))
            totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
        total, weight, metrics = jax.device_get(totals)
        named = {name: float(part / max(whole, 1e-9)) for name, (part, whole) in metrics.items()}
        return {"loss": float(total / max(weight, 1e-9)), **named}

    def predictor(self, state) -> Callable[[dict], object]:
        """`predict(batch) -> numpy pytree`, for pytrees of arrays and of keys with a leading axis of examples.

        A batch not divisible by the devices is padded and cut back. `predict.model()` is the model itself, for a score
        that generates.
        """
        weights = weights_of(state)

        def predict(batch: dict):
            size = len(jax.tree.leaves(batch)[0])
            short = -size % self._num_devices
            if short:
                last = np.minimum(np.arange(size + short), size - 1)
                batch = jax.tree.map(lambda leaf: leaf[last], batch)
            if self._num_devices > 1:  # one takes arrays as they come, which is quicker
                batch = self._put(batch)
            out = jax.device_get(self._predict(weights, batch))
            return jax.tree.map(lambda a: a[:size], out) if short else out

        predict.model = lambda: self._judged(weights)
        return predict

    def model(self, state):
        """The nnx module with the weights by which the run is judged, in evaluation mode."""
        return self._judged(weights_of(state))

    def _put(self, batch):
        return meshes.put(batch, self._batch)


def _shapes(batch: dict) -> tuple:
    return tuple((name, array.shape, str(array.dtype)) for name, array in sorted(batch.items()))


def weights_of(state):
    """(params, rest, frozen) by which a run is judged: with the moving average of its parameters if there is one."""
    return state.extra.get("ema", state.params), state.rest, state.frozen


def validation_batches(source, batch: int, examples: int, num_devices: int, microbatch: int | None = None):
    """The same `examples` every time, spread evenly over a source, in batches that are divisible by the devices.

    Only whole batches are used; if a split is smaller than one batch, some examples are repeated. The choice does not
    depend on `microbatch`, the largest batch to yield, because a plan decides that and plans change.
    """
    count = min(examples, len(source))
    size = max(min(batch, count) // num_devices, 1) * num_devices
    total = max(count // size, 1) * size
    chosen = np.arange(total, dtype=np.int64) * len(source) // total
    most = min(microbatch or size, size)
    part = next(n for n in range(most, 0, -1) if size % n == 0 and n % num_devices == 0)
    for start in range(0, total, part):
        indices = chosen[start : start + part]
        yield {**source.take(indices), "example": indices.astype(np.uint32)}
