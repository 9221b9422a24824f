"""Tiny models of the published families, as the settings of their transformers config. Ours follow from these settings
by the tables of `aurora_train.interop.families`, which the tests compare with transformers in this way.

Weights are not stored anywhere: both sides draw them from `RandomState`, whose stream numpy has frozen. This file
needs neither torch nor jax.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WIDTH, LAYERS, HEADS, VOCAB, LENGTH = 32, 2, 4, 64, 72
KV_HEADS, HIDDEN = 2, 48
# (row, start, stop) of each document of a batch of 3 rows: one alone, more than four times as long as what YaRN, Llama
# 3 and LongRoPE stretch, nine windows, and longer than the 64 tokens that a linear layer takes at once; three packed
# into a row, the last of them shorter than what is stretched; one behind padding.
DOCUMENTS = ((0, 0, 72), (1, 0, 35), (1, 35, 59), (1, 59, 72), (2, 32, 72))

_LLAMA = dict(
    model_type="llama", hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    intermediate_size=HIDDEN, vocab_size=VOCAB, max_position_embeddings=256, rms_norm_eps=1e-5,
    tie_word_embeddings=False, attention_dropout=0.0,
)  # fmt: skip
_GROUPED = _LLAMA | dict(num_key_value_heads=KV_HEADS)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5
)
_LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75, short_factor=[1.0, 1.2, 1.5],
    long_factor=[1.5, 3.0, 9.0],
)  # fmt: skip

# The content of config.json, as far as it differs from the defaults of transformers.
FAMILIES = {
    "gpt2": dict(
        model_type="gpt2", n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=HIDDEN, vocab_size=VOCAB,
        n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ),
    "llama2": _LLAMA | dict(rope_parameters=_ROPE),
    "llama3": _GROUPED | dict(
        rope_parameters=dict(
            rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    # Stretched by YaRN.
    "llama_yarn": _GROUPED | dict(rope_parameters=_YARN),
    "mistral": _GROUPED | dict(model_type="mistral", sliding_window=8, rope_parameters=_ROPE),
    "qwen2": _GROUPED | dict(
        model_type="qwen2", rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=_ROPE,
    ),
    # The second of the layers in a window.
    "qwen2_window": _GROUPED | dict(
        model_type="qwen2", rms_norm_eps=1e-6, use_sliding_window=True, sliding_window=8, max_window_layers=1,
        rope_parameters=_ROPE,
    ),
    "qwen3": _GROUPED | dict(
        model_type="qwen3", head_dim=12, rms_norm_eps=1e-6, attention_bias=False, rope_parameters=_ROPE
    ),
    "gemma2": _GROUPED | dict(
        model_type="gemma2", num_hidden_layers=4, head_dim=12, rms_norm_eps=1e-6, tie_word_embeddings=True,
        pad_token_id=None,  # torch gives the padding row no gradient
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=16, sliding_window=8,
        attn_logit_softcapping=5.0, final_logit_softcapping=4.0, rope_parameters=_ROPE,
    ),
    # Unlike rotary bases, one of them stretched, and norms on each head.
    "gemma3": _GROUPED | dict(
        model_type="gemma3_text", num_hidden_layers=4, head_dim=12, rms_norm_eps=1e-6, tie_word_embeddings=True,
        pad_token_id=None, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=16, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "sliding_attention": _ROPE,
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
    ),
    # Norms after attention and MLP alone, and over all heads as one.
    "olmo2": _GROUPED | dict(model_type="olmo2", pad_token_id=None, rope_parameters=_ROPE),
    # Every fourth layer is full, and YaRN stretches that one alone.
    "olmo3": _GROUPED | dict(
        model_type="olmo3", num_hidden_layers=4, pad_token_id=None, sliding_window=8,
        rope_parameters={"sliding_attention": _ROPE, "full_attention": _YARN},
    ),
    # Layers without positions between those with them.
    "smollm3": _GROUPED | dict(
        model_type="smollm3", no_rope_layers=[1, 0], pad_token_id=None, rope_parameters=_ROPE
    ),
    # Fused kernels, three quarters of each head turned, by factors that depend on the length of each document.
    "phi3": _GROUPED | dict(
        model_type="phi3", pad_token_id=None, max_position_embeddings=128, original_max_position_embeddings=16,
        rope_parameters=_LONGROPE,
    ),
    # Gated DeltaNet in three of four layers, gated attention in the fourth, a quarter of each head turned. Its random
    # DeltaNet writes so little that with 1e-6 under the norms transformers' own float32 is 7e-5 off its float64.
    "qwen3_5": _GROUPED | dict(
        model_type="qwen3_5_text", num_hidden_layers=4, head_dim=16, rms_norm_eps=1e-3, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6, linear_conv_kernel_dim=4,
        rope_parameters=_ROPE | {"partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0]},
    ),
    # A quarter of each head is turned.
    "stablelm": _GROUPED | dict(
        model_type="stablelm", layer_norm_eps=1e-5, use_qkv_bias=True,
        rope_parameters=_ROPE | {"partial_rotary_factor": 0.25}, hidden_dropout=0.0,
    ),
}  # fmt: skip


class Rows(NamedTuple):
    """A batch, int32[3, LENGTH] each. `segments` number the documents of a row from 1; padding is 0, its tokens are
    random too, and `weights` are 0 there."""

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


def rows_of(family: str) -> Rows:
    """Random tokens and targets, cut into DOCUMENTS."""
    tokens, targets = np.random.RandomState(sum(family.encode())).randint(0, VOCAB, (2, 3, LENGTH)).astype(np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, start, stop in DOCUMENTS:
        segments[row, start:stop] = segments[row].max() + 1
        positions[row, start:stop] = np.arange(stop - start)
    return Rows(tokens, targets, segments, positions, np.minimum(segments, 1))


def of_documents(rows: np.ndarray) -> np.ndarray:
    """What belongs to the tokens of DOCUMENTS, one after the other, of an array [3, LENGTH, ...]."""
    return np.concatenate([rows[row, start:stop] for row, start, stop in DOCUMENTS])


def draw_weights(family: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 weights by transformers' names. Norm scales lie around 1 (0 where 1 is added), biases around 0."""
    weights = {}
    for number, name in enumerate(sorted(shapes)):
        noise = np.random.RandomState(1000 + number).standard_normal(shapes[name])
        is_scale = len(shapes[name]) == 1 and name.endswith("weight")
        adds_one = family.startswith("gemma") or (family == "qwen3_5" and not name.endswith("linear_attn.norm.weight"))
        centre = 1.0 if is_scale and not adds_one else 0.0
        weights[name] = (centre + 0.2 * noise).astype(np.float32)
    return weights
