"""A GGUF file as an `OpenModel`: its metadata as the config of a Hugging Face folder, its tensors by the names there.

What llama.cpp's converter did to names and values is undone, so that a family needs to be described once, for
Hugging Face folders. A setting that the file does not state is never guessed: it is what llama.cpp itself assumes for
that architecture, or the file is refused.
"""

from __future__ import annotations

import functools
import math
import os
from difflib import get_close_matches
from numbers import Real
from pathlib import Path

import numpy as np

from aurora_train.errors import UserError
from aurora_train.interop.gguf.file import GgufFile
from aurora_train.interop.gguf.names import ARCHITECTURES, Architecture
from aurora_train.interop.gguf.tokenizer import tokenizer_of
from aurora_train.interop.source import OpenModel, Tensor

_NO_DEFAULT = object()
LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LOCAL_THETA = 10_000.0  # of Gemma 3's windowed layers, which older files do not state
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # llama.cpp tells this size by its layers: it scales queries otherwise


def open_gguf(path: Path) -> OpenModel:
    """The model of a GGUF file. Raises UserError for a file or an architecture that cannot be read, naming it."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return _opened(Path(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)  # a start opens its source several times, and a large vocabulary takes seconds
def _opened(path: Path, changed_ns: int, size: int) -> OpenModel:
    file = GgufFile(path)
    try:
        reader = _Reader(file)
        tokenizer, tokenizer_config, ends = tokenizer_of(file.metadata, str(path))
        config, tensors = reader.config(), reader.tensors()
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise UserError(f"a value of the metadata is of another kind than its key means: {error}",
                        where=str(path)) from error  # fmt: skip
    return OpenModel(
        path=path, kind="gguf", config=config, tensors=tensors, tokenizer=tokenizer,
        tokenizer_config=tokenizer_config, chat_template=file.metadata.get("tokenizer.chat_template"),
        generation={"eos_token_id": ends} if ends else {}, licence=file.metadata.get("general.license"),
    )  # fmt: skip


class _Reader:
    """Translates one file."""

    def __init__(self, file: GgufFile):
        self.file, self.where = file, str(file.path)
        self.name = self._value("general.architecture")
        if str(self.name) not in ARCHITECTURES:
            near = get_close_matches(str(self.name), ARCHITECTURES, 1)
            raise UserError(
                f"the architecture {self.name!r} cannot be read from GGUF", where=self.where,
                why=f"{', '.join(ARCHITECTURES)} can" + (f"; the nearest is {near[0]}" if near else ""),
            )  # fmt: skip
        self.architecture: Architecture = ARCHITECTURES[self.name]

    def tensors(self) -> dict[str, Tensor]:
        """Every weight by its Hugging Face name."""
        found, unknown = {}, []
        for name, stored in self.file.tensors.items():
            if name in self.architecture.extra:
                continue
            hf_name = self.architecture.hf_name(name)
            if hf_name is None:
                unknown.append(name)
                continue
            shape = stored.shape[::-1] if self.architecture.is_transposed(hf_name) else stored.shape
            read = functools.partial(self._rows, name, hf_name)
            found[hf_name] = Tensor(shape, "float32", read)
        if unknown:
            raise UserError(
                f"{len(unknown)} tensors have no place in the architecture {self.name}: {', '.join(unknown[:5])}",
                where=self.where, why="leaving them out would make another model",
            )  # fmt: skip
        return found

    def _rows(self, name: str, hf_name: str, start: int, stop: int) -> np.ndarray:
        architecture, rows = self.architecture, slice(start, stop)
        if architecture.is_transposed(hf_name):
            return np.ascontiguousarray(self.file.read(name).T[rows])
        if architecture.is_permuted(hf_name):
            rows = as_halves(self.file.tensors[name].shape[0], self._heads_of(hf_name))[rows]
        values = self.file.read(name, rows)
        return values - 1 if architecture.norm_plus_one and architecture.is_norm(hf_name) else values

    def _heads_of(self, hf_name: str) -> int:
        config = self._sizes
        return config["num_attention_heads" if ".q_proj." in hf_name else "num_key_value_heads"]

    @functools.cached_property
    def _sizes(self) -> dict:
        """What all architectures but GPT-2 state in the same way."""
        heads, width = self._own("attention.head_count"), self._own("embedding_length")
        head_dim = self._own("attention.key_length", width // max(heads, 1))
        values = self._own("attention.value_length", head_dim)
        if head_dim != values:
            raise UserError(f"keys of {head_dim} and values of {values} numbers per head", where=self.where,
                            why="they must be equally long here")  # fmt: skip
        return {
            "hidden_size": width, "num_hidden_layers": self._own("block_count"),
            "intermediate_size": self._own("feed_forward_length"), "num_attention_heads": heads,
            "num_key_value_heads": self._own("attention.head_count_kv", heads), "head_dim": head_dim,
            "max_position_embeddings": self._own("context_length"), "vocab_size": self._vocabulary(),
            "rms_norm_eps": decimal(self._own("attention.layer_norm_rms_epsilon")),
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
        }  # fmt: skip

    def config(self) -> dict:
        """config.json as transformers would write it, with every value stated that could be a default there."""
        config = {"model_type": self.architecture.model_type, "dtype": "float32"}
        for ours, key in {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}.items():
            config[ours] = self._value(f"tokenizer.ggml.{key}_token_id", None)
        if self.name == "gpt2":
            return config | self._gpt2()
        config |= self._sizes
        theta = decimal(self._own("rope.freq_base", 10_000.0))
        config |= {"rope_theta": theta, "rope_scaling": self._rope_scaling()}
        turned = self._own("rope.dimension_count", config["head_dim"])
        if turned != config["head_dim"]:
            config["partial_rotary_factor"] = turned / config["head_dim"]
        config |= {
            "llama": self._llama, "qwen2": lambda: {"use_sliding_window": False, "sliding_window": None},
            "qwen3": lambda: {"attention_bias": self._has("attn_q.bias"), "use_sliding_window": False},
            "gemma2": self._gemma2, "gemma3": self._gemma3, "smollm3": self._smollm3, "olmo2": self._olmo2,
            "phi3": self._phi3,
        }[self.name]()  # fmt: skip
        return config

    def _llama(self) -> dict:
        return {"attention_bias": self._has("attn_q.bias"), "mlp_bias": self._has("ffn_up.bias"), "hidden_act": "silu"}

    def _gemma2(self) -> dict:
        return {
            "sliding_window": self._own("attention.sliding_window"), "query_pre_attn_scalar": self._query_scalar(),
            "attn_logit_softcapping": decimal(self._own("attn_logit_softcapping", 50.0)),
            "final_logit_softcapping": decimal(self._own("final_logit_softcapping", 30.0)),
            "hidden_activation": "gelu_pytorch_tanh", "layer_types": self._layer_types(lambda layer: layer % 2 == 0),
        }  # fmt: skip

    def _gemma3(self) -> dict:
        cap = self._own("final_logit_softcapping", None)
        return {
            "sliding_window": self._own("attention.sliding_window", None), "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": self._query_scalar(), "attn_logit_softcapping": None,
            "rope_local_base_freq": decimal(self._own("rope.freq_base_swa", LOCAL_THETA)),
            "final_logit_softcapping": None if cap is None else decimal(cap),
            "layer_types": self._layer_types(lambda layer: (layer + 1) % 6 != 0),
        }  # fmt: skip

    def _smollm3(self) -> dict:
        layers = range(self._sizes["num_hidden_layers"])
        return {"no_rope_layers": [int((layer + 1) % 4 != 0) for layer in layers], "use_sliding_window": False,
                "attention_bias": False, "mlp_bias": False}  # fmt: skip

    def _olmo2(self) -> dict:
        window = self._own("attention.sliding_window", None)
        if window is None:
            return {"attention_bias": False}
        return {"model_type": "olmo3", "attention_bias": False, "sliding_window": window,
                "layer_types": self._layer_types(lambda layer: (layer + 1) % 4 != 0)}  # fmt: skip

    def _phi3(self) -> dict:
        original = self._own("rope.scaling.original_context_length", self._sizes["max_position_embeddings"])
        return {"sliding_window": self._own("attention.sliding_window", 0) or None,
                "original_max_position_embeddings": original}  # fmt: skip

    def _gpt2(self) -> dict:
        return {
            "n_embd": self._own("embedding_length"), "n_layer": self._own("block_count"),
            "n_head": self._own("attention.head_count"), "n_inner": self._own("feed_forward_length"),
            "n_positions": self._own("context_length"), "vocab_size": self._vocabulary(),
            "layer_norm_epsilon": decimal(self._own("attention.layer_norm_epsilon")),
            "activation_function": "gelu_new", "tie_word_embeddings": "output.weight" not in self.file.tensors,
        }  # fmt: skip

    def _rope_scaling(self) -> dict | None:
        """`rope_scaling` of the config; llama.cpp keeps Llama 3's rule and LongRoPE as tensors of factors."""
        tensors = self.file.tensors
        if "rope_freqs.weight" in tensors:
            return self._llama3()
        if "rope_factors_long.weight" in tensors:
            factors = {name: self.file.read(f"rope_factors_{name}.weight") for name in ("long", "short")}
            return {"rope_type": "longrope"} | {f"{name}_factor": [decimal(one) for one in array]
                                                for name, array in factors.items()}  # fmt: skip
        kind = self._own("rope.scaling.type", "none", str)
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": decimal(self._own("rope.scaling.factor"))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._own("rope.scaling.original_context_length")
        return scaling

    def _llama3(self) -> dict:
        """Llama 3's stretching, from the factor of each frequency. Held to the formula with the published bands."""
        stored = self.file.read("rope_freqs.weight")
        scaling = {"rope_type": "llama3", "factor": decimal(stored.max()), **LLAMA3_BANDS}
        theta = decimal(self._own("rope.freq_base", 10_000.0))
        if not np.allclose(stored, llama3_factors(theta, 2 * len(stored), scaling), rtol=1e-4):
            raise UserError(
                "the factors in rope_freqs.weight are not those of Llama 3's rule", where=self.where,
                why=f"with its published bands, {LLAMA3_BANDS}, and factor {scaling['factor']:g}",
            )  # fmt: skip
        return scaling

    def _layer_types(self, is_windowed) -> list[str] | None:
        """The kind of each layer: as the file says, or else as llama.cpp assumes for the architecture."""
        layers = self._sizes["num_hidden_layers"]
        pattern = self._value(f"{self.name}.attention.sliding_window_pattern", None)
        if isinstance(pattern, list):
            windowed = pattern
        elif pattern is not None:
            windowed = [(layer + 1) % pattern != 0 for layer in range(layers)]
        else:
            windowed = [is_windowed(layer) for layer in range(layers)]
        if len(windowed) != layers:
            raise UserError(f"{self.name}.attention.sliding_window_pattern has {len(windowed)} entries for {layers} "
                            "layers", where=self.where)  # fmt: skip
        return ["sliding_attention" if one else "full_attention" for one in windowed]

    def _query_scalar(self) -> float:
        sizes = self._sizes
        if sizes["num_hidden_layers"] == LAYERS_OF_27B[self.name]:
            return sizes["hidden_size"] / sizes["num_attention_heads"]
        return sizes["head_dim"]

    def _vocabulary(self) -> int:
        if "token_embd.weight" not in self.file.tensors:
            raise UserError("there is no tensor token_embd.weight", where=self.where, why="it holds the embeddings")
        return self.file.tensors["token_embd.weight"].shape[0]

    def _has(self, stem: str) -> bool:
        return f"blk.0.{stem}" in self.file.tensors

    def _own(self, key: str, default=_NO_DEFAULT, kind: type = Real):
        """A value of the architecture's own. UserError for one that differs from layer to layer or is of no `kind`."""
        value = self._value(f"{self.name}.{key}", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UserError(f"{self.name}.{key} differs from layer to layer: {value[:8]}", where=self.where,
                                why="layers of different sizes cannot be read")  # fmt: skip
            value = value[0]
        if not isinstance(value, kind) and value is not default:
            raise UserError(f"{self.name}.{key} is {value!r}, of type {type(value).__name__}", where=self.where,
                            why="this key is a text" if kind is str else "this key is a number")  # fmt: skip
        return value

    def _value(self, key: str, default=_NO_DEFAULT):
        value = self.file.metadata.get(key, default)
        if value is _NO_DEFAULT:
            raise UserError(f"the metadata lacks {key}", where=self.where, why="the model cannot be built without it")
        return value


def as_halves(num_rows: int, heads: int) -> np.ndarray:
    """int64[num_rows]: the row of the file for each row of a Hugging Face matrix of query or key.

    llama.cpp's llama rotates neighbours (2 i, 2 i + 1) of a head, transformers entry i with i + head_dim / 2.
    """
    return np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def llama3_factors(theta: float, dims: int, scaling: dict) -> np.ndarray:
    """float64[dims / 2]: by how much Llama 3's rule slows each rotary frequency (transformers' `llama3` rope)."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * math.pi * theta ** (np.arange(0, dims, 2) / dims)
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def decimal(value) -> float:
    """The shortest decimal that is this float32: 1e-05 for the 9.999999747378752e-06 that a file holds."""
    return float(str(np.float32(value)))
