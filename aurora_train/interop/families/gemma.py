"""Gemma 2 and the text part of Gemma 3: norms on both sides that multiply by 1 + w, scaled embeddings, layer types."""

from aurora_train.interop.families.family import (
    ATTENTION,
    GEMMA,
    HEAD_NORMS,
    KEYS,
    MLP,
    NO_BIAS,
    NORMS_BOTH,
    OUTER,
    SCALAR,
    Family,
    Rows,
    every,
    sizes,
)

_KEYS = KEYS | {
    "query_pre_attn_scalar": SCALAR, "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
}  # fmt: skip
_ABSENT = {
    "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256, "num_attention_heads": 8,
}  # fmt: skip
_ONLY = NO_BIAS | {"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False, None)}


def _gemma3_types(config: dict) -> list[str]:
    return every(config.get("sliding_window_pattern") or 6)(config)


FAMILIES = (
    Family(
        model_type="gemma2", architecture="Gemma2ForCausalLM", title="Gemma 2", shape=GEMMA, keys=_KEYS,
        sparse=sizes(2304, 26, 8, 9216, 256000, 8192, 2, 1, 0),
        absent=_ABSENT | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, only=_ONLY,
        rows=Rows(types=every(2), window=4096, has_window=True),
        block=(*NORMS_BOTH, *ATTENTION, *MLP), outer=OUTER,
    ),
    Family(
        model_type="gemma3_text", architecture="Gemma3ForCausalLM", title="Gemma 3 (text)",
        shape=GEMMA | {"qk_norm": "head"}, keys=_KEYS, sparse=sizes(2304, 26, 8, 9216, 262208, 131072, 2, 1, 0),
        absent=_ABSENT | {"attn_logit_softcapping": None, "final_logit_softcapping": None}, only=_ONLY,
        rows=Rows(
            types=_gemma3_types, window=4096, has_window=True, theta=(1e6, 1e4), by_type=True,
            local_theta="rope_local_base_freq",
        ),
        block=(*NORMS_BOTH, *ATTENTION, *HEAD_NORMS, *MLP), outer=OUTER,
    ),
)  # fmt: skip
