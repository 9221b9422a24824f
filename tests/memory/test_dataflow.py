"""A jaxpr becomes the launches XLA would make of it: calls opened, elementwise chains fused, loops in place."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from aurora_train.memory.dataflow import Graph
from aurora_train.memory.program import callee, is_ref, is_variable, nbytes

N = 16
MATRIX = N * N * 4
x = w = jax.ShapeDtypeStruct((N, N), jnp.float32)


def graph(fun, *args, **how) -> Graph:
    return Graph(jax.make_jaxpr(fun)(*args), **how)


def labels(fun, *args, **how) -> list[str]:
    return [kernel.label for kernel in graph(fun, *args, **how).kernels]


# ---- values


@pytest.mark.parametrize(
    "shape,dtype,expected",
    [((), "float32", 4), ((3, 5), "bfloat16", 30), ((0, 7), "float32", 0), ((2,), "bool", 2),
     ((70_000, 70_000), "int8", 49 * 10**8)],
)
def test_bytes_of_a_value(shape, dtype, expected):
    assert nbytes(jax.ShapeDtypeStruct(shape, dtype)) == expected


def test_a_typed_key_has_bytes_too():
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    assert nbytes(keys) == 3 * 8


def test_literals_and_mutable_arrays_are_told_apart():
    def fun(x):
        ref = jax.new_ref(x)
        ref[...] = ref[...] * 2.0
        return ref[...]

    jaxpr = jax.make_jaxpr(fun)(x).jaxpr
    atoms = [atom for equation in jaxpr.eqns for atom in equation.invars]
    assert {is_variable(atom) for atom in atoms} == {True, False}
    assert {is_ref(atom) for atom in atoms if is_variable(atom)} == {True, False}


# ---- what becomes a launch


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.jit(f)), lambda f: f],
    ids=["jit", "checkpoint", "jit of jit", "bare"],
)
def test_calls_are_opened(wrap):
    def body(x, w):
        return jnp.sin(x @ w) @ w

    assert labels(lambda x, w: wrap(body)(x, w), x, w) == ["dot_general", "sin", "dot_general"]


def test_functions_with_a_derivative_of_their_own_are_opened():
    @jax.custom_vjp
    def squared(x):
        return x @ x

    squared.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))
    assert labels(squared, x) == ["dot_general"]
    assert labels(jax.grad(lambda x: squared(x).sum()), x).count("dot_general") == 1, "nobody needs the value"
    assert labels(lambda x: jax.nn.relu(x) @ x, x) == ["max", "dot_general"], "relu is a custom_jvp"


def test_a_call_is_known_by_its_jaxpr():
    equations = jax.make_jaxpr(lambda x: jax.jit(jnp.sin)(x) @ x)(x).jaxpr.eqns
    assert [callee(e) is not None for e in equations] == [True, False]


def test_elementwise_chains_end_where_something_must_read_memory():
    def chain(x):
        return jnp.exp(jnp.sin(x) * 2 + jnp.cos(x))

    assert len(labels(chain, x)) == 1
    assert labels(lambda x: chain(x).sum(), x) == ["reduce_sum"]
    assert labels(lambda x, w: chain(x) @ w, x, w) == ["exp", "dot_general"]
    assert labels(lambda x: chain(x.sum(0, keepdims=True) + x), x) == ["reduce_sum", "exp"]


def test_another_shape_or_name_of_the_same_bytes_is_no_launch():
    def renamed(x):
        return checkpoint_name(x.reshape(1, -1), "name").reshape(N, N).T

    assert labels(lambda x, w: renamed(x @ w) @ w, x, w) == ["dot_general", "dot_general"]
    assert labels(lambda x: renamed(x), x) == [], "an argument handed on"


def test_a_broadcast_is_another_array():
    found = graph(lambda row: jnp.broadcast_to(row, (N, N)), jax.ShapeDtypeStruct((1, N), jnp.float32))
    assert [sum(found.size[v] for v in k.writes) for k in found.kernels] == [MATRIX]


def test_what_no_output_needs_is_dropped():
    def wasteful(x, w):
        jnp.linalg.cholesky(x @ w)
        return x + 1

    assert labels(wasteful, x, w) == ["add"]


def test_siblings_are_one_launch_with_two_outputs_and_so_are_a_result_and_what_reads_it():
    (twin,) = graph(lambda x: (jnp.sin(x), jnp.cos(x)), x).kernels
    assert len(twin.writes) == 2 and twin.in_place
    assert len(labels(lambda x, y: (jnp.sin(x), jnp.cos(y)), x, w)) == 2, "nothing in common"
    assert len(labels(lambda x: (jnp.sin(x), jnp.cos(x[:2])), x)) == 2, "of another size"

    def parent_and_child(x):
        parent = jnp.sin(x)
        return parent, jnp.cos(x * parent)

    def sum_between(x):
        parent = jnp.sin(x)
        return parent, parent * parent.sum()

    assert labels(parent_and_child, x) == ["sin"]
    assert len(labels(sum_between, x)) == 2, "the sum is needed in between; it is taken where its terms are made"


def test_kernels_read_what_earlier_ones_write():
    def loss(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight) + x
        return (x * x).mean()

    found = graph(jax.value_and_grad(loss), [w] * 3, x)
    written = set()
    for kernel in found.kernels:
        assert kernel.reads <= written and set(kernel.operands) == kernel.reads
        assert not written & set(kernel.writes), "a value is made once"
        written |= set(kernel.writes)
    assert set(found.outputs) <= written
    assert all(found.size[v] > 0 for v in written)


# ---- loops and branches


def test_a_loop_has_one_body_however_long_it_is():
    def looped(x, w):
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, None, length=9)[0]

    (loop,) = graph(looped, x, w).kernels
    assert loop.label == "scan of 9" and loop.in_place and loop.must_share
    (body,) = loop.bodies
    assert [k.label for k in body.kernels] == ["dot_general", "sin"]


def test_one_body_used_twice_is_looked_at_once():
    def body(c, _):
        return jnp.sin(c @ c), None

    def twice(x):
        inner = jax.jit(lambda c: jax.lax.scan(body, c, None, length=3)[0])
        return inner(inner(x))

    first, second = (k for k in graph(twice, x).kernels if k.bodies)
    assert first.bodies[0] is second.bodies[0]


def test_a_slice_that_a_product_reads_is_copied_out_of_the_stacked_array_and_a_fused_one_is_not():
    stacked = jax.ShapeDtypeStruct((5, N, N), jnp.float32)

    def product(x, ws):
        return jax.lax.scan(lambda c, w: (c @ w, None), x, ws)[0]

    def fused(x, ws):
        return jax.lax.scan(lambda c, w: (c + w, None), x, ws)[0]

    assert [k.label for k in graph(product, x, stacked).kernels[-1].bodies[0].kernels] == ["slice", "dot_general"]
    assert [k.label for k in graph(fused, x, stacked).kernels[-1].bodies[0].kernels] == ["add"]


def test_a_branch_has_a_body_for_each_side_and_a_while_one():
    found = graph(lambda p, x: jax.lax.cond(p, lambda: x @ x, lambda: x), True, x)
    assert [len(k.bodies) for k in found.kernels if k.label == "cond"] == [2]
    (loop,) = graph(lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ c, x), x).kernels
    assert len(loop.bodies) == 1 and loop.in_place


def test_what_a_loop_stacks_is_allocated_before_it_and_once_for_arrays_of_one_shape():
    def stacks(x):
        def body(carry, _):
            return carry, (jnp.sin(carry), jnp.cos(carry), carry[0])

        return jax.lax.scan(body, x, None, length=3)[1]

    found = graph(stacks, x)
    empties = [k for k in found.kernels if k.label == "empty"]
    sizes = sorted([found.size[v] for v in k.writes] for k in empties)
    assert sizes == [[3 * N * 4], [3 * MATRIX, 3 * MATRIX]]


# ---- buffers that are shared or given


def test_what_is_written_over_a_donated_argument_is_known():
    found = graph(lambda x, w: (x + w, x @ w), x, w, donated=frozenset([1]))
    first, second = found.outputs
    assert found.donated == {second} and found.replaced == {found.inputs[1]} and not found.free
    assert not graph(lambda x: (x, x + 1), x, donated=frozenset([0])).donated, "an argument handed on is no output"


def test_a_mutable_array_is_one_buffer_through_a_loop():
    def added(x, w):
        total = jax.new_ref(jnp.zeros_like(x))

        def body(carry, _):
            jax.ref.addupdate(total, ..., carry @ w)
            return carry, None

        jax.lax.scan(body, x, None, length=4)
        return jax.freeze(total)

    found = graph(added, x, w)
    loop = next(k for k in found.kernels if k.bodies)
    assert [k.label for k in found.kernels] == ["broadcast_in_dim", "new_ref", "scan of 4"]
    assert list(found.outputs) == list(loop.writes)
    (body,) = loop.bodies
    assert body.outputs.keys() <= body.free, "inside, it lives in the loop's own operand"


def test_a_scatter_into_zeros_that_are_added_to_something_goes_into_that():
    index, rows = jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((3, N), jnp.float32)

    def tied(table, index, rows, x):
        return jnp.zeros_like(table).at[index].add(rows) + x.T @ x

    found = graph(tied, x, index, rows, x)
    product = next(k for k in found.kernels if k.label == "dot_general")
    scatter = next(k for k in found.kernels if k.label == "scatter-add")
    assert product.writes[0] in scatter.reads and scatter.in_place
    assert list(found.outputs) == list(scatter.writes)
    whole = [v for k in found.kernels for v in k.writes if found.size[v] == MATRIX]
    assert len(whole) == 2, "the product and the sum in its place: no zeros"

    def used_twice(table, index, rows, x):
        scattered = jnp.zeros_like(table).at[index].add(rows)
        return scattered + x.T @ x, scattered * 2

    assert "broadcast_in_dim" in [k.label for k in graph(used_twice, x, index, rows, x).kernels]


# ---- causes


def test_gradients_are_what_ends_in_a_barrier_and_saved_is_what_passes_from_loop_to_loop():
    def step(ws, x):
        def loss(ws):
            return jax.lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, ws)[0].sum()

        grads = jax.lax.optimization_barrier(jax.grad(loss)(ws))
        return jax.tree.map(lambda w, g: w - g, ws, grads)

    found = graph(step, jax.ShapeDtypeStruct((5, N, N), jnp.float32), x, donated=frozenset([0]))
    by_cause = {}
    for number, cause in found.cause.items():
        by_cause.setdefault(cause, set()).add(found.size[number])
    assert by_cause["gradients"] == {5 * MATRIX}
    assert by_cause["saved"] == {5 * MATRIX} and set(by_cause) == {"gradients", "saved"}


def test_devices_share_every_value():
    one, four = graph(lambda x: jnp.sin(x @ x), x), graph(lambda x: jnp.sin(x @ x), x, shards=4)
    assert sum(one.size.values()) == 4 * sum(four.size.values())
