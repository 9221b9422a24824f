"""Eleven families as tiny models: their transformers config, ours, and where each of their weights stands in ours.

Weights are not stored anywhere: both sides draw them from `RandomState`, whose stream numpy has frozen. This file
needs neither torch nor jax.
"""

from __future__ import annotations

import numpy as np

WIDTH, LAYERS, HEADS, VOCAB, BATCH, LENGTH = 32, 2, 4, 64, 2, 24
DIM, KV_HEADS, HIDDEN = 8, 2, 48

_LLAMA = dict(
    hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
    intermediate_size=HIDDEN, vocab_size=VOCAB, max_position_embeddings=256, rms_norm_eps=1e-5,
    tie_word_embeddings=False, attention_dropout=0.0,
)  # fmt: skip
_OURS = dict(width=WIDTH, layers=LAYERS, heads=HEADS, mlp_width=HIDDEN, tied=False)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# name: (transformers class prefix, transformers config, DecoderConfig)
FAMILIES = {
    "gpt2": (
        "GPT2",
        dict(
            n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=HIDDEN, vocab_size=VOCAB, n_positions=LENGTH,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        ),
        _OURS | dict(
            tied=True, activation="gelu_tanh", norm="layernorm", bias="all", positions="learned", max_length=LENGTH
        ),
    ),
    "llama2": ("Llama", _LLAMA | dict(rope_parameters=_ROPE), _OURS),
    "llama3": (
        "Llama",
        _LLAMA | dict(
            num_key_value_heads=KV_HEADS,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=128,
            ),
        ),
        _OURS | dict(
            kv_heads=KV_HEADS,
            rope_scaling=dict(
                kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=128
            ),
        ),
    ),
    "mistral": (
        "Mistral",
        _LLAMA | dict(num_key_value_heads=KV_HEADS, sliding_window=8, rope_parameters=_ROPE),
        _OURS | dict(kv_heads=KV_HEADS, window=8),
    ),
    "qwen2": (
        "Qwen2",
        _LLAMA | dict(num_key_value_heads=KV_HEADS, rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=_ROPE),
        _OURS | dict(kv_heads=KV_HEADS, norm_eps=1e-6, tied=True, bias="qkv"),
    ),
    "qwen3": (
        "Qwen3",
        _LLAMA | dict(
            num_key_value_heads=KV_HEADS, head_dim=12, rms_norm_eps=1e-6, attention_bias=False, rope_parameters=_ROPE
        ),
        _OURS | dict(kv_heads=KV_HEADS, head_dim=12, norm_eps=1e-6, qk_norm=True),
    ),
    "gemma2": (
        "Gemma2",
        _LLAMA | dict(
            num_hidden_layers=4, num_key_value_heads=KV_HEADS, head_dim=12, rms_norm_eps=1e-6, tie_word_embeddings=True,
            pad_token_id=None,  # torch gives the padding row no gradient
            hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=16, sliding_window=8,
            attn_logit_softcapping=5.0, final_logit_softcapping=4.0, rope_parameters=_ROPE,
        ),
        _OURS | dict(
            layers=4, kv_heads=KV_HEADS, head_dim=12, norm_eps=1e-6, tied=True, activation="geglu", post_norm=True,
            norm_offset=True, embed_scale=True, window=8, window_pattern=["local", "global"], attention_scale=0.25,
            attention_softcap=5.0, logit_softcap=4.0,
        ),
    ),
    # Unlike rotary bases, one of them stretched, and norms on each head.
    "gemma3": (
        "Gemma3Text",
        _LLAMA | dict(
            num_hidden_layers=4, num_key_value_heads=KV_HEADS, head_dim=12, rms_norm_eps=1e-6, tie_word_embeddings=True,
            pad_token_id=None, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=16, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={
                "sliding_attention": _ROPE,
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        ),
        _OURS | dict(
            layers=4, kv_heads=KV_HEADS, head_dim=12, norm_eps=1e-6, tied=True, activation="geglu", norm_place="both",
            norm_offset=True, embed_scale=True, attention_scale=0.25, qk_norm="head",
            layer_table=[
                dict(kind="window", window=8),
                dict(theta=1000000.0, scaling=dict(kind="linear", factor=8.0)),
            ],
        ),
    ),
    # Norms after attention and MLP alone, and over all heads as one.
    "olmo2": (
        "Olmo2",
        _LLAMA | dict(num_key_value_heads=KV_HEADS, pad_token_id=None, rope_parameters=_ROPE),
        _OURS | dict(kv_heads=KV_HEADS, norm_place="after", qk_norm="projection"),
    ),
    # Layers without positions between those with them.
    "smollm3": (
        "SmolLM3",
        _LLAMA | dict(
            num_key_value_heads=KV_HEADS, no_rope_layers=[1, 0], pad_token_id=None, rope_parameters=_ROPE,
        ),
        _OURS | dict(kv_heads=KV_HEADS, layer_table=[dict(), dict(rotary=0.0)]),
    ),
    # A quarter of each head is turned.
    "stablelm": (
        "StableLm",
        _LLAMA | dict(
            num_key_value_heads=KV_HEADS, layer_norm_eps=1e-5, use_qkv_bias=True,
            rope_parameters=_ROPE | {"partial_rotary_factor": 0.25}, hidden_dropout=0.0,
        ),
        _OURS | dict(kv_heads=KV_HEADS, norm="layernorm", bias="qkv", layer_table=[dict(rotary=0.25)]),
    ),
}  # fmt: skip


