"""One dial for a whole run: `model.size` decides shape, tokens, batch and learning rate, each with its source.

Free of jax. `d<depth>` takes its shape from nanochat (width 64 x depth) and leaves the rest to the config; a named size
is the whole published model, except for its vocabulary, which is the tokenizer's. Values set by the user are kept and
enter the formulas of the others.
"""

from __future__ import annotations

import copy
import math
import re
from typing import NamedTuple

from pydantic import ValidationError

from aurora_train.errors import UserError
from aurora_train.nn.decoder_config import DecoderConfig, Layer, nearest_divisor
from aurora_train.recipe import Derived

GPT3 = "Brown et al. 2020, table 2.1"
GPT2 = "as in GPT-2's code"
LLAMA3 = "Llama 3 model card"
LLAMA3_PAPER = "Llama 3: Grattafiori et al. 2024, table 3"
NANOCHAT = "nanochat, base_train.py"
MUON = "the same for Muon, whose updates are scaled to AdamW's: Liu et al. 2025"
CHINCHILLA = "Hoffmann et al. 2022"
POWER_LINES = "Bergsma et al. 2025 (Power Lines), as in nanochat"


class Shape(NamedTuple):
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int | None  # None: follows from the activation
    family: dict  # the other fields of the published model
    batch_tokens: int
    lr: float
    source: str
    training_source: str


# Fields that neither family uses are reset, so that a named size is the published model whatever the base config is.
_PLAIN = {
    "head_dim": None, "norm_eps": 1e-5, "norm_offset": False, "qk_norm": False, "post_norm": False, "parallel": False,
    "window": None, "window_pattern": ["local"], "attention_scale": None, "attention_softcap": None,
    "logit_softcap": None, "embed_scale": False, "norm_place": "before", "layer_table": None,
    "attention_gate": False, "linear": None,
}  # fmt: skip
# Without GPT-3's banded layers between dense ones, because the width of their bands is not published.
_GPT = {
    "activation": "gelu_tanh", "norm": "layernorm", "bias": "all", "positions": "learned", "max_length": 2048,
    "tied": True,
} | _PLAIN  # fmt: skip
_LLAMA = {
    "activation": "swiglu", "norm": "rmsnorm", "bias": "none", "positions": "rope", "rope_theta": 500_000.0,
    "rope_scaling.kind": "none", "tied": False,
} | _PLAIN  # fmt: skip
_LLAMA32 = _LLAMA | {
    "rope_scaling.kind": "llama3", "rope_scaling.factor": 32.0, "rope_scaling.low_freq_factor": 1.0,
    "rope_scaling.high_freq_factor": 4.0, "rope_scaling.original_length": 8192, "tied": True,
}  # fmt: skip

NAMED = {
    "125m": Shape(768, 12, 12, 12, None, _GPT, 2**19, 6e-4, f"GPT-3 Small: {GPT3}, {GPT2}", GPT3),
    "350m": Shape(1024, 24, 16, 16, None, _GPT, 2**19, 3e-4, f"GPT-3 Medium: {GPT3}, {GPT2}", GPT3),
    "1b": Shape(2048, 16, 32, 8, 8192, _LLAMA32, 2**20, 2e-4, f"Llama 3.2 1B: {LLAMA3}", f"GPT-3 XL: {GPT3}"),
    "3b": Shape(3072, 28, 24, 8, 8192, _LLAMA32, 2**20, 1.6e-4, f"Llama 3.2 3B: {LLAMA3}", f"GPT-3 2.7B: {GPT3}"),
    "8b": Shape(4096, 32, 32, 8, 14336, _LLAMA, 2**22, 3e-4, f"Llama 3 8B: {LLAMA3}", LLAMA3_PAPER),
}
REFERENCE_DEPTH = 12  # nanochat tunes batch and rates at d12 and extrapolates


def derive_from_size(size: str, given: dict, vocab_size: int = 32768, sequence: int = 2048) -> list[Derived]:
    """The values that follow from `size`, without the keys in `given` (the raw tree of the user's settings).

    `vocab_size` and `sequence` (tokens per row) enter the count of parameters and the batch. Raises UserError for a
    size that is neither `d<depth>` nor a named shape.
    """
    depth = re.fullmatch(r"d([1-9][0-9]{0,2})", size)
    if depth is None and size not in NAMED:
        raise UserError(
            f"{size!r} is not a size",
            where="model.size",
            hint=f"use d6, d12, d20, ... (the number of layers) or one of {', '.join(NAMED)}",
        )
    model = given.get("model") or {}
    if not _sound(model, whole=False):
        return []
    shape = _by_depth(int(depth[1]), model) if depth else _by_name(size)
    shape = [d for d in shape if not _within(given, d.key)]
    chosen = _chosen(model, shape)
    if not _sound(chosen, whole=True):
        return shape
    parameters = _parameters(chosen, vocab_size)
    tokens = 20 * parameters
    training = _by_tokens(chosen, tokens, sequence, vocab_size) if depth else _as_published(NAMED[size], size, sequence)
    batch = _set(given, "train", "batch")
    if not isinstance(batch, int) or batch < 1:
        batch = training[0].value
    formula = f"20 x {parameters:,} parameters = {tokens:,} tokens, over batch {batch} x sequence {sequence}"
    steps = Derived("train.steps", max(1, round(tokens / (batch * sequence))), formula, CHINCHILLA)
    return shape + [d for d in (*training, steps) if _set(given, *d.key.split(".")) is None]


