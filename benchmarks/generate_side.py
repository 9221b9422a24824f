"""A side of generate.py, in a process of its own: ours, ours of an earlier commit, or transformers on torch.

    generate_side.py ours|before|torch MODEL float32|bfloat16

Weights are random, which takes as long as trained ones. It answers each line {"batch", "prompt", "new"} with one: the
seconds until the first token of all rows is there, and the seconds of each further one. Nothing of ours is imported
for torch, so that its side may run without.
"""

from __future__ import annotations

import json
import sys
import time

MODELS = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    "qwen3.5-tiny": {
        "model_type": "qwen3_5_text", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 32768,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "silu",
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4, "attention_dropout": 0.0, "layer_types": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25,
                            "mrope_section": [3, 3, 2]},
    },
}  # fmt: skip
# The same shape in the words of commit 6d5e6f7, which could not read a model's own config.
_EARLIER = {
    "smollm2-135m": {"width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "mlp_width": 1536, "activation": "swiglu",
                     "rope_theta": 1e5, "tied": True},
}  # fmt: skip


def ours(name: str, dtype: str, *, earlier: bool = False):
    """(generate(prompts, new), bytes of the weights that a token reads)."""
    import numpy as np
    from flax import nnx

    from aurora_train.generate.sampler import Generator
    from aurora_train.nn.decoder import Decoder
    from aurora_train.nn.decoder_config import DecoderConfig

    settings = MODELS[name]
    if earlier:
        shape = DecoderConfig(**_EARLIER[name])
    else:
        from aurora_train.interop import families

        shape = DecoderConfig(**families.read_shape(settings, families.of(settings, name), name))
    model = Decoder(shape, settings["vocab_size"], dtype, nnx.Rngs(params=0))
    count = sum(np.prod(leaf.shape) for leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves)
    generator = Generator(model, None if earlier else ())
    size = 2 if dtype == "bfloat16" else 4
    return lambda prompts, new: generator.generate_batch(prompts, new, 0.0), int(count) * size


def by_torch(name: str, dtype: str):
    """The same by transformers' `generate`, which draws the likeliest token as well."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    settings = {key: value for key, value in MODELS[name].items() if value is not None}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.eos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()

    def generate(prompts, new):
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()

    return generate, sum(p.numel() * p.element_size() for p in model.parameters())


def main() -> None:
    kind, name, dtype = sys.argv[1:]
    generate, held = by_torch(name, dtype) if kind == "torch" else ours(name, dtype, earlier=kind == "before")
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "bytes":
            print(held, flush=True)
            continue
        asked = json.loads(line)
        prompts = [[3 + (7 * place + row) % 1000 for place in range(asked["prompt"])] for row in range(asked["batch"])]
        began = time.perf_counter()
        generate(prompts, 1)
        first = time.perf_counter() - began
        each = 0.0
        if asked["new"]:
            generate(prompts, 1 + asked["new"])
            each = max(time.perf_counter() - began - 2 * first, 1e-9) / asked["new"]
        print(json.dumps([first, each]), flush=True)


if __name__ == "__main__":
    main()
