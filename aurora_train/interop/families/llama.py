"""Llama and those that share its names: Mistral, SmolLM 3, Phi 3 and 4-mini, StableLM 2. SmolLM 2 is a Llama."""

from aurora_train.interop.families.family import (
    ABSENT,
    ATTENTION,
    KEYS,
    LLAMA,
    MLP,
    NO_BIAS,
    NORMS_BEFORE,
    OUTER,
    SILU,
    Family,
    Key,
    Rows,
    linear,
    sizes,
)

BLOCK = (*NORMS_BEFORE, *ATTENTION, *MLP)

FAMILIES = (
    Family(
        model_type="llama", architecture="LlamaForCausalLM", title="Llama 2 and 3, SmolLM 2", shape=LLAMA,
        sparse=sizes(4096, 32, 32, 11008, 32000, 2048, 1, 2),
        keys=KEYS, absent=ABSENT, only=SILU | NO_BIAS | {"mlp_bias": (False,)}, rows=Rows(), block=BLOCK, outer=OUTER,
    ),
    Family(
        model_type="mistral", architecture="MistralForCausalLM", title="Mistral", shape=LLAMA,
        sparse=sizes(4096, 32, 32, 14336, 32000, 131072, 1, 2),
        keys=KEYS, absent=ABSENT | {"num_key_value_heads": 8}, only=SILU,
        rows=Rows(window=4096, has_window=True), block=BLOCK, outer=OUTER,
    ),
    Family(
        model_type="smollm3", architecture="SmolLM3ForCausalLM", title="SmolLM 3", shape=LLAMA,
        sparse=sizes(2048, 36, 16, 11008, 128256, 32768, 128000, 128001, 128004),
        keys=KEYS, absent=ABSENT | {"num_key_value_heads": 4, "tie_word_embeddings": True},
        only=SILU | NO_BIAS | {"mlp_bias": (False,), "use_sliding_window": (False,)},
        rows=Rows(theta=(2e6, 2e6), no_rope=True), block=BLOCK, outer=OUTER,
    ),
    Family(
        model_type="phi3", architecture="Phi3ForCausalLM", title="Phi 3 and Phi-4-mini", shape=LLAMA,
        sparse=sizes(3072, 32, 32, 8192, 32064, 4096, 1, 32000, 32000),
        keys=KEYS, absent=ABSENT | {"rms_norm_eps": 1e-5}, only=SILU | NO_BIAS, rows=Rows(has_window=True),
        block=(
            *NORMS_BEFORE, *linear("self_attn.qkv_proj", "attention.query", "attention.key", "attention.value"),
            *linear("self_attn.o_proj", "attention.out"), *linear("mlp.gate_up_proj", "mlp.gate", "mlp.up"),
            *linear("mlp.down_proj", "mlp.down"),
        ),
        outer=OUTER,
    ),
    Family(
        model_type="stablelm", architecture="StableLmForCausalLM", title="StableLM 2",
        shape=LLAMA | {"norm": "layernorm"}, sparse=sizes(2560, 32, 32, 6912, 50304, 4096, 0, 0),
        keys={name: field for name, field in KEYS.items() if name != "rms_norm_eps"} | {
            "layer_norm_eps": "norm_eps",
            "use_qkv_bias": Key("bias", lambda on: "qkv" if on else "none", lambda bias: bias == "qkv"),
        },
        absent={"num_key_value_heads": 32, "head_dim": None, "layer_norm_eps": 1e-5, "use_qkv_bias": False,
                "tie_word_embeddings": False},
        only=SILU | {"use_parallel_residual": (False,), "qk_layernorm": (False,)},
        rows=Rows(rotary=0.25), block=BLOCK, outer=OUTER,
    ),
)  # fmt: skip
