"""Moments and masters in fewer bits: what is stored, that its rounding has no drift, and that training notices little.

Matrices are 64 by 96 here, because smaller ones keep float32 moments.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from aurora_train import mesh as meshes
from aurora_train.checkpoint import layout
from aurora_train.config import load
from aurora_train.config.schema import Optimizer, Schedule
from aurora_train.errors import UserError
from aurora_train.optimizer import build, codes, partition, rounding, stored
from aurora_train.optimizer.directions import make_direction
from aurora_train.random import stream

PLAIN = {"lr": 1e-2, "clip": None, "schedule": Schedule(name="constant")}
CUT = ((0, 2), (2, 4))
NARROW = [("adamw", "int8", "bfloat16"), pytest.param("muon", "bfloat16", "float32", marks=pytest.mark.release)]
# The slow tier has what the first leaves out: each optimizer with 8 bits, and a moment of two bytes beside float32.
UNLIKE = (("adamw", "bfloat16", "float32"), ("lion", "int8", "bfloat16"), ("muon", "int8", "bfloat16"))
NARROW += [
    pytest.param(name, moments, master,
                 marks=pytest.mark.slow if (name, moments, master) in UNLIKE else pytest.mark.release)
    for name in ("adamw", "lion", "muon")
    for moments, master in (("bfloat16", "float32"), ("int8", "float32"), ("float32", "bfloat16"), ("int8", "bfloat16"))
    if (name, moments, master) not in (("adamw", "int8", "bfloat16"), ("muon", "bfloat16", "float32"))
]  # fmt: skip


def model(seed, cuts=((0, 4),), units=4):
    """A table, a head and a stack of `units` blocks cut as told; standard normal."""
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    stack = {"up": normal(units, 64, 96), "down": normal(units, 96, 64), "bias": normal(units, 96)}
    segments = {i: jax.tree.map(lambda a, r=r: a[slice(*r)], stack) for i, r in enumerate(cuts)}
    return {"embedding": normal(80, 64), "blocks": {"segments": segments}, "head": normal(64, 80)}


@functools.cache
def compiled(settings: str):
    """(the optimizer of a config's JSON, its compiled update), which the tests of one config share."""
    optimizer = build(Optimizer.model_validate_json(settings), 100)
    return optimizer, jax.jit(optimizer.update)


def trained(config, cuts=((0, 4),), steps=6, first=0, start=None):
    """(params, state) after some steps with the same gradients whatever the cut."""
    optimizer, update = compiled(config.model_dump_json())
    params, state = start or (None, None)
    if start is None:
        params = stored(model(0, cuts), config)
        state = optimizer.init(params)
    for step in range(first, first + steps):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), model(step + 1, cuts), params)
        params, state, _ = update(grads, state, params, step)
    return params, state


def flat(tree):
    return layout.snapshot(tree)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
@pytest.mark.optimized
def test_float32_is_bit_for_bit_the_plain_transform_vmapped_over_units(name):
    config = Optimizer(name=name, **PLAIN)
    direction, optimizer = make_direction(config), build(config, 100)

    def apply(grads, state, params, lr):
        updates, state = direction(params).update(grads, state, params)
        return jax.tree.map(lambda p, u: p - lr * u, params, updates), state

    @jax.jit
    def plain(grads, rest_state, stack_state, params, step):
        lr, grads = optimizer.schedule(step), jax.tree.map(lambda g: g * jnp.float32(1), grads)
        (rest, stacks), (rest_grads, stack_grads) = partition(params), partition(grads)
        rest = apply(rest_grads, rest_state, rest, lr)
        over = jax.vmap(apply, in_axes=(0, 0, 0, None))
        return rest, over(stack_grads["blocks"]["segments"][0], stack_state, stacks["blocks"]["segments"][0], lr)

    params = model(0)
    rest, stacks = partition(params)
    start = [direction(rest).init(rest), jax.vmap(lambda p: direction(p).init(p))(stacks["blocks"]["segments"][0])]
    for step in range(3):
        (rest, start[0]), (units, start[1]) = plain(model(step + 1), *start, params, step)
        params = {**rest, "blocks": {"segments": {0: units}}}
    ours, state = trained(config, steps=3)
    if config.name == "muon":  # updated in turn: products of one matrix, not of a batch of them
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, params)
        return
    jax.tree.map(np.testing.assert_array_equal, ours, params)
    jax.tree.map(np.testing.assert_array_equal, state["rest"], start[0])
    jax.tree.map(np.testing.assert_array_equal, state["stacks"]["blocks"]["segments"][0], start[1])


