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
    with pytest.raises(ValueError, match="nothing in this model is called 'gate'"):
        DecoderConfig(activation="gelu", lora=Lora(targets=("gate",)))


NOWHERE = {
    "a slip": (("quary",), "did you mean 'query'"), "PEFT's name": (("query", "q_proj"), "did you mean 'query'"),
    "a pattern": (("mpl.*",), "called 'mpl.\\*'"), "a tied head": (("head",), "name the embedding"),
    "a block's place": (("linear.*",), "nothing in this model"), "nothing": (("",), "there are query, key"),
}  # fmt: skip


@pytest.mark.parametrize("targets,said", NOWHERE.values(), ids=NOWHERE)
def test_a_target_that_nothing_is_called_is_refused_with_what_there_is(targets, said):
    with pytest.raises(ValueError, match=said):
        DecoderConfig(lora=Lora(targets=targets))


CHOSEN = {
    ("*",): {*KERNELS, "embedding", "head"}, ("mlp.*",): {"gate", "up", "down"},
    ("attention.[qk]*", "head"): {"query", "key", "head"}, ("[!eh]*",): set(KERNELS),
}  # fmt: skip


@pytest.mark.parametrize("targets,chosen", CHOSEN.items())
def test_targets_are_names_and_patterns(targets, chosen):
    config = DecoderConfig(**SHAPE, lora=Lora(rank=2, targets=targets))
    _, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, VOCAB, "float32", nnx.Rngs(params=0))))
    assert {n.split(".")[-1].removesuffix("_lora_a") for n in flat(state) if n.endswith("_lora_a")} == chosen


def test_a_rank_stabilised_adapter_is_scaled_by_the_root_of_its_rank():
    stabilised = Lora(rank=16, alpha=8, scaling="rank_stabilised", targets=("embedding",))
    assert Lora(rank=16, alpha=8).scale == 0.5 and stabilised.scale == 2.0
    config = DecoderConfig(**SHAPE, lora=stabilised)
    assert nnx.eval_shape(lambda: Decoder(config, VOCAB, "float32", nnx.Rngs(params=0))).lora_scale == 2.0


@pytest.mark.parametrize("tied,softcap", [pytest.param(False, None, marks=pytest.mark.slow), (True, 3.0)])
def test_adapters_of_embedding_and_head_are_those_of_the_merged_tables(tied, softcap):
    """Loss, gradients, token losses, logits and hidden states against a model whose tables hold the sum."""
    targets = ("embedding",) if tied else ("embedding", "head")
    settings = {"layers": 1, "tied": tied, "logit_softcap": softcap, "embed_scale": True, "loss_chunk": 12}
    graph, state = make(lora=Lora(rank=3, alpha=6, targets=targets), **settings)
    base_graph, base = make(**settings)
    weights, merged, draw = nnx.to_pure_dict(state), nnx.to_pure_dict(base), np.random.default_rng(1)
    pairs = {}
    for name in targets:
        first, second = (name + end for end in lora.ADAPTERS)
        assert np.any(weights[second if name == "embedding" else first])
        assert not np.any(weights[first if name == "embedding" else second])
        for one in (first, second):
            weights[one] = jnp.asarray(draw.standard_normal(weights[one].shape) * 0.2, jnp.float32)
        pairs[name] = weights[first], weights[second]
        merged[name] = merged[name] + 2.0 * pairs[name][0] @ pairs[name][1]
    nnx.replace_by_pure_dict(state, weights)
    nnx.replace_by_pure_dict(base, merged)
    (found, given), (wanted, slopes) = outcome(graph, state), outcome(base_graph, base)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    for name, (down, up) in pairs.items():  # by the chain rule, from the gradient of the merged table
        for end, slope in zip(lora.ADAPTERS, (slopes[name] @ up.T, down.T @ slopes[name]), strict=True):
            np.testing.assert_allclose(given[name + end], 2.0 * slope, rtol=1e-3, atol=1e-3)


@functools.partial(jax.jit, static_argnums=0)
def outcome(graph, state):
    """((loss, (token losses, logits)), gradients as a nested dict)."""

    def loss(state):
        model = nnx.merge(graph, state)
        hidden = model(TOKENS)
        total = model.nll(hidden, TOKENS, jnp.linspace(0.0, 2.0, TOKENS.size).reshape(TOKENS.shape))[0]
        return total, (model.token_nll(hidden, TOKENS), model.logits(hidden))

    found, slopes = jax.value_and_grad(loss, has_aux=True)(state)
    return found, nnx.to_pure_dict(slopes)


@pytest.mark.release
def test_a_frozen_head_with_an_adapter_costs_no_gradient_of_its_own():
    """By the compiler's count, of a head that is most of the model: it has two products of three, as without one."""

    def flops(lora_settings):
        shape = {"width": 64, "layers": 1, "heads": 2, "kv_heads": 1, "mlp_width": 16, "tied": False}
        model = nnx.eval_shape(lambda: Decoder(DecoderConfig(**shape, lora=lora_settings), 4096, "bfloat16",
                                               nnx.Rngs(params=0)))  # fmt: skip
        graph, variables, rest = nnx.split(model, nnx.Param, ...)
        trained, frozen = lora.split(variables)

        def loss(trained, frozen):
            model = nnx.merge(graph, trained, frozen, rest)
            return model.nll(model(TOKENS), TOKENS, jnp.ones(TOKENS.shape))[0]

        return jax.jit(jax.grad(loss)).lower(trained, frozen).compile().cost_analysis()["flops"]

    alone = flops(Lora(rank=1, targets=("query",)))
    assert flops(Lora(rank=1, targets=("head",))) < 1.1 * alone and flops(None) > 1.25 * alone


@pytest.mark.parametrize("save", [None, pytest.param((), marks=pytest.mark.release)])
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
