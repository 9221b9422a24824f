"""Tiny models of every family that GGUF knows, as sources: random weights, a small BPE, a template."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from aurora_train.interop.placing import our_shapes, shape_of, their_shapes
from aurora_train.interop.source import OpenModel, Tensor

WIDTH, ROWS = 64, 300
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_COMMON = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
    vocab_size=ROWS, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False, head_dim=16,
    rope_theta=10000.0,
)  # fmt: skip
_LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=8192)  # fmt: skip
_GEMMA = dict(tie_word_embeddings=True, query_pre_attn_scalar=16, sliding_window=32, rms_norm_eps=1e-6)
_SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
CONFIGS = {
    "llama": _COMMON | dict(model_type="llama"),
    "llama3": _COMMON | dict(model_type="llama", rope_theta=500000.0, rope_scaling=_LLAMA3),
    "mistral": _COMMON | dict(model_type="mistral", sliding_window=None),
    "qwen2": _COMMON | dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": _COMMON | dict(model_type="qwen3", head_dim=32),
    "gemma2": _COMMON | _GEMMA | dict(
        model_type="gemma2", attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3": _COMMON | _GEMMA | dict(
        model_type="gemma3_text", num_hidden_layers=6, rope_theta=1e6, rope_local_base_freq=1e4,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    ),
    "smollm3": _COMMON | dict(
        model_type="smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], tie_word_embeddings=True
    ),
    "olmo2": _COMMON | dict(model_type="olmo2"),
    "olmo3": _COMMON | dict(model_type="olmo3", num_hidden_layers=4, sliding_window=32, layer_types=_SLIDING),
    "phi3": _COMMON | dict(
        model_type="phi3", sliding_window=None, original_max_position_embeddings=256, partial_rotary_factor=0.75
    ),
    "gpt2": dict(
        model_type="gpt2", n_embd=WIDTH, n_layer=2, n_head=4, n_inner=96, n_positions=64, vocab_size=ROWS,
        layer_norm_epsilon=1e-5, activation_function="gelu_new", tie_word_embeddings=True,
    ),
}  # fmt: skip


def exact(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 values that bfloat16 and float16 hold exactly, also with 1 added: sixteenths up to 1."""
    return (np.random.RandomState(seed).randint(-16, 17, shape) / 16).astype(np.float32)


def tensor_of(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, str(array.dtype), lambda start, stop: np.ascontiguousarray(array[start:stop]))


def source_of(name: str, arrays: dict[str, np.ndarray] | None = None) -> OpenModel:
    """The tiny model of a family, from `arrays` by Hugging Face name, else random."""
    config = dict(CONFIGS[name])
    if arrays is None:
        head = {} if config["tie_word_embeddings"] else {"lm_head.weight": np.zeros((ROWS, WIDTH), np.float32)}
        family, shape = shape_of(OpenModel(Path(name), "hf", config, {one: tensor_of(a) for one, a in head.items()}))
        shapes = their_shapes(family, our_shapes(shape, ROWS), shape.heads)
        arrays = {one: exact(size, seed) for seed, (one, size) in enumerate(shapes.items())}
    return OpenModel(
        Path(name), "hf", config, {one: tensor_of(array) for one, array in arrays.items()}, bpe(),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, CHATML, {"eos_token_id": [2, 0]}, "apache-2.0",
    )  # fmt: skip


@functools.cache
def bpe(pre: str = "smollm") -> str:
    """tokenizer.json of a byte-level BPE with a pre-tokenizer by llama.cpp's name, trained on this file's folder."""
    import json

    import tokenizers
    from tokenizers import decoders, models, trainers

    from aurora_train.interop.gguf.tokenizer import SPLITS

    splits, normalizer, whole = SPLITS[pre]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    definition = json.loads(backend.to_str()) | {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "normalizer": normalizer and {"type": normalizer},
    }  # fmt: skip
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([path.read_text() for path in sorted(Path(__file__).parent.glob("tiny*.py"))], trainer)
    return backend.to_str()
