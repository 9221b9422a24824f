"""The families of models that come in and go out: `known()` lists them, `of` and `expressing` find one."""

from __future__ import annotations

import functools
from difflib import get_close_matches
from typing import Any

from aurora_train.errors import UserError
from aurora_train.interop.families import gemma, gpt2, llama, olmo, qwen
from aurora_train.interop.families.family import SAME, Family, Key
from aurora_train.interop.families.kinds import refuse_kinds
from aurora_train.interop.families.rows import lines_of, read_rows, write_rows
from aurora_train.nn.decoder_config import DecoderConfig


@functools.cache
def known() -> dict[str, Family]:
    """Every family by its `model_type`, in the order in which an export tries them."""
    every = (*llama.FAMILIES, *qwen.FAMILIES, *gemma.FAMILIES, *olmo.FAMILIES, *gpt2.FAMILIES)
    return {family.model_type: family for family in every}


def text_config(config: dict) -> dict:
    """The part of config.json that describes the language model: all of it, or that of a vision model's text.

    A vision model's file leaves out the values of its text part that are the class's own; they are filled in.
    """
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    family = known().get(str(inner.get("model_type")))
    outer = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
    return {**(family.sparse if family else {}), **outer, **inner}


def of(config: dict, where: str) -> Family:
    """The family of a config.json. UserError for one that is not supported: the nearest, and what is missing."""
    config, families = text_config(config), known()
    refuse_kinds(config, where)
    model_type = config.get("model_type")
    if model_type in families:
        return families[model_type]
    named = (config.get("architectures") or [None])[0]
    by_architecture = {family.architecture: family for family in families.values()}
    if model_type is None and named in by_architecture:
        return by_architecture[named]
    if model_type is None:
        raise UserError("config.json names no `model_type`", where=where, hint=f"one of {', '.join(families)}")
    near = get_close_matches(str(model_type), families, 1, 0.5)
    raise UserError(
        f"the architecture {named or model_type!r} (model_type {model_type!r}) is not supported", where=where,
        why=_unknown_keys(config, families[near[0]]) if near else None,
        hint=f"the nearest that is: {near[0]}" if near else f"supported are: {', '.join(families)}",
    )  # fmt: skip


def _unknown_keys(config: dict, family: Family) -> str | None:
    """The keys of a config.json that the nearest family does not have, for a message."""
    beside = {"layer_types", "sliding_window", "rope_parameters", "rope_theta", "rope_scaling", *_GENERAL}
    extra = sorted(key for key in config if key not in {*family.keys, *family.only, *beside})
    return f"it has keys that {family.model_type} lacks: {', '.join(extra[:8])}" if extra else None


_GENERAL = (
    "model_type", "architectures", "vocab_size", "max_position_embeddings", "initializer_range", "use_cache",
    "torch_dtype", "dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id",
    "attention_dropout", "_name_or_path",
)  # fmt: skip


def read_shape(config: dict, family: Family, where: str) -> dict[str, Any]:
    """The fields of `DecoderConfig` that a config.json decides.

    Raises UserError for a key that is required and absent, and for a value that this project does not compute.
    """
    config = text_config(config)
    refuse_kinds(config, where)
    for name, values in family.only.items():
        if name in config and config[name] not in values:
            raise UserError(
                f"`{name}: {config[name]}` is not supported for {family.title}", where=where,
                why=f"supported is {' or '.join(str(value) for value in values)}",
            )  # fmt: skip
    fields = dict(family.shape)
    for name, target in family.keys.items():
        if config.get(name) is None and name not in family.absent:
            raise UserError(f"config.json has no `{name}`, which {family.title} needs", where=where)
        value = config.get(name, family.absent.get(name))  # a null is a value: a softcap of null is none
        if value == SAME or (value is None and name == "num_key_value_heads"):
            value = fields["heads"]
        if not isinstance(value, int | float | None) and not isinstance(target, Key):
            raise UserError(f"`{name}` is {value!r}, which is not a number", where=where)
        key = target if isinstance(target, Key) else Key(target, lambda value: value, None)
        fields[key.field] = value if value is None else key.read(value)
    rows = read_rows({**family.absent, **config}, family, where)
    for name in [name for name in fields if "." in name]:
        section, _, inner = name.partition(".")
        fields.setdefault(section, {})[inner] = fields.pop(name)
    return fields | rows


