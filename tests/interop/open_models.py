"""Tiny open models as folders, written without torch: the families of `tests/parity` with a byte-level tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from aurora_train.interop import families as tables
from aurora_train.interop.placing import Opened, assembled, our_shapes, their_shapes
from aurora_train.interop.tokenizer_files import tokenizer_json
from aurora_train.nn.decoder_config import DecoderConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from families import FAMILIES, draw_weights  # noqa: E402

VOCABULARY = 288  # a few rows more than the 257 ids of the tokenizer, as in published models
END = "<|endoftext|>"
_BYTES = {"tokenizer.json": b'{"kind": "byte"}', "tokenizer_config.json": json.dumps({"eos_token": END}).encode()}


def settings_of(name: str, **changed) -> dict:
    """The content of config.json."""
    ids = {"vocab_size": VOCABULARY, "eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 256}
    return FAMILIES[name] | ids | changed


def weights_of(name: str, settings: dict) -> dict[str, np.ndarray]:
    table = tables.of(settings, name)
    config = DecoderConfig(**tables.read_shape(settings, table, name))
    return draw_weights(name, their_shapes(table, our_shapes(config, settings["vocab_size"]), config.heads))


def write_model(folder: Path, name: str = "qwen3", *, dtype: str = "float32", **changed) -> dict[str, np.ndarray]:
    """Write a whole model into a folder. Returns its weights by their names."""
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    settings = settings_of(name, **changed)
    weights = {key: array.astype(kind) for key, array in weights_of(name, settings).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(tokenizer_json(_BYTES))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return weights


def write_texts(folder: Path) -> None:
    """`texts`, which a byte tokenizer cuts into rows of 32 tokens."""
    (folder / "texts").mkdir()
    for number in range(12):
        (folder / "texts" / f"{number}.txt").write_text(f"{number} and {number + 1} make {2 * number + 1}. " * 30)


def decoder_of(opened: Opened):
    """The whole float32 `Decoder` of an open model."""
    from flax import nnx

    from aurora_train.nn.decoder import Decoder

    def drawn():
        return Decoder(opened.config, opened.vocabulary, "float32", nnx.Rngs(params=0))

    graph, state = nnx.split(nnx.eval_shape(drawn))
    nnx.replace_by_pure_dict(state, assembled(nnx.to_pure_dict(state), opened.read))
    return nnx.merge(graph, state)
