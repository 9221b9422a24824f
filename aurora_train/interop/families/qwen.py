"""Qwen 2, 2.5, 3 and the text part of 3.5.

Qwen 2 has biases on queries, keys and values; Qwen 3 has norms on each head instead; Qwen 3.5 is Gated DeltaNet in
three of four layers, and gated attention in the others.
"""

from aurora_train.interop.families.family import (
    ABSENT,
    ATTENTION,
    HEAD_NORMS,
    KEYS,
    LLAMA,
    MLP,
    NO_BIAS,
    NORMS_BEFORE,
    OUTER,
    SILU,
    Family,
    Rows,
    Weight,
    linear,
    sizes,
)


def _layer_types(config: dict) -> list[str]:
    """The first `max_window_layers` layers are full, the others windowed if windows are used at all."""
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else config["num_hidden_layers"]
    return ["full_attention" if i < first else "sliding_attention" for i in range(config["num_hidden_layers"])]


def _linear_types(config: dict) -> list[str]:
    """Every fourth layer is full, the others linear."""
    period = config.get("full_attention_interval") or 4
    return ["linear_attention" if (i + 1) % period else "full_attention" for i in range(config["num_hidden_layers"])]


_ROWS = Rows(types=_layer_types, window=4096, window_if="use_sliding_window", has_window=True)

FAMILIES = (
    Family(
        model_type="qwen2", architecture="Qwen2ForCausalLM", title="Qwen 2 and 2.5", shape=LLAMA | {"bias": "qkv"},
        sparse=sizes(4096, 32, 32, 22016, 151936, 32768),
        keys=KEYS, absent=ABSENT | {"num_key_value_heads": 32}, only=SILU, rows=_ROWS,
        block=(*NORMS_BEFORE, *ATTENTION, *MLP), outer=OUTER,
    ),
    Family(
        model_type="qwen3", architecture="Qwen3ForCausalLM", title="Qwen 3", shape=LLAMA | {"qk_norm": "head"},
        sparse=sizes(4096, 32, 32, 22016, 151936, 32768),
        keys=KEYS, absent=ABSENT | {"num_key_value_heads": 32, "head_dim": 128}, only=SILU | NO_BIAS, rows=_ROWS,
        block=(*NORMS_BEFORE, *ATTENTION, *HEAD_NORMS, *MLP), outer=OUTER,
    ),
    Family(
        model_type="qwen3_5_text", architecture="Qwen3_5ForCausalLM", title="Qwen 3.5 (text)",
        shape=LLAMA | {"qk_norm": "head", "norm_offset": True, "attention_gate": True},
        sparse=sizes(4096, 32, 16, 12288, 248320, 32768),
        keys=KEYS | {
            "linear_num_key_heads": "linear.key_heads", "linear_num_value_heads": "linear.value_heads",
            "linear_key_head_dim": "linear.key_dim", "linear_value_head_dim": "linear.value_dim",
            "linear_conv_kernel_dim": "linear.taps",
        },
        absent=ABSENT | {
            "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        },
        only=SILU | NO_BIAS, rows=Rows(types=_linear_types, rotary=0.25, linear=True),
        block=(
            *NORMS_BEFORE, *ATTENTION[2:], *HEAD_NORMS, *MLP,
            Weight("self_attn.q_proj.weight", ("attention.query", "attention.out_gate"), by_head=True),
            *linear("linear_attn.in_proj_qkv", "linear.query", "linear.key", "linear.value"),
            *linear("linear_attn.in_proj_z", "linear.out_gate"), *linear("linear_attn.out_proj", "linear.out"),
            Weight("linear_attn.in_proj_b.weight", ("linear.write",)),
            Weight("linear_attn.in_proj_a.weight", ("linear.forget",)),
            Weight("linear_attn.conv1d.weight", ("linear.conv",), middle=True),
            Weight("linear_attn.A_log", ("linear.forget_rate",)),
            Weight("linear_attn.dt_bias", ("linear.forget_bias",)),
            Weight("linear_attn.norm.weight", ("linear.norm.scale",)),
        ),
        outer=OUTER,
    ),
)  # fmt: skip
