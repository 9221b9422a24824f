"""What a family of models is: how its config.json reads as a `DecoderConfig`, and where its weights stand in ours.

A family is a table, not a class of its own: the two dataclasses below are filled by the files beside this one. Each
table is used in both directions, so that an export is the inverse of an import and not a second description of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Weight(NamedTuple):
    """One tensor of a file and the parameters of ours that it holds, one after the other along `axis`.

    `theirs` is its name below the layer's; `ours` are names below the block's. A kernel of ours is (in, out):
    `transpose` says that theirs is (out, in). Vectors are taken as they are. `by_head`: the parts take turns head by
    head along the axis instead (of equal sizes). `middle`: theirs has a middle axis of size one.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = True
    axis: int = 0
    by_head: bool = False
    middle: bool = False


class Key(NamedTuple):
    """A key of config.json whose value is not the field's own: the two translations."""

    field: str
    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


class Rows(NamedTuple):
    """How a family's layers differ from each other.

    Attributes:
        types: the list `layer_types` where config.json has none, from the whole config; None for a family whose layers
            are all in a window or all not.
        window: `sliding_window` where config.json has none; `window_if` is a key that must be true for it to count.
        has_window: whether the family knows windows at all.
        theta: base of the rotary wavelengths where none is given, for full and for windowed layers.
        by_type: whether `rope_parameters` has an entry for each type of layer; `local_theta` is the older key for the
            windowed ones (which are then never stretched).
        rotary: the share of each head that is turned where none is given.
        linear: whether layers may be of type linear_attention.
        no_rope: whether `no_rope_layers` may turn positions off (1 = on, 0 = off).
    """

    types: Callable[[dict], list[str]] | None = None
    window: int | None = None
    window_if: str | None = None
    has_window: bool = False
    theta: tuple[float, float] = (10_000.0, 10_000.0)
    by_type: bool = False
    local_theta: str = "rope_theta"
    rotary: float = 1.0
    no_rope: bool = False
    linear: bool = False


@dataclass(frozen=True)
class Family:
    """One published family.

    Attributes:
        model_type, architecture: as in its config.json.
        title: the names under which it is known.
        shape: fields of `DecoderConfig` that all its models share.
        keys: key of config.json -> field (`section.field` inside a section), or a `Key`.
        absent: what the published code takes for a key that config.json lacks; without an entry the key is required.
        sparse: what the published code takes for a size or an id that the `text_config` of a vision model leaves out.
            At the top level a size is required, since files state it there.
        only: key -> the values that this project computes, the family's own first. Any other value is refused.
        rows: how its layers differ.
        block, outer: the weights of a layer, and those outside of layers.
        layer: the beginning of a layer's names, with its number to be filled in.
        aliases: beginnings of names that stand for others, as in the text part of a vision model.
        unused: ends of names that hold no weights (masks, tables of wavelengths).
    """

    model_type: str
    architecture: str
    title: str
    shape: dict[str, Any]
    block: tuple[Weight, ...]
    keys: dict[str, str | Key]
    rows: Rows
    absent: dict[str, Any] = field(default_factory=dict)
    sparse: dict[str, Any] = field(default_factory=dict)
    only: dict[str, tuple] = field(default_factory=dict)
    outer: tuple[Weight, ...] = ()
    layer: str = "model.layers.{}."
    aliases: tuple[tuple[str, str], ...] = (
        ("model.language_model.", "model."), ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    )  # fmt: skip
    unused: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def meant(self, name: str) -> str:
        """The family's own name of a tensor that a file may store under another beginning."""
        found = ((start, own) for start, own in self.aliases if name.startswith(start))
        start, own = next(found, ("", ""))
        return own + name.removeprefix(start)


SAME = "as num_attention_heads"  # for `absent`: as many key and value heads as query heads

KEYS = {
    "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "head_dim": "head_dim", "intermediate_size": "mlp_width",
    "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tied",
}  # fmt: skip
ABSENT = {"num_key_value_heads": SAME, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
SILU = {"hidden_act": ("silu", "swish")}
NO_BIAS = {"attention_bias": (False,)}
# transformers accepts an int alone
SCALAR = Key("attention_scale", lambda scalar: scalar**-0.5, lambda scale: round(scale**-2))


def linear(theirs: str, *ours: str) -> tuple[Weight, Weight]:
    """A linear layer's kernel (out, in) and its bias, which a file may lack."""
    biases = tuple(f"{name}_bias" for name in ours)
    return Weight(f"{theirs}.weight", ours), Weight(f"{theirs}.bias", biases)


def norm(theirs: str, ours: str) -> tuple[Weight, Weight]:
    """A norm's scale and its bias, which only a LayerNorm has."""
    return Weight(f"{theirs}.weight", (f"{ours}.scale",)), Weight(f"{theirs}.bias", (f"{ours}.bias",))


ATTENTION = (
    *linear("self_attn.q_proj", "attention.query"), *linear("self_attn.k_proj", "attention.key"),
    *linear("self_attn.v_proj", "attention.value"), *linear("self_attn.o_proj", "attention.out"),
)  # fmt: skip
HEAD_NORMS = (
    *norm("self_attn.q_norm", "attention.query_norm"), *norm("self_attn.k_norm", "attention.key_norm"),
)  # fmt: skip
MLP = (
    *linear("mlp.gate_proj", "mlp.gate"), *linear("mlp.up_proj", "mlp.up"), *linear("mlp.down_proj", "mlp.down"),
)  # fmt: skip
NORMS_BEFORE = (*norm("input_layernorm", "attn_norm"), *norm("post_attention_layernorm", "mlp_norm"))
NORMS_AFTER = (
    *norm("post_attention_layernorm", "attn_post_norm"), *norm("post_feedforward_layernorm", "mlp_post_norm"),
)  # fmt: skip
NORMS_BOTH = (
    *norm("input_layernorm", "attn_norm"), *norm("pre_feedforward_layernorm", "mlp_norm"), *NORMS_AFTER,
)  # fmt: skip
OUTER = (
    Weight("model.embed_tokens.weight", ("embedding",), transpose=False),
    *norm("model.norm", "final_norm"),
    Weight("lm_head.weight", ("head",)),
)
LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "bias": "none", "positions": "rope"}
GEMMA = LLAMA | {"activation": "geglu", "norm_place": "both", "norm_offset": True, "embed_scale": True}


def sizes(
    width: int, layers: int, heads: int, mlp: int, vocabulary: int, length: int, bos: int | None = None,
    eos: int | None = None, pad: int | None = None,
) -> dict[str, Any]:
    """`sparse` of a family: the values of its class in transformers 5.24."""
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
        "vocab_size": vocabulary, "max_position_embeddings": length, "bos_token_id": bos, "eos_token_id": eos,
        "pad_token_id": pad,
    }  # fmt: skip


def every(period: int) -> Callable[[dict], list[str]]:
    """Windowed layers, of which each `period`-th is full instead."""
    return lambda config: [
        "full_attention" if (number + 1) % period == 0 else "sliding_attention"
        for number in range(config["num_hidden_layers"])
    ]


def yarn_mscale(factor: float, mscale: float) -> float:
    """The magnitude of yarn's cosines and sines for a weight `mscale` (as in DeepSeek's configs)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