def test_codes_are_all_used_in_order_and_come_back_as_themselves():
    for dtype, numbers in ((jnp.uint8, np.arange(256)), (jnp.int8, np.arange(-127, 128))):
        every = jnp.asarray(numbers, dtype)[None]
        scale = jnp.ones((1, codes.blocks(every.shape[1])))
        values = codes.unpack(every, scale)
        assert (np.diff(np.asarray(values)[0]) > 0).all()
        np.testing.assert_allclose(np.abs(values).max(), 1, rtol=1e-6)
        assert np.abs(np.asarray(values))[np.asarray(values) != 0].min() < 1.1e-6
        np.testing.assert_array_equal(codes.pack(values, scale, dtype, None), every)


@pytest.mark.parametrize("size", [64, 256, 300, 1000])
def test_a_value_comes_back_within_its_decade_and_each_block_has_its_own_scale(size):
    draw = np.random.default_rng(size)
    x = jnp.asarray(draw.standard_normal((5, size)) * 10.0 ** draw.integers(-3, 1, (5, size)), jnp.float32)
    x = x.at[:, -1].multiply(1e4)  # ruins the precision of the last block alone
    for dtype, value in ((jnp.int8, x), (jnp.uint8, jnp.square(x))):
        scales = codes.measure(value)
        assert scales.shape == (5, codes.blocks(size))
        back = np.asarray(codes.unpack(codes.pack(value, scales, dtype, None), scales))
        width = min(256, size)
        for block in range(codes.blocks(size)):
            piece, got = (np.asarray(a)[:, block * width : (block + 1) * width] for a in (value, back))
            largest = np.abs(piece).max(-1, keepdims=True)
            np.testing.assert_allclose(largest, scales[:, block : block + 1])
            np.testing.assert_allclose(np.abs(got).max(-1, keepdims=True), largest, rtol=1e-6)
            assert (np.abs(got - piece) <= largest * 0.45 / (128 if dtype == jnp.uint8 else 64) * 1.001).all()
            top = np.abs(piece) > largest * 0.1
            assert (np.abs(got / piece - 1)[top] < (0.036 if dtype == jnp.uint8 else 0.071)).all()


def test_a_positive_second_moment_is_never_zero_and_a_block_of_nothing_stays_nothing():
    value = jnp.zeros((2, 256)).at[0, 0].set(1.0).at[0, 1].set(1e-30)
    scales = codes.measure(value)
    back = np.asarray(codes.unpack(codes.pack(value, scales, jnp.uint8, None), scales))
    assert back[0, 1] > 0 and (back[0, 2:] == 0).all() and (back[1] == 0).all()


def test_noise_rounds_to_a_neighbour_and_its_mean_is_the_value():
    values = jnp.asarray([1.0, 0.34567, 0.0123, 3.3e-4, 0.77])
    noise = rounding.bits(rounding.words(jax.random.key(0), ["a"])["a"], (40_000, 5))
    many = jnp.broadcast_to(values, (40_000, 5))
    for dtype in (jnp.int8, jnp.uint8):
        scales = codes.measure(many)
        back = np.asarray(codes.unpack(codes.pack(many, scales, dtype, noise), scales), np.float64)
        np.testing.assert_allclose(back.mean(0), values, rtol=2e-3)
    half = np.asarray(rounding.to_bfloat16(many, noise), np.float64)
    np.testing.assert_allclose(half.mean(0), values, rtol=5e-5)
    assert all(len(set(column)) == (1 if value == 1 else 2) for column, value in zip(half.T, values, strict=True))


