"""The config of a Hugging Face folder as the metadata of a GGUF file: the inverse of `model`.

llama.cpp knows some settings only by the architecture's name. A model that has them otherwise is refused, by key.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from aurora_train.errors import UserError
from aurora_train.interop import families
from aurora_train.interop.gguf.model import LAYERS_OF_27B, LLAMA3_BANDS, LOCAL_THETA, llama3_factors
from aurora_train.interop.gguf.names import ARCHITECTURES
from aurora_train.interop.source import OpenModel

# model_type -> architecture, where several share one.
_ALSO = {"mistral": "llama", "olmo3": "olmo2"}
_WITHOUT_WINDOW = ("mistral", "phi3")  # llama.cpp knows no window for llama, and disables that of phi3


def heads_of(config: dict, hf_name: str) -> int:
    """The heads of a query or key matrix."""
    config = families.text_config(config)
    heads = config["num_attention_heads"]
    return heads if ".q_proj." in hf_name else config.get("num_key_value_heads") or heads


def within_context(source: OpenModel) -> tuple[OpenModel, list[str]]:
    """(the source as llama.cpp computes it, remarks), for the architectures in which it lets a token see all others.

    That is the same as long as the window holds every other, so the context that the file states is no longer.
    """
    window, longest = source.config.get("sliding_window"), source.config.get("max_position_embeddings")
    if source.config.get("model_type") not in _WITHOUT_WINDOW or not window:
        return source, []
    remarks = [f"the file states a context of {window} tokens and not of {longest}, because llama.cpp does not have "
               f"the window of {window} for this architecture"] if window < longest else []  # fmt: skip
    config = source.config | {"sliding_window": None, "max_position_embeddings": min(window, longest)}
    return dataclasses.replace(source, config=config), remarks


def settings_of(source: OpenModel) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata by key, tensors that hold settings by name) of a source's config.

    Raises UserError for a model_type that has no architecture here, and for a setting that llama.cpp would assume
    otherwise.
    """
    return _Settings(source).all()