def vocabulary(config: dict, where: str) -> int:
    """`vocab_size`: the rows of the embedding."""
    config = text_config(config)
    refuse_kinds(config, where)
    if config.get("vocab_size") is None:
        raise UserError("config.json has no `vocab_size`", where=where)
    return config["vocab_size"]


def write_config(model: DecoderConfig, family: Family) -> dict[str, Any]:
    """The keys of config.json that describe a model of this family. The inverse of `read_shape`."""
    config: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    config |= {name: values[0] for name, values in family.only.items()}
    filled = {"kv_heads": model.num_kv_heads, "head_dim": model.dim_per_head, "mlp_width": model.hidden_width,
              "attention_scale": model.attention_scale or model.dim_per_head**-0.5}  # fmt: skip
    for name, target in family.keys.items():
        key = target if isinstance(target, Key) else Key(target, None, lambda value: value)
        config[name] = key.write(filled[key.field] if key.field in filled else _field(model, key.field))
    return config | write_rows(model, family)


def _field(model: DecoderConfig, name: str) -> Any:
    """A field by its name, which may lie in a section that the model does not have."""
    return functools.reduce(lambda section, part: getattr(section, part, None), name.split("."), model)


def essence(model: DecoderConfig) -> dict[str, Any]:
    """What decides a model's function, with every shorthand and default written out: for comparing two configs."""
    return {
        "width": model.width, "layers": model.layers, "heads": model.heads, "kv_heads": model.num_kv_heads,
        "head_dim": model.dim_per_head, "mlp_width": model.hidden_width, "activation": model.activation,
        "norm": model.norm, "norm_eps": model.norm_eps, "norm_offset": model.norm_offset,
        "qk_norm": "head" if model.qk_norm is True else model.qk_norm, "norm_place": model.norms,
        "parallel": model.parallel, "bias": model.bias, "positions": model.positions,
        "max_length": model.max_length if model.positions == "learned" else None,
        "attention_scale": round(model.attention_scale or model.dim_per_head**-0.5, 9),
        "attention_softcap": model.attention_softcap, "logit_softcap": model.logit_softcap, "tied": model.tied,
        "embed_scale": model.embed_scale, "attention_gate": model.attention_gate, "linear": model.linear,
        "layer_table": lines_of(model) if model.positions != "none" else [row.window for row in model.rows],
    }  # fmt: skip


def expressing(model: DecoderConfig, preferred: str | None = None) -> Family:
    """The family that can hold a model: the one it came from, else the first. UserError names what none can."""
    families, lacking = known(), {}
    order = [families[preferred], *families.values()] if preferred in families else families.values()
    wanted = essence(model)
    for family in order:
        found = _read_back(model, family)
        if found == wanted:
            return family
        if found is not None:
            lacking[family.model_type] = {name: found[name] for name in wanted if found[name] != wanted[name]}
    near = min(lacking, key=lambda name: len(lacking[name]), default=None)
    raise UserError(
        "no published family has this model", where="model",
        why=near and f"the nearest, {near}, has " + ", ".join(
            f"{name}: {value} (here {wanted[name]})" for name, value in lacking[near].items()),
        hint="a model of one of these families can be exported: " + ", ".join(families),
    )  # fmt: skip


def _read_back(model: DecoderConfig, family: Family) -> dict[str, Any] | None:
    """The essence of what a reader of the family's config.json would build; None if the family has no such model."""
    try:
        fields = read_shape(write_config(model, family), family, family.model_type)
        return essence(DecoderConfig(**fields))
    except (UserError, ValueError):  # a value outside the family, which pydantic or the table refuses
        return None
