"""The architectures of GGUF that are read and written: how their tensors are named here and in a Hugging Face folder.

One row each. The names are those of llama.cpp's `gguf` package (`get_tensor_name_map`), which a test compares with
this table; what its converter does to the values (`permuted`, `norm_plus_one`, `transposed`) is undone on reading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_PROJECTIONS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_AROUND = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_AFTER}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GPT2 = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_TIED = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_TOP = {**_TIED, "output": "lm_head"}


class Architecture(NamedTuple):
    """One value of `general.architecture`.

    Attributes:
        model_type: that of transformers' config.json.
        block: the tensors of a layer: the name after `blk.N.` -> the name after the prefix of a layer.
        prefix: what comes before the number of a layer in a Hugging Face name.
        top: the tensors outside the layers.
        permuted: the rows of query and key are stored with the rotary halves interleaved.
        norm_plus_one: norms are stored with the 1 added that the model adds to them.
        transposed: the ends of names whose matrices a Hugging Face folder has the other way around (Conv1D).
        extra: tensors that hold settings, not weights: `model` makes config keys of them.
    """

    model_type: str
    block: Mapping[str, str]
    prefix: str = "model.layers."
    top: Mapping[str, str] = _TOP
    permuted: bool = False
    norm_plus_one: bool = False
    transposed: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def hf_name(self, name: str) -> str | None:
        """The Hugging Face name of a tensor of a GGUF file; None if the architecture has no such tensor."""
        stem, _, end = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        if end not in ("weight", "bias"):
            return None
        if layer is None:
            return f"{self.top[stem]}.{end}" if stem in self.top else None
        known = self.block.get(layer[2])
        return f"{self.prefix}{layer[1]}.{known}.{end}" if known else None

    def gguf_name(self, name: str) -> str | None:
        """The inverse of `hf_name`."""
        stem, _, end = name.rpartition(".")
        if stem.startswith(self.prefix):
            number, _, rest = stem.removeprefix(self.prefix).partition(".")
            for theirs, ours in self.block.items():
                if ours == rest:
                    return f"blk.{number}.{theirs}.{end}"
        return next((f"{theirs}.{end}" for theirs, ours in self.top.items() if ours == stem), None)

    def is_permuted(self, hf_name: str) -> bool:
        return self.permuted and bool(re.search(r"\.(q|k)_proj\.(weight|bias)$", hf_name))

    def is_norm(self, hf_name: str) -> bool:
        return hf_name.endswith("norm.weight")

    def is_transposed(self, hf_name: str) -> bool:
        return hf_name.endswith(self.transposed) if self.transposed else False


ARCHITECTURES = {
    "llama": Architecture("llama", _PROJECTIONS | _BEFORE, permuted=True, extra=("rope_freqs.weight",)),
    "qwen2": Architecture("qwen2", _PROJECTIONS | _BEFORE),
    "qwen3": Architecture("qwen3", _PROJECTIONS | _BEFORE | _QK_NORMS),
    "gemma2": Architecture("gemma2", _PROJECTIONS | _AROUND, top=_TIED, norm_plus_one=True),
    "gemma3": Architecture("gemma3_text", _PROJECTIONS | _AROUND | _QK_NORMS, norm_plus_one=True),
    "smollm3": Architecture("smollm3", _PROJECTIONS | _BEFORE, permuted=True),
    "olmo2": Architecture("olmo2", _PROJECTIONS | _AFTER | _QK_NORMS),
    "phi3": Architecture("phi3", _FUSED | _BEFORE, extra=("rope_factors_long.weight", "rope_factors_short.weight")),
    "gpt2": Architecture(
        "gpt2", _GPT2, "transformer.h.",
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
         "output": "lm_head"},
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
}  # fmt: skip