class _Settings:
    def __init__(self, source: OpenModel):
        self.config = families.text_config(source.config)
        self.where = str(source.path)
        kind = self.config.get("model_type")
        by_type = {one.model_type: name for name, one in ARCHITECTURES.items()} | _ALSO
        if kind not in by_type:
            raise UserError(f"a model of the type {kind!r} cannot be written as GGUF", where=self.where,
                            why=f"these can: {', '.join(by_type)}", hint="--format hf")  # fmt: skip
        self.kind, self.name = kind, by_type[kind]
        self.extra: dict[str, np.ndarray] = {}

    def all(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        own = self._gpt2() if self.name == "gpt2" else self._common() | self._rope() | self._special()
        return {"general.architecture": self.name} | {f"{self.name}.{key}": value for key, value in own.items()
                                                      if value is not None}, self.extra  # fmt: skip

    def _common(self) -> dict[str, Any]:
        config = self.config
        heads = config["num_attention_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // heads
        share = config.get("partial_rotary_factor") or self._parameters.get("partial_rotary_factor") or 1.0
        if share != 1 and ARCHITECTURES[self.name].permuted:
            raise self._refused("partial_rotary_factor", share, 1.0)
        return {
            "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
            "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"],
            "attention.head_count": heads, "attention.head_count_kv": config.get("num_key_value_heads") or heads,
            "attention.key_length": self.head_dim, "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "rope.dimension_count": int(share * self.head_dim),
        }  # fmt: skip

    @property
    def _parameters(self) -> dict:
        """The rotary settings of the layers that see everything, from either form of config.json."""
        found = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        return found.get("full_attention", found)

    def _rope(self) -> dict[str, Any]:
        parameters, config = self._parameters, self.config
        theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0)
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        base = {"rope.freq_base": theta}
        if kind == "default":
            return base
        if kind == "linear":
            return base | {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
        if kind == "llama3" and self.name == "llama":
            for key, value in LLAMA3_BANDS.items():
                self._hold(key, parameters.get(key, value), value)
            factors = llama3_factors(theta, self.head_dim, {**LLAMA3_BANDS, "factor": parameters["factor"]})
            self.extra["rope_freqs.weight"] = factors.astype(np.float32)
            return base
        if kind == "yarn":
            for key, value in {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None}.items():
                self._hold(f"rope_parameters.{key}", parameters.get(key) or value, value)
            original = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
            return base | {"rope.scaling.type": "yarn", "rope.scaling.factor": float(parameters["factor"]),
                           "rope.scaling.original_context_length": original}  # fmt: skip
        if kind in ("longrope", "su") and self.name == "phi3":
            return base | self._longrope(parameters)
        raise UserError(f"rotary positions of the type {kind!r} cannot be written for {self.name}", where=self.where)

    def _longrope(self, parameters: dict) -> dict[str, Any]:
        for name in ("long", "short"):
            self.extra[f"rope_factors_{name}.weight"] = np.array(parameters[f"{name}_factor"], np.float32)
        original = parameters.get("original_max_position_embeddings") or self.config["original_max_position_embeddings"]
        scale = self.config["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": factor}

    def _special(self) -> dict[str, Any]:
        config, window = self.config, self.config.get("sliding_window")
        layers = range(config["num_hidden_layers"])
        if self.kind in ("qwen2", "qwen3"):
            self._hold("use_sliding_window", config.get("use_sliding_window", False), False)
        if self.kind == "smollm3":
            self._hold("no_rope_layers", config["no_rope_layers"], [int((one + 1) % 4 != 0) for one in layers])
        if self.kind == "phi3":
            return {"attention.sliding_window": 0}  # `within_context` took it away
        if self.kind == "olmo3":
            return {"attention.sliding_window": window,
                    "attention.sliding_window_pattern": [one == "sliding_attention" for one in config["layer_types"]]}
        return self._gemma() if self.kind.startswith("gemma") else {}

    def _gemma(self) -> dict[str, Any]:
        config, layers = self.config, range(self.config["num_hidden_layers"])
        every = 2 if self.kind == "gemma2" else 6
        wanted = ["full_attention" if (one + 1) % every == 0 else "sliding_attention" for one in layers]
        self._hold("layer_types", config.get("layer_types") or wanted, wanted)
        is_27b = len(layers) == LAYERS_OF_27B[self.name]
        scalar = config["hidden_size"] / config["num_attention_heads"] if is_27b else self.head_dim
        self._hold("query_pre_attn_scalar", config.get("query_pre_attn_scalar", 256), scalar)
        if self.kind == "gemma3_text":
            local = (config.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
            self._hold("rope_local_base_freq", local or config.get("rope_local_base_freq", LOCAL_THETA), LOCAL_THETA)
        caps = {name: config.get(f"{name}_logit_softcapping") for name in ("attn", "final")}
        return {"attention.sliding_window": config["sliding_window"]} | {
            f"{name}_logit_softcapping": float(value) for name, value in caps.items() if value
        }  # fmt: skip

    def _gpt2(self) -> dict[str, Any]:
        config = self.config
        return {
            "context_length": config["n_positions"], "embedding_length": config["n_embd"],
            "block_count": config["n_layer"], "attention.head_count": config["n_head"],
            "feed_forward_length": config.get("n_inner") or 4 * config["n_embd"],
            "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        }  # fmt: skip

    def _hold(self, key: str, value, assumed) -> None:
        if value != assumed:
            raise self._refused(key, value, assumed)

    def _refused(self, key: str, value, assumed) -> UserError:
        return UserError(
            f"{key}: {value} cannot be written as GGUF", where=self.where,
            why=f"llama.cpp takes it to be {assumed} for the architecture {self.name}", hint="--format hf",
        )  # fmt: skip