def _by_depth(depth: int, model: dict) -> list[Derived]:
    width = model.get("width") or 64 * depth
    heads = model.get("heads") or nearest_divisor(width, max(1, round(width / 128)))
    return [
        Derived("model.layers", depth, f"depth = {depth}", NANOCHAT),
        Derived("model.width", width, f"64 x {depth}", NANOCHAT),
        Derived("model.heads", heads, f"width {width} / 128, to a divisor of it", NANOCHAT),
        Derived("model.kv_heads", heads, "as many as heads", NANOCHAT),
        Derived("model.head_dim", None, "width / heads", NANOCHAT),
        Derived("model.mlp_width", None, "by the rule of the activation", NANOCHAT),
    ]


def _by_name(size: str) -> list[Derived]:
    shape = NAMED[size]
    values = {
        "layers": shape.layers, "width": shape.width, "heads": shape.heads, "kv_heads": shape.kv_heads,
        "mlp_width": shape.mlp_width, **shape.family,
    }  # fmt: skip
    return [Derived(f"model.{name}", value, f"size {size}", shape.source) for name, value in values.items()]


def _by_tokens(model: dict, tokens: int, sequence: int, vocab_size: int) -> list[Derived]:
    """The batch and the learning rate of a model of any width, for a run over so many tokens."""
    reference = {"layers": REFERENCE_DEPTH, "width": 64 * REFERENCE_DEPTH, "heads": 6}
    reference_tokens = 20 * _parameters(model | reference | {"kv_heads": None, "mlp_width": None}, vocab_size)
    batch_tokens = 2**19 * (tokens / reference_tokens) ** 0.383
    batch = 2 ** max(0, round(math.log2(batch_tokens / sequence)))
    formula = f"2^19 x (tokens / tokens of d{REFERENCE_DEPTH})^0.383 = {batch_tokens:,.0f} tokens"
    width = model["width"]
    rate, source = float(f"{6e-4 * (width / 768) ** -0.5:.3g}"), f"{NANOCHAT}; 6e-4 at width 768: {GPT3}; {MUON}"
    return [
        Derived("train.batch", batch, f"{formula}, over sequence {sequence}, to a power of two", POWER_LINES),
        Derived("optimizer.lr", rate, f"6e-4 x (width {width} / 768)^-0.5", source),
    ]


def _as_published(shape: Shape, size: str, sequence: int) -> list[Derived]:
    """The batch and the learning rate of a published model."""
    batch, source = max(1, round(shape.batch_tokens / sequence)), shape.training_source
    return [
        Derived("train.batch", batch, f"{shape.batch_tokens:,} tokens, over sequence {sequence}", source),
        Derived("optimizer.lr", shape.lr, f"size {size}", f"{source}; {MUON}"),
    ]


def _parameters(model: dict, vocab_size: int) -> int:
    fields = {name: value for name, value in model.items() if name in DecoderConfig.model_fields}
    if fields.get("layer_table"):
        fields["layer_table"] = tuple(Layer.model_validate(row) for row in fields["layer_table"])
    return DecoderConfig.model_construct(**fields).num_parameters(vocab_size)


def _sound(model: dict, whole: bool) -> bool:
    """Whether the user's values can enter a formula. If not, the config's own check reports why, with the line."""
    if not all(isinstance(model.get(name), int | None) for name in ("width", "heads")):
        return False
    try:
        if whole:
            DecoderConfig.model_validate(model)
    except ValidationError:
        return False
    return True


def _chosen(model: dict, shape: list[Derived]) -> dict:
    """The section with its derived values."""
    chosen = copy.deepcopy(model)
    for one in shape:
        *above, last = one.key.split(".")[1:]
        section = chosen
        for step in above:
            section = section.setdefault(step, {})
        section[last] = one.value
    return chosen


def _within(given: dict, key: str) -> bool:
    """Whether the user wrote a key (null included), or wrote something other than a section above it."""
    node = given
    for step in key.split("."):
        if not isinstance(node, dict):
            return True
        if step not in node:
            return False
        node = node[step]
    return True


def _set(given: dict, section: str, name: str):
    """The user's value, or None."""
    values = given.get(section)
    return values.get(name) if isinstance(values, dict) else None
