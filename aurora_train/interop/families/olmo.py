"""OLMo 2 and 3: norms on the outputs alone, and on all query and all key heads as one. OLMo 3 has windowed layers."""

from aurora_train.interop.families.family import (
    ABSENT,
    ATTENTION,
    HEAD_NORMS,
    KEYS,
    LLAMA,
    MLP,
    NO_BIAS,
    NORMS_AFTER,
    OUTER,
    SILU,
    Family,
    Rows,
    every,
    sizes,
)

_SHAPE = LLAMA | {"norm_place": "after", "qk_norm": "projection"}
_ABSENT = ABSENT | {"rms_norm_eps": 1e-5}
_BLOCK = (*NORMS_AFTER, *ATTENTION, *HEAD_NORMS, *MLP)

FAMILIES = (
    Family(
        model_type="olmo2", architecture="Olmo2ForCausalLM", title="OLMo 2", shape=_SHAPE, keys=KEYS, absent=_ABSENT,
        sparse=sizes(4096, 32, 32, 11008, 50304, 2048, None, 50279, 1), only=SILU | NO_BIAS, rows=Rows(),
        block=_BLOCK, outer=OUTER,
    ),
    Family(
        model_type="olmo3", architecture="Olmo3ForCausalLM", title="OLMo 3", shape=_SHAPE, keys=KEYS, absent=_ABSENT,
        sparse=sizes(4096, 32, 32, 11008, 50304, 2048, None, 50279, 1), only=SILU | NO_BIAS,
        rows=Rows(types=every(4), window=4096, has_window=True, theta=(5e5, 5e5), by_type=True),
        block=_BLOCK, outer=OUTER,
    ),
)  # fmt: skip