def test_what_bfloat16_holds_and_what_is_not_finite_is_left_alone():
    noise = jnp.full((4,), 0xFFFF, jnp.uint32)
    x = jnp.asarray([1.5, jnp.nan, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(np.asarray(rounding.to_bfloat16(x, noise), np.float32), x)


def test_the_bits_of_unlike_places_are_unlike_and_each_bit_is_even():
    one = rounding.words(stream(0, "a"), ["mu.w", "nu.w"])
    drawn = [rounding.bits(one["mu.w"], (64, 256)), rounding.bits(one["nu.w"], (64, 256))]
    drawn.append(rounding.bits(rounding.words(stream(1, "a"), ["mu.w"])["mu.w"], (64, 256)))
    for a in drawn:
        ones = [np.mean((np.asarray(a) >> bit) & 1) for bit in range(32)]
        np.testing.assert_allclose(ones, 0.5, atol=0.025)
        assert abs(np.corrcoef(np.asarray(a)[:-1].ravel(), np.asarray(a)[1:].ravel())[0, 1]) < 0.04
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(np.asarray(drawn[a]) == np.asarray(drawn[b])) < 1e-3
    np.testing.assert_array_equal(rounding.words(stream(0, "a"), ["nu.w"])["nu.w"], one["nu.w"])  # whoever else asks


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_second_moment_that_moves_less_than_half_a_step_still_arrives(moments):
    """Nearest rounding holds the moments that should fall to a quarter here where they were, in either format."""
    config = Optimizer(beta2=0.999, moments=moments, **PLAIN)
    optimizer, params = build(config, 100), {"w": jnp.zeros((64, 96))}
    high = jnp.ones((64, 96))
    low = high.at[:, 1:].set(0.5)  # the first of each row keeps the scale of its block where it is

    @jax.jit
    def go(state):
        def one(i, state):
            return optimizer.update({"w": jnp.where(i < 500, high, low)}, state, params, i)[1]

        return jax.lax.fori_loop(0, 1500, one, state)

    nu = go(optimizer.init(params))["rest"][0].nu
    values = nu["w"] if moments == "bfloat16" else codes.unpack(nu.values["w"], nu.scales["w"])
    rise, fall = 1 - 0.999**500, 0.999**1000
    np.testing.assert_allclose(np.asarray(values, np.float64)[:, 1:].mean(), rise * fall + 0.25 * (1 - fall), rtol=0.01)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_eight_bits_go_to_matrices_and_not_to_tables_vectors_and_what_is_small(name):
    params = {**model(0), "small": jnp.ones((8, 64))}
    state = build(Optimizer(name=name, moments="int8", **PLAIN), 10).init(params)
    kinds = {}
    for path, array in flat(state).items():
        if ".values." in path:
            kinds.setdefault(path.rsplit(".", 1)[1], set()).add(str(array.dtype))
    coded = {"int8"} if name == "lion" else {"int8", "uint8"}
    assert kinds["head"] == coded and kinds["up"] == (coded if name != "muon" else {"int8"})
    assert kinds["embedding"] == kinds["bias"] == kinds["small"] == {"float32"}


@pytest.mark.optimized
def test_bytes_of_a_parameter_are_what_the_formats_say_and_init_makes_no_float32_on_the_way():
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    for moments, each in (("float32", 8), ("bfloat16", 4), ("int8", 2 * (1 + 4 / 256))):
        optimizer = build(Optimizer(moments=moments, **PLAIN), 10)
        abstract = jax.eval_shape(optimizer.init, params)
        held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract))
        assert held == each * 2**20 + 4  # and a count
        memory = jax.jit(optimizer.init).lower(params).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 2**16 and memory.output_size_in_bytes < held + 2**12


@pytest.mark.parametrize("name,moments,master", NARROW)
@pytest.mark.optimized
def test_no_cut_moves_a_bit_of_what_is_rounded(name, moments, master):
    config = Optimizer(name=name, moments=moments, master=master, **PLAIN)
    assert_same(flat(trained(config)), flat(trained(config, CUT)))


@pytest.mark.parametrize("name,moments,master", NARROW[:1] + NARROW[2:])
@pytest.mark.optimized
def test_a_state_survives_the_disk_and_another_cut_and_goes_on_to_the_same_bits(name, moments, master):
    config = Optimizer(name=name, moments=moments, master=master, **PLAIN)
    saved = flat(trained(config, CUT))
    whole = jax.eval_shape(lambda: trained(config, steps=1))
    whole_mesh = meshes.replicated(meshes.make_mesh(1, 1))
    shardings = jax.tree.map(lambda _: whole_mesh, whole)
    assert layout.difference(saved, layout.abstract(whole, shardings)) == []
    back = layout.assemble(saved, whole, shardings)
    resumed = trained(config, first=6, steps=4, start=back)
    assert_same(flat(resumed), flat(trained(config, CUT, first=6, steps=4, start=trained(config, CUT))))