def tokens_and_targets(family: str) -> tuple[np.ndarray, np.ndarray]:
    rows = np.random.RandomState(sum(family.encode())).randint(0, VOCAB, (BATCH, LENGTH + 1))
    return rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)


def draw_weights(family: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 weights by transformers' names. Norm scales lie around 1 (0 for Gemma), biases around 0."""
    weights = {}
    for number, name in enumerate(sorted(shapes)):
        noise = np.random.RandomState(1000 + number).standard_normal(shapes[name])
        is_scale = len(shapes[name]) == 1 and name.endswith("weight")
        centre = 1.0 if is_scale and not family.startswith("gemma") else 0.0
        weights[name] = (centre + 0.2 * noise).astype(np.float32)
    return weights


def to_ours(family: str, hf: dict[str, np.ndarray]) -> dict:
    """Weights, or their gradients, from transformers' names and layouts to the nested dict of `Decoder`."""
    layer_of = _gpt2_layer if family == "gpt2" else _llama_layer
    count = FAMILIES[family][2]["layers"]
    layers = [layer_of(hf, i) for i in range(count)]
    period = 2 if family in ("gemma2", "gemma3", "smollm3") else 1
    stacked = [_stack(layers[j::period]) for j in range(period)]
    unit = {"blocks": dict(enumerate(stacked))} if period > 1 else stacked[0]
    if family == "gpt2":
        tree = {
            "embedding": hf["transformer.wte.weight"],
            "positions": hf["transformer.wpe.weight"],
            "final_norm": {"scale": hf["transformer.ln_f.weight"], "bias": hf["transformer.ln_f.bias"]},
        }
    else:
        tree = {"embedding": hf["model.embed_tokens.weight"], "final_norm": _norm(hf, "model.norm")}
    if not FAMILIES[family][2]["tied"]:
        tree["head"] = hf["lm_head.weight"].T
    return tree | {"stack": {"segments": {0: unit}}}


def _gpt2_layer(hf, i):
    at = f"transformer.h.{i}."
    fused, fused_bias = hf[at + "attn.c_attn.weight"], hf[at + "attn.c_attn.bias"]
    attention = dict(zip(("query", "key", "value"), np.split(fused, 3, axis=1), strict=True))
    attention |= dict(zip(("query_bias", "key_bias", "value_bias"), np.split(fused_bias, 3), strict=True))
    attention |= {"out": hf[at + "attn.c_proj.weight"], "out_bias": hf[at + "attn.c_proj.bias"]}
    return {
        "attn_norm": {"scale": hf[at + "ln_1.weight"], "bias": hf[at + "ln_1.bias"]},
        "mlp_norm": {"scale": hf[at + "ln_2.weight"], "bias": hf[at + "ln_2.bias"]},
        "attention": attention,
        "mlp": {
            "up": hf[at + "mlp.c_fc.weight"],
            "up_bias": hf[at + "mlp.c_fc.bias"],
            "down": hf[at + "mlp.c_proj.weight"],
            "down_bias": hf[at + "mlp.c_proj.bias"],
        },
    }


def _llama_layer(hf, i):
    at = f"model.layers.{i}."
    before, after = (f"{at}{place}_feedforward_layernorm.weight" in hf for place in ("pre", "post"))
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if after:
        norms = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    if before:
        norms |= {"attn_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
    layer = {ours: _norm(hf, at + theirs) for ours, theirs in norms.items()}
    attention = {}
    for ours, theirs in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}.items():
        attention[ours] = hf[f"{at}self_attn.{theirs}.weight"].T
        if f"{at}self_attn.{theirs}.bias" in hf:
            attention[f"{ours}_bias"] = hf[f"{at}self_attn.{theirs}.bias"]
    for ours, theirs in {"query_norm": "q_norm", "key_norm": "k_norm"}.items():
        if f"{at}self_attn.{theirs}.weight" in hf:
            attention[ours] = {"scale": hf[f"{at}self_attn.{theirs}.weight"]}
    mlp = {name: hf[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up", "down")}
    return layer | {"attention": attention, "mlp": mlp}


def _norm(hf, name):
    bias = {"bias": hf[f"{name}.bias"]} if f"{name}.bias" in hf else {}
    return {"scale": hf[f"{name}.weight"]} | bias


def _stack(layers):
    first = layers[0]
    if isinstance(first, dict):
        return {name: _stack([layer[name] for layer in layers]) for name in first}
    return np.stack(layers)
