"""Qwen 2, 2.5 and 3. Qwen 2 has biases on queries, keys and values; Qwen 3 has norms on each head instead."""

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
)


def _layer_types(config: dict) -> list[str]:
    """The first `max_window_layers` layers are full, the others windowed if windows are used at all."""
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else config["num_hidden_layers"]
    return ["full_attention" if i < first else "sliding_attention" for i in range(config["num_hidden_layers"])]


_ROWS = Rows(types=_layer_types, window=4096, window_if="use_sliding_window", has_window=True)

FAMILIES = (
    Family(
        model_type="qwen2", architecture="Qwen2ForCausalLM", title="Qwen 2 and 2.5", shape=LLAMA | {"bias": "qkv"},
        keys=KEYS, absent=ABSENT | {"num_key_value_heads": 32}, only=SILU, rows=_ROWS,
        block=(*NORMS_BEFORE, *ATTENTION, *MLP), outer=OUTER,
    ),
    Family(
        model_type="qwen3", architecture="Qwen3ForCausalLM", title="Qwen 3", shape=LLAMA | {"qk_norm": "head"},
        keys=KEYS, absent=ABSENT | {"num_key_value_heads": 32, "head_dim": 128}, only=SILU | NO_BIAS, rows=_ROWS,
        block=(*NORMS_BEFORE, *ATTENTION, *HEAD_NORMS, *MLP), outer=OUTER,
    ),
)  # fmt: skip
