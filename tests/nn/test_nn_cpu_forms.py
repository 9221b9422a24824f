"""What is written another way for XLA:CPU: the same numbers, and the compiled program has the form that it is for."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_train.nn.attention_kernels import Rule, reference
from aurora_train.nn.cpu import forms as cpu
from aurora_train.nn.cpu.blocked import blocked
from aurora_train.nn.linear import linear
from aurora_train.nn.mlp import activate
from aurora_train.nn.tracing import FORMS

pytestmark = pytest.mark.optimized
CPUINFO = Path("/proc/cpuinfo")
RNG = np.random.default_rng(0)
DTYPES = [jnp.float32, jnp.bfloat16]
has_bfloat16_kernels = pytest.mark.skipif(
    not CPUINFO.exists() or "avx512_bf16" not in CPUINFO.read_text(), reason="this processor has no bfloat16 products"
)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def exact(x):
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("form", ["plain", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 12, 64])
def test_sums_over_rows_equal_float64_whatever_their_number(rows, dtype, form):
    a, b = normal(rows, 24, dtype=dtype), normal(rows, 40, dtype=dtype)
    close = {"rtol": 1e-5, "atol": 1e-4}
    forms, wide = FORMS[form], a.astype(jnp.float32)
    np.testing.assert_allclose(jax.jit(forms.outer)(a, b), exact(a).T @ exact(b), **close)
    np.testing.assert_allclose(jax.jit(forms.batched_outer)(a[None], b[None])[0], exact(a).T @ exact(b), **close)
    np.testing.assert_allclose(jax.jit(forms.column_sum)(a), exact(a).sum(0), **close)
    np.testing.assert_allclose(jax.jit(forms.row_mean)(wide), exact(a).mean(-1, keepdims=True), **close)


@pytest.mark.parametrize("form", ["plain", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_bias_is_the_sum_of_what_reaches_it(dtype, form):
    y, bias, g = normal(3, 5, 16, dtype=dtype), normal(16), normal(3, 5, 16, dtype=dtype)
    out, pullback = jax.vjp(jax.jit(FORMS[form].add_bias), y, bias)
    d_y, d_bias = pullback(g)
    np.testing.assert_array_equal(out, y + bias.astype(dtype))
    np.testing.assert_array_equal(d_y, g)
    assert d_bias.dtype == jnp.float32
    # Plain, a sum of the bfloat16 cotangents is XLA's own, of 15 rows here: rounded once, after the sum.
    close = {"rtol": 1e-5, "atol": 1e-5} if form == "cpu" or dtype == jnp.float32 else {"rtol": 2**-7, "atol": 2**-6}
    np.testing.assert_allclose(d_bias, exact(g).sum((0, 1)), **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("g", [0.0, -1.5, np.nan, np.inf, -np.inf])
def test_waiting_for_a_gradient_changes_no_bit_whatever_the_gradient(g, dtype):
    x = normal(4, 8, dtype=dtype).at[0, 0].set(np.nan).at[0, 1].set(-0.0)
    waited = jax.jit(cpu.after)(x, jnp.full((2, 3), g, dtype))
    np.testing.assert_array_equal(np.asarray(waited).view(np.uint8), np.asarray(x).view(np.uint8))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("length", [1, 7, 128, 256])
def test_bfloat16_attention_runs_whatever_the_number_of_its_blocks_and_key_heads(length, kv_heads):
    """A transpose folded into a bfloat16 product would crash at run time."""
    shapes = [(2, length, heads, 16) for heads in (2, kv_heads, kv_heads)]
    inputs = [normal(*shape, dtype=jnp.bfloat16) for shape in shapes]

    def gradients(kernel, inputs):
        def loss(*inputs):
            return jnp.square(kernel(*inputs, Rule(0.25), None).astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)

    found = gradients(blocked, inputs)
    expected = gradients(reference, [x.astype(jnp.float32) for x in inputs])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.03 * float(jnp.abs(other).max()) + 1e-6)


def test_what_is_frozen_is_not_differentiated_where_units_are_taken_apart():
    tree = {"w": normal(3, 4), "frozen": normal(3, 4), "codes": jnp.arange(12, dtype=jnp.uint8).reshape(3, 4)}

    def total(w):
        units = cpu.units(tree | {"w": w}, 3)
        return sum((unit["w"] * unit["frozen"] * unit["codes"].astype(jnp.float32)).sum() for unit in units)

    np.testing.assert_array_equal(jax.grad(total)(tree["w"]), tree["frozen"] * tree["codes"])


def test_units_taken_apart_give_one_stacked_gradient():
    tree = {"w": normal(3, 4, 5), "b": normal(3, 5)}

    def total(tree):
        units = enumerate(cpu.units(tree, 3))
        return sum((i + 1) * (unit["w"].sum() + jnp.square(unit["b"]).sum()) for i, unit in units)

    gradient = jax.grad(total)(tree)
    plain = jax.grad(lambda tree: sum(
        (i + 1) * (tree["w"][i].sum() + jnp.square(tree["b"][i]).sum()) for i in range(3)
    ))(tree)  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, gradient, plain)
    assert "pad" not in str(jax.make_jaxpr(jax.grad(total))(tree))


@has_bfloat16_kernels
def test_no_product_of_a_bfloat16_layer_is_upcast():
    x, up, down, bias = normal(64, 96, dtype=jnp.bfloat16), normal(96, 160), normal(160, 96), normal(160)

    def loss(x, up, down, bias):
        return jnp.square(linear(activate("gelu_tanh", linear(x, up, bias)), down).astype(jnp.float32)).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(x, up, down, bias).compile().as_text()
    assert_bfloat16_operands(text)


@has_bfloat16_kernels
def test_neither_is_one_of_blocked_attention():
    query, key, value = (normal(2, 256, 4, 16, dtype=jnp.bfloat16) for _ in range(3))

    def loss(query, key, value):
        return jnp.square(blocked(query, key, value, Rule(0.25), None).astype(jnp.float32)).sum()

    assert_bfloat16_operands(jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, value).compile().as_text())


def assert_bfloat16_operands(program: str):
    """Every product of a compiled program, those of row means and sums apart, reads bfloat16."""
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", program))
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(%([\w.\-]+), %([\w.\-]+)\)", program)
    large = [(a, b) for shape, a, b in products if min(map(int, shape.split(","))) > 1]
    assert len(large) >= 5
    assert {types[name] for pair in large for name in pair} == {"bf16"}


def test_an_activation_is_made_again_in_the_backward_pass_and_not_kept():
    """Ten layers of 1 MB in bfloat16: kept are what goes into each activation and what comes out, and no float32."""
    layers, rows, width = 10, 1024, 512

    def loss(x, weights):
        for weight in weights:
            x = activate("gelu_tanh", linear(x, weight))
        return x.astype(jnp.float32).sum()

    arguments = normal(rows, width, dtype=jnp.bfloat16), [normal(width, width) for _ in range(layers)]
    compiled = jax.jit(jax.grad(loss, argnums=1)).lower(*arguments).compile()
    kept = layers * 2 * rows * width * 2
    low_weights = layers * width * width * 2
    assert compiled.memory_analysis().temp_size_in_bytes < kept + low_weights + 8 * rows * width * 4
