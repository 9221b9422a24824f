"""What is written as GGUF, read by transformers' own reader: the same weights under the same names, the same settings.

Its reader shares nothing with ours but the package `gguf`. It does not know SmolLM 3 and OLMo, takes some sizes of
Qwen 3 and GPT-2 to be its defaults, and reads no Phi 3 of fewer than 32,000 tokens.
"""

import numpy as np
import pytest
from tiny_sources import CONFIGS, source_of

from aurora_train.interop.gguf.write import write_gguf

pytestmark = pytest.mark.slow
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "rms_norm_eps", "head_dim", "sliding_window", "tie_word_embeddings", "max_position_embeddings")  # fmt: skip


DEFAULTS = {"qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024, "n_inner": 256}}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_transformers_reads_the_same_model_from_the_file(name, tmp_path, monkeypatch):
    for package in ("torch", "accelerate", "transformers"):
        pytest.importorskip(package)
    import transformers

    monkeypatch.setitem(CONFIGS, name, {**CONFIGS[name], **DEFAULTS.get(name, {})})
    source = source_of(name)
    write_gguf(source, tmp_path / "m.gguf", "f16", "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype="float32")
    state = model.state_dict()
    for one, tensor in source.tensors.items():
        np.testing.assert_array_equal(state[one].numpy(), tensor.whole(), one)
    assert {*state} - {*source.tensors} <= {"lm_head.weight"}
    for key in KEYS:
        if key in CONFIGS[name] and hasattr(model.config, key):
            assert getattr(model.config, key) == pytest.approx(CONFIGS[name][key]), key
