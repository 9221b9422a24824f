"""Low-rank adapters: what they compute, what they leave as it was, and what a frozen kernel no longer costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_train.nn import lora
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import KERNELS, DecoderConfig, Lora
from aurora_train.nn.stack import Segment

VOCAB, TOKENS = 64, np.arange(48, dtype=np.int32).reshape(2, 24) % 61
SHAPE = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 48, "tied": False, "bias": "all"}


def make(dtype="float32", **settings):
    """(graph, nested dict of parameters) of a small decoder, always from the same seed."""

    def build():
        return Decoder(DecoderConfig(**{**SHAPE, **settings}), VOCAB, dtype, nnx.Rngs(params=jax.random.key(5)))

    graph, _ = nnx.split(nnx.eval_shape(build))
    return graph, jax.jit(lambda: nnx.split(build())[1])()


@functools.partial(jax.jit, static_argnums=0)
def hidden(graph, state):
    return nnx.merge(graph, state)(TOKENS)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(tree))
    return {".".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_step_the_adapters_add_exactly_nothing(dtype):
    base_graph, base = make(dtype)
    graph, adapted = make(dtype, lora=Lora(rank=4))
    known = flat(adapted)
    for name, leaf in flat(base).items():
        np.testing.assert_array_equal(known.pop(name), leaf, err_msg=name)
    assert known and all(map(lora.is_adapter, known))
    # Of two programs XLA may join other products and round otherwise, so the base is near; in one, A changes no bit.
    first = hidden(graph, adapted)
    np.testing.assert_allclose(first, hidden(base_graph, base), rtol=0, atol=1e-5 if dtype == "float32" else 0)
    other = jax.tree_util.tree_map_with_path(lambda path, a: -3 * a if "lora_a" in str(path) else a, adapted)
    np.testing.assert_array_equal(hidden(graph, other), first)


def test_an_adapter_adds_alpha_over_rank_times_a_times_b_to_each_targeted_kernel():
    targets = ("query", "value", "out", "down")
    graph, state = make(lora=Lora(rank=3, alpha=12, targets=targets))
    base_graph, base = make()
    adapters = {name: leaf for name, leaf in flat(state).items() if lora.is_adapter(name)}
    assert {name.split(".")[-1] for name in adapters} == {f"{t}_lora_{x}" for t in targets for x in "ab"}
    draw = np.random.default_rng(0)

    def moved(path, leaf):
        name = ".".join(str(entry.key) for entry in path)
        return draw.standard_normal(leaf.shape).astype(np.float32) * 0.3 if name.endswith("_lora_b") else leaf

    weights = jax.tree_util.tree_map_with_path(moved, nnx.to_pure_dict(state))
    merged = nnx.to_pure_dict(base)
    for part in ("attention", "mlp"):
        unit, target = weights["stack"]["segments"][0][part], merged["stack"]["segments"][0][part]
        for name in (name for name in targets if name in target):
            product = np.einsum("lir,lro->lio", unit[f"{name}_lora_a"], unit[f"{name}_lora_b"])
            assert np.abs(product).max() > 0.1
            target[name] = target[name] + 4.0 * product
    nnx.replace_by_pure_dict(state, weights)
    nnx.replace_by_pure_dict(base, merged)
    np.testing.assert_allclose(hidden(graph, state), hidden(base_graph, base), rtol=2e-4, atol=2e-4)


def test_adapters_of_unlike_kernels_and_layers_are_drawn_apart_and_b_is_zero():
    _, state = make(lora=Lora(rank=4))
    leaves = flat(state)
    downs = [np.asarray(row) for name, leaf in leaves.items() if name.endswith("_lora_a") for row in leaf]
    assert len(downs) == 2 * len(KERNELS) and len({row.tobytes()[:64] for row in downs}) == len(downs)
    spread = np.concatenate([row.ravel() * row.shape[0] ** 0.5 for row in downs])
    assert abs(spread.std() - 1) < 0.1 and abs(spread.mean()) < 0.1
    assert not any(np.any(leaf) for name, leaf in leaves.items() if name.endswith("_lora_b"))


def test_a_model_with_adapters_trains_these_alone_and_one_without_trains_all():
    for settings, trained in (({"lora": Lora(rank=2)}, lora.is_adapter), ({}, lambda name: True)):
        _, state = make(**settings)
        one, other = map(flat, lora.split(nnx.filter_state(state, nnx.Param)))
        assert one and all(map(trained, one)) and not any(map(trained, other))
        assert one.keys() | other.keys() == flat(state).keys()


def test_a_plain_mlp_has_no_gate_and_a_target_that_is_nowhere_is_refused():
    _, state = make(activation="gelu", lora=Lora(rank=2))
    assert not any("gate" in name for name in flat(state))
    with pytest.raises(ValueError, match="gelu has none"):
        DecoderConfig(activation="gelu", lora=Lora(targets=("gate",)))


@pytest.mark.parametrize("save", [None, ()])
@pytest.mark.optimized
def test_no_gradient_of_a_frozen_kernel_is_computed_in_a_scanned_stack(save):
    """By the compiler's count: forward and input gradients are two of the three products of each kernel."""

    def flops(settings):
        def build():
            shape = {**SHAPE, "width": 64, "mlp_width": 256, **settings}
            model = Decoder(DecoderConfig(**shape), 512, "bfloat16", nnx.Rngs(params=0))
            model.stack.cut((Segment(0, 2, save),))
            return model

        graph, variables, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
        trained, frozen = lora.split(variables)

        def loss(trained, frozen):
            model = nnx.merge(graph, trained, frozen, rest)
            return model.nll(model(TOKENS), TOKENS, jnp.ones(TOKENS.shape))[0]

        return jax.jit(jax.grad(loss)).lower(trained, frozen).compile().cost_analysis()["flops"]

    whole = 3 if save is None else 4  # recomputing adds a forward pass, and no cut of it is counted here
    share = flops({"lora": Lora(rank=1, targets=("query",))}) / flops({})
    assert (whole - 1) / whole - 0.06 < share < (whole - 1) / whole + 0.06
