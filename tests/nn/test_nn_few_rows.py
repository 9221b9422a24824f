"""Decoding's products on a CPU: the plain ones' numbers, with no more than a piece of a weight converted at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_train.nn import plain
from aurora_train.nn.cpu import few_rows, forms
from aurora_train.nn.linear import linear
from aurora_train.nn.tracing import tracing


def drawn(shape, dtype, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(np.round(20 * values) if dtype == "int8" else values, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_in_pieces_is_the_whole_product(dtype, axis, rows, monkeypatch):
    monkeypatch.setattr(few_rows, "_PIECE", 48 * 10)  # the last piece is smaller than the others
    x, weight = drawn((rows, 48), "bfloat16"), drawn((48, 73) if axis == 0 else (73, 48), dtype, 1)
    wide = np.asarray(weight, np.float64)
    whole = np.asarray(x, np.float64) @ (wide if axis == 0 else wide.T)
    made = jax.jit(lambda x, w: forms.times_few(x, w, axis))(x, weight)
    assert made.dtype == jnp.float32 and np.allclose(made, whole, rtol=1e-5, atol=1e-4)
    assert np.allclose(plain.times_few(x, weight, axis), whole, rtol=1e-5, atol=1e-4)


def test_weights_are_converted_one_after_another_in_the_same_memory():
    """Converted at once, as the compiler would, they take new memory for every token, which the kernel has to map."""
    weights = [drawn((512, 512), "bfloat16", seed) for seed in range(8)]

    def temporary_bytes(times) -> int:
        def chain(x, weights):
            for weight in weights:
                x = times(x, weight).astype(x.dtype)
            return x

        return jax.jit(chain).lower(drawn((1, 512), "bfloat16"), weights).compile().memory_analysis().temp_size_in_bytes

    one = 4 * 512 * 512
    assert temporary_bytes(forms.times_few) < 2 * one


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 3, 8, 40])
def test_a_weight_that_is_stored_by_outputs_gives_the_same_product(dtype, rows):
    x, weight = drawn((rows, 48), dtype), drawn((73, 48), dtype, 1)
    made = jax.jit(few_rows.by_outputs)(x, weight)
    whole = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert made.dtype == jnp.float32 and np.allclose(made, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not few_rows.has_kernel(jnp.bfloat16), reason="XLA:CPU has no bfloat16 kernel on this processor")
@pytest.mark.parametrize("rows", [1, 8])
def test_a_weight_that_is_stored_by_outputs_is_not_converted(rows):
    lowered = jax.jit(few_rows.by_outputs).lower(drawn((rows, 512), "bfloat16"), drawn((512, 512), "bfloat16"))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * 512 * 512


def test_what_is_kept_for_many_layers_has_the_same_bits():
    angles = drawn((2, 5, 6), "float32")
    assert (jax.jit(forms.kept)(angles) == angles).all()


@pytest.mark.parametrize("name", ["plain", "cpu"])
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_linear_layer_says_the_same_while_decoding(name, dtype, tolerance):
    x, weight, bias = drawn((2, 1, 64), dtype), drawn((64, 80), dtype, 1), drawn((80,), "float32", 2)
    with tracing(forms=name):
        before = linear(x, weight, bias)
        with tracing(decoding=True):
            after = linear(x, weight, bias)
    assert after.dtype == before.dtype and np.allclose(
        np.asarray(after, np.float32), np.asarray(before, np.float32), rtol=tolerance, atol=tolerance
    )