def test_rounding_is_another_in_each_unit_step_and_seed():
    config = Optimizer(master="bfloat16", **{**PLAIN, "lr": 1e-3})
    same = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), model(0)["blocks"])
    optimizer, params = build(config, 10), stored({"blocks": same}, config)
    state, updates = optimizer.init(params), [jax.jit(build(config, 10, seed).update) for seed in (0, 1)]
    first, second, other = (np.asarray(updates[seed](params, state, params, step)[0]["blocks"]["segments"][0]["up"])
                            for seed, step in ((0, 0), (0, 1), (1, 0)))  # fmt: skip
    assert first.dtype == jnp.bfloat16
    assert (first[0] != first[1]).any() and (first != second).any() and (first != other).any()


def test_each_stored_value_lies_under_the_name_and_in_the_shape_of_its_parameter():
    params, state = trained(Optimizer(moments="int8", **PLAIN), steps=1)
    shapes = {name: a.shape for name, a in flat(partition(params)[0]).items()}
    values = {name: a for name, a in flat(state["rest"]).items() if ".values." in name}
    assert len(values) == 4
    assert all(a.shape == shapes[name.rsplit(".", 1)[1]] for name, a in values.items())


@pytest.mark.optimized
@pytest.mark.parametrize(
    "name,moments,master", [pytest.param(*NARROW[0], marks=pytest.mark.slow), NARROW[1],
                            pytest.param("muon", "int8", "float32", marks=pytest.mark.release)]
)  # fmt: skip
def test_an_update_that_is_not_good_leaves_everything_as_it_was(name, moments, master):
    config = Optimizer(name=name, moments=moments, master=master, **PLAIN)
    optimizer, update = compiled(config.model_dump_json())
    params = stored(model(0), config)
    state, grads = optimizer.init(params), jax.tree.map(lambda g, p: g.astype(p.dtype), model(1), params)
    for good, slope in ((False, grads), (True, jax.tree.map(lambda g: g * jnp.nan, grads))):
        after = update(grads if good is False else slope, state, params, 3, jnp.asarray(good))[:2]
        jax.tree.map(np.testing.assert_array_equal, after, (params, state))
    moved, _, _ = update(grads, state, params, 3, jnp.asarray(True))
    expected, _, _ = update(grads, state, params, 3)
    jax.tree.map(np.testing.assert_array_equal, moved, expected)


def test_adafactor_is_refused_what_it_has_not():
    with pytest.raises(UserError) as caught:
        build(Optimizer(name="adafactor", moments="int8"), 10)
    assert "optimizer.moments" in str(caught.value) and "no full moments" in str(caught.value)


@pytest.mark.parametrize(
    "name,moments,master", [pytest.param(*NARROW[0], marks=pytest.mark.slow), *NARROW[1:]]
)
def test_a_toy_loss_ends_where_float32_ends(name, moments, master):
    target = model(1)

    def end(config):
        optimizer, params = build(config, 60), stored(model(0), config)

        def loss(p):
            return sum(jnp.mean((a.astype(jnp.float32) - b) ** 2) for a, b in
                       zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True))

        def go(carry, step):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            params, state, _ = optimizer.update(grads, state, params, step)
            return (params, state), value

        return np.asarray(jax.jit(lambda c: jax.lax.scan(go, c, jnp.arange(60)))((params, optimizer.init(params)))[1])

    rest = {"name": name, "weight_decay": 0.0, "lr": 3e-2, "schedule": Schedule(warmup=5)}
    wide, narrow = end(Optimizer(**rest)), end(Optimizer(**rest, moments=moments, master=master))
    assert narrow[-1] < 0.6 * narrow[0]
    np.testing.assert_allclose(narrow[-1], wide[-1], rtol=0.03)


@pytest.mark.parametrize("moments", [pytest.param("bfloat16", marks=pytest.mark.release),
                                     pytest.param("int8", marks=pytest.mark.slow)])  # fmt: skip
def test_a_run_of_two_hundred_steps_ends_within_three_percent_of_float32(moments, tmp_path):
    from train.pieces import trained as run

    path = toy.write(tmp_path)
    overrides = ["model.width=64", "train.steps=200", "memory.accumulation=1", "data.rows=400"]
    ends = [
        np.mean(run(load(path, [*overrides, f"optimizer.moments={name}"]), 200)[0][-20:])
        for name in ("float32", moments)
    ]
    np.testing.assert_allclose(ends[1], ends[0], rtol=0.03)
