"""Mistakes planted into the tables of families: each is seen by comparing logits with those of transformers.

A round trip does not see those that our tables make in both directions alike, which the slow tier shows with one:
the independent proof (`--verify transformers`) does.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_train.interop import families, placing
from aurora_train.interop.families.family import Weight
from aurora_train.nn.decoder import Decoder

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from families import VOCAB, draw_weights, of_documents, rows_of  # noqa: E402
from test_parity import QUICK_JIT, placed, stored  # noqa: E402


def exchanged(one, other):
    """Each of two parameters of ours is read from where the other stands."""
    swap = {one: other, other: one, f"{one}_bias": f"{other}_bias", f"{other}_bias": f"{one}_bias"}
    swap |= {f"{a}.scale": f"{b}.scale" for a, b in ((one, other), (other, one))}

    def plant(table, config):
        held = {name for weight in table.block for name in weight.ours}
        both = {name: other for name, other in swap.items() if {name, other} <= held}
        weights = tuple(w._replace(ours=tuple(both.get(name, name) for name in w.ours)) for w in table.block)
        return dataclasses.replace(table, block=weights), config

    return plant


def shaped(**fields):
    return lambda table, config: (table, config.model_copy(update=fields))


def rows(change):
    def plant(table, config):
        table_of_layers = tuple(change(row, number) for number, row in enumerate(config.layer_table))
        return table, config.model_copy(update={"layer_table": table_of_layers})

    return plant


def _other_theta(row, number):
    return row.model_copy(update={"theta": None if row.theta else 1e4 + 9e5 * number, "scaling": None})


def _scaled(**fields):
    def plant(table, config):
        return table, config.model_copy(update={"rope_scaling": config.rope_scaling.model_copy(update=fields)})

    return plant


def _edited(theirs, **fields):
    def plant(table, config):
        weights = tuple(w._replace(**fields) if w.theirs == theirs else w for w in table.block)
        assert weights != table.block
        return dataclasses.replace(table, block=weights), config

    return plant


FAULTS = {
    "query and gate not interleaved by head": ("qwen3_5", _edited("self_attn.q_proj.weight", by_head=False)),
    "beta and decay exchanged": ("qwen3_5", exchanged("linear.write", "linear.forget")),
    "query and output gate exchanged": ("qwen3_5", exchanged("attention.query", "attention.out_gate")),
    "gate and up exchanged": ("llama3", exchanged("mlp.gate", "mlp.up")),
    "query and key exchanged": ("gpt2", exchanged("attention.query", "attention.key")),
    "key and value exchanged in a fused kernel": ("phi3", exchanged("attention.key", "attention.value")),
    "key and value biases exchanged": ("qwen2", exchanged("attention.key", "attention.value")),
    "norms of attention and MLP exchanged": ("llama2", exchanged("attn_norm", "mlp_norm")),
    "norms of outputs exchanged": ("olmo2", exchanged("attn_post_norm", "mlp_post_norm")),
    "norms of queries and keys exchanged": ("qwen3", exchanged("attention.query_norm", "attention.key_norm")),
    "a square kernel transposed": ("gpt2", _edited("attn.c_proj.weight", transpose=True)),
    "a norm without its +1": ("gemma2", shaped(norm_offset=False)),
    "embeddings not scaled": ("gemma3", shaped(embed_scale=False)),
    "query scale of the head size": ("gemma2", shaped(attention_scale=None)),
    "no cap on attention": ("gemma2", shaped(attention_softcap=None)),
    "tanh GELU taken for SiLU": ("gemma3", shaped(activation="swiglu")),
    "a window one token too long": ("mistral", shaped(window=9)),
    "theta of the other kind of layer": ("gemma3", rows(_other_theta)),
    "positions off where they are on": ("smollm3", rows(lambda row, n: row.model_copy(update={"rotary": float(n)}))),
    "rotary share": ("stablelm", rows(lambda row, n: row.model_copy(update={"rotary": 0.5}))),
    "yarn without its factor on attention": ("llama_yarn", _scaled(attention_factor=1.0)),
    "short factors beyond the original length": ("phi3", _scaled(original_length=64)),
}  # fmt: skip


@functools.lru_cache(maxsize=8)  # faults of a table alone run the same program on other weights
def _program(config):
    """(the abstract parameters, a compiled function from parameters and rows to logits)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, VOCAB, "float32", nnx.Rngs(params=0))))
    abstract = nnx.to_pure_dict(state)

    def run(weights, *rows):
        nnx.replace_by_pure_dict(state, weights)
        model = nnx.merge(graph, state)
        return model.logits(model(*rows))

    return abstract, QUICK_JIT(run)


def _logits(name, table, config):
    ours = placing.our_shapes(config, VOCAB)
    flat = placing.ours(table, ours, config.heads, draw_weights(name, stored(name)[0]))
    abstract, run = _program(config)
    tokens, _, segments, positions, _ = map(jnp.asarray, rows_of(name))
    return of_documents(np.asarray(run(placing.assembled(abstract, flat.__getitem__), tokens, segments, positions)))


QUICK = ("qwen3_5", "gpt2")  # families whose faults, all in their tables, share one program each


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[] if name in QUICK else pytest.mark.slow) for f, (name, _) in FAULTS.items()]
)
def test_a_planted_fault_is_seen(fault):
    name, plant = FAULTS[fault]
    found = _logits(name, *plant(*placed(name)))
    assert np.abs(found - stored(name)[1]).max() > 1e-3, "ten times the bound of the parity tests"


@pytest.mark.slow
def test_a_fault_in_both_directions_passes_a_round_trip_and_fails_the_independent_proof(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from open_models import write_model

    from aurora_train.errors import UserError
    from aurora_train.interop import export, proof
    from aurora_train.interop.kept import facts_of
    from aurora_train.interop.result import Result
    from aurora_train.interop.source import open_source

    write_model(tmp_path / "source", "llama3")
    opened = placing.matched(open_source(tmp_path / "source"))
    record = {"run": "r", "step": 0, "recipe": "language_model", "sequence": 64, "precision": "float32", "data": {},
              "parent": None, "base": None, "licence": None}  # fmt: skip
    facts = facts_of(opened.source, "llama")
    result = Result(opened.config, opened.vocabulary, opened.shapes, opened.read, facts, record)
    faulty, _ = exchanged("mlp.gate", "mlp.up")(families.known()["llama"], None)
    monkeypatch.setattr(families, "known", functools.cache(lambda: {"llama": faulty}))
    (tmp_path / "out").mkdir()
    family = export.write_folder(result, tmp_path / "out", "float32")
    assert proof.prove(result, family, tmp_path / "out", "float32", None)["kind"] == "round trip"
    with pytest.raises(UserError, match="transformers says something else"):
        proof.prove(result, family, tmp_path / "out", "float32", "transformers")


def test_a_table_has_no_parameter_twice():
    for family in families.known().values():
        for weights in (family.block, family.outer):
            names = [name for weight in weights for name in weight.ours]
            assert len(names) == len(set(names)), family.model_type
            assert all(isinstance(weight, Weight) for weight in weights)
