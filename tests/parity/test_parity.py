"""Tiny models of the published families, placed by our tables, give the logits and gradients of transformers on torch.

There every document is read alone, or behind padding; here they are rows of one batch, packed and padded.

The stored references need no torch; with torch installed the slow tier makes them afresh and compares again.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_train.checkpoint import layout
from aurora_train.interop import families, placing
from aurora_train.interop.placing import assembled, our_shapes, their_shapes
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from families import FAMILIES, VOCAB, draw_weights, of_documents, rows_of  # noqa: E402

# A third of the compile time, the same mathematics.
QUICK_JIT = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def placed(family):
    """(the family's table, our config) of a tiny model's config.json."""
    settings = FAMILIES[family]
    table = families.of(settings, family)
    return table, DecoderConfig(**families.read_shape(settings, table, family))


def assert_parity(family, shapes, logits, loss, gradients, **settings):
    table, config = placed(family)
    config = config.model_copy(update=settings)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, VOCAB, "float32", nnx.Rngs(params=0))))
    ours = our_shapes(config, VOCAB)
    assert their_shapes(table, ours, config.heads) == shapes
    flat = placing.ours(table, ours, config.heads, draw_weights(family, shapes))
    weights = assembled(nnx.to_pure_dict(state), flat.__getitem__)
    tokens, targets, segments, positions, counted = map(jnp.asarray, rows_of(family))

    def run(weights):
        nnx.replace_by_pure_dict(state, weights)
        model = nnx.merge(graph, state)
        hidden = model(tokens, segments, positions)
        total, weight = model.nll(hidden, targets, counted.astype(jnp.float32))
        return total / weight, model.logits(hidden)

    (our_loss, our_logits), found = QUICK_JIT(jax.value_and_grad(run, has_aux=True))(weights)
    our_logits = of_documents(np.asarray(our_logits))
    np.testing.assert_allclose(our_logits, logits, atol=1e-4, rtol=0)
    decided = leads_by(logits) > 1e-3
    assert decided.mean() > 0.95 and (our_logits.argmax(-1) == logits.argmax(-1))[decided].all()
    np.testing.assert_allclose(our_loss, loss, rtol=1e-5)
    found = layout.snapshot(found)
    for name, expected in placing.ours(table, ours, config.heads, gradients).items():
        scale = max(np.abs(expected).max(), 1e-4)  # GPT-2's key bias has no gradient but rounding
        np.testing.assert_allclose(found[name], expected, atol=1e-3 * scale, rtol=0, err_msg=name)


def leads_by(logits):
    """By how much the best token of each row is above the second."""
    second, first = np.sort(logits, -1)[..., -2:].T
    return first - second


def stored(family):
    with np.load(HERE / f"reference_{family}.npz") as arrays:
        gradients = {n.removeprefix("gradient/"): arrays[n] for n in arrays.files if n.startswith("gradient/")}
        return {n: g.shape for n, g in gradients.items()}, arrays["logits"], arrays["loss"], gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_equals_the_stored_logits_and_gradients_of_transformers(family):
    assert_parity(family, *stored(family))


def test_a_model_of_small_loss_chunks_and_reference_attention_equals_them_too():
    assert_parity("gemma2", *stored("gemma2"), attention="reference", loss_chunk=10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_is_read_and_written_describes_the_same_model(family):
    table, config = placed(family)
    written = families.write_config(config, table)
    again = DecoderConfig(**families.read_shape(written, families.of(written, family), family))
    assert families.essence(again) == families.essence(config)
    assert families.expressing(config, table.model_type) is table


# The stored references are of the pinned transformers; the slow tier asks it again of three, a release of all.
LIVE = ("gemma2", "qwen3_5", "smollm3")


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow if f in LIVE else pytest.mark.release)
                                    for f in FAMILIES])  # fmt: skip
def test_a_tiny_model_equals_transformers_run_live(family):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_reference import reference

    found = reference(family)
    assert_parity(family, found["shapes"], found["logits"], found["loss"], found["gradients"])
