"""What the simulation joins, splits and orders as XLA does, each on the smallest program that shows it."""

import jax
import jax.numpy as jnp

from aurora_train.memory.dataflow import Graph
from aurora_train.memory.kernel import needs_of, orders
from aurora_train.memory.liveness import profile_of
from aurora_train.memory.splits import Chip

HOPPER, BLACKWELL = Chip(132, (9, 0)), Chip(152, (10, 3))
X = jax.ShapeDtypeStruct((64, 32), jnp.float32)
W = jax.ShapeDtypeStruct((32, 32), jnp.float32)


def graph(fun, *args, **how):
    return Graph(jax.make_jaxpr(fun)(*args), **how)


def labels(found):
    return [k.label for k in found.kernels]


def test_a_sum_over_rows_and_what_stands_beside_it_are_one_launch():
    (kernel,) = graph(lambda x: (jnp.sum(x * x, 0), x * 2), X).kernels
    assert len(kernel.writes) == 2
    assert len(graph(lambda x: (jnp.sum(x, 0), jnp.sum(x, 1)), X).kernels) == 2, "sums over other axes stay apart"


def test_equal_elementwise_equations_are_one_but_not_across_a_barrier():
    def twice(x, w):
        return jnp.exp(x) @ w, jnp.exp(x) @ w.T

    def parted(x, w):
        first = jnp.exp(x) @ w
        x, first = jax.lax.optimization_barrier((x, first))
        return first, jnp.exp(x) @ w.T

    def stored(fun):
        return [len(k.writes) for k in graph(fun, X, W).kernels if k.label == "exp"]

    assert stored(twice) == [1] and stored(parted) == [2]


def test_a_product_is_joined_to_a_sum_even_where_what_it_adds_is_made_later():
    def later(x, w):
        product = x @ w
        return product + (x * 3) @ w.T

    found = graph(later, X, W)
    joined = [k for k in found.kernels if k.label == "dot_general" and k.in_place]
    assert len(joined) == 1 and "add" not in labels(found)
    maker = {w: k.order for k in found.kernels for w in k.writes}
    assert all(maker[r] < k.order for k in found.kernels for r in k.reads), "in the order of the program"


def test_products_bring_siblings_together_on_datacenter_blackwell_alone():
    def fun(x, w):
        y = x @ w
        return jnp.exp(y), jnp.sin(y)

    assert len(graph(fun, X, W, chip=BLACKWELL).kernels) == 2 and len(graph(fun, X, W, chip=HOPPER).kernels) == 3


def test_a_centred_norm_that_is_read_twice_is_stored_and_one_that_is_not_centred_is_left_to_its_readers():
    def norm(x, w, centred):
        wide = x - jnp.mean(x, -1, keepdims=True) if centred else x
        unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)
        return (unit * 2).astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), jnp.sum(unit, 0)

    stored = [
        sum(found.size[w] == 64 * 32 * 4 for k in found.kernels for w in k.writes)
        for found in (graph(lambda x, w, c=c: norm(x, w, c), X, W) for c in (True, False))
    ]
    assert stored == [1, 0]


def test_a_split_contraction_holds_its_parts_until_they_are_summed():
    tall = jax.ShapeDtypeStruct((2048, 256), jnp.bfloat16)

    def fun(x, y):
        return jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    product, added = graph(fun, tall, tall, chip=HOPPER).kernels
    assert added.label == "sum of parts" and product.writes == tuple(added.reads)
    assert graph(fun, tall, tall, chip=HOPPER).size[product.writes[0]] == 16 * 256 * 256 * 4
    assert labels(graph(fun, tall, tall)) == ["dot_general"], "where the chip is not known nothing is split"


def test_what_reads_a_carry_runs_before_what_writes_the_next():
    def fun(x, w):
        def turn(carry, w):
            return carry @ w, jnp.tanh(carry) @ w.T

        return jax.lax.scan(turn, x, w)

    (body,) = next(k for k in graph(fun, X, jax.ShapeDtypeStruct((3, 32, 32), jnp.float32)).kernels if k.bodies).bodies
    writer = next(k for k in body.kernels if set(k.writes) & body.carries.keys())
    readers = {k.order for k in body.kernels if k.arguments & set(body.carries.values())} - {writer.order}
    assert readers and readers <= {*writer.after, *orders(needs_of(body.kernels)[writer.order])}


def test_a_softmax_is_not_written_over_what_it_is_of_but_other_elementwise_work_is():
    def peak(fun):
        return profile_of(graph(lambda x, w: fun(x @ w), X, W)).peak

    stored = 64 * 32 * 4
    softmax = peak(lambda y: jnp.exp(y - y.max(-1, keepdims=True)))
    assert peak(jnp.exp) < 1.5 * stored < softmax


def test_a_loop_of_one_turn_is_no_loop():
    def turns(number):
        weights = jax.ShapeDtypeStruct((number, 32, 32), jnp.float32)
        return labels(graph(lambda x, w: jax.lax.scan(lambda c, w: (jnp.sin(c @ w), c @ w.T), x, w), X, weights))

    assert "dot_general" in turns(1) and not any("scan" in label for label in turns(1))
    assert "scan of 2" in turns(2)


def test_small_products_of_one_matrix_are_one_and_their_results_slices_of_it():
    def three(x, q, k, v):
        return jnp.sin(x @ q), jnp.exp(x @ k), x @ v

    found = graph(three, X, W, W, W)
    products = [k for k in found.kernels if k.label == "dot_general"]
    assert [found.size[w] for k in products for w in k.writes] == [3 * 64 * 32 * 4]
    assert products[0].order < min(k.order for k in found.kernels if k not in products)

    def chained(x, q, k):
        first = x @ q
        return first, x @ (first.T @ x @ k)

    assert labels(graph(chained, X, W, W)).count("dot_general") == 4, "one needs the other"
    wide = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    assert labels(graph(lambda x, a, b: (x @ a, x @ b), wide, wide, wide)).count("dot_general") == 2, "over 32 MB"


def test_two_sums_of_parts_that_are_added_are_added_at_once():
    x, w = jax.ShapeDtypeStruct((4, 256, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16)
    found = graph(lambda a, b, c, d: a @ b + c @ d, x, w, x, w, chip=HOPPER)
    assert labels(found) == ["dot_general", "dot_general", "add"]
    assert len({w for k in found.kernels for w in k.writes}) == 3


def test_what_a_short_narrow_column_sum_is_of_is_stored_and_of_a_long_one_is_not():
    def fun(x):
        return jnp.sum(x * x, 0)

    def written(rows):
        found = graph(fun, jax.ShapeDtypeStruct((rows, 256), jnp.float32), chip=HOPPER)
        return sum(found.size[w] for k in found.kernels for w in k.writes)

    assert written(2048) >= 2048 * 256 * 4 and written(8192) < 2048 * 256 * 4


def test_a_logarithm_is_not_taken_again_for_every_column():
    def loss(x, w):
        logits = x @ w
        total = jnp.log(jnp.sum(jnp.exp(logits), -1, keepdims=True))
        return (logits - total) @ w.T

    def square_root(x, w):
        logits = x @ w
        return (logits * jax.lax.rsqrt(jnp.sum(logits * logits, -1, keepdims=True))) @ w.T

    x, w = jax.ShapeDtypeStruct((64, 256), jnp.float32), jax.ShapeDtypeStruct((256, 256), jnp.float32)
    assert labels(graph(loss, x, w)) == ["dot_general", "reduce_sum", "log", "sub", "dot_general"]
    assert labels(graph(square_root, x, w)) == ["dot_general", "reduce_sum", "mul", "dot_general"]
