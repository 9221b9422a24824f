"""Of which kind the values of a config.json must be, before any of them is computed with."""

from __future__ import annotations

from typing import Any

from aurora_train.errors import UserError

# Whole numbers, with the least that makes sense. Each may be null where the published code lets it be.
_COUNTS = {
    "vocab_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "n_layer": 1,
    "n_head": 1, "n_positions": 1, "max_position_embeddings": 1, "original_max_position_embeddings": 1,
    "sliding_window": 1, "sliding_window_pattern": 1, "full_attention_interval": 1, "no_rope_layer_interval": 1,
    "max_window_layers": 0,
}  # fmt: skip
_POSITIVE = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor", "query_pre_attn_scalar")
_OTHERS = {
    "model_type": (str, "a text"), "architectures": (list, "a list"), "layer_types": (list, "a list"),
    "no_rope_layers": (list, "a list"), "rope_parameters": (dict, "a mapping"), "rope_scaling": (dict, "a mapping"),
}  # fmt: skip


def refuse_kinds(config: dict[str, Any], where: str) -> None:
    """UserError, naming the key, for a value of config.json that is of another kind than its key means."""
    for name, value in config.items():
        if value is None:
            continue
        if name in _OTHERS and not isinstance(value, _OTHERS[name][0]):
            raise UserError(f"`{name}` is {value!r}, which is not {_OTHERS[name][1]}", where=where)
        if name not in _COUNTS and name not in _POSITIVE:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"`{name}` is {value!r}, which is not a number", where=where)
        if name in _COUNTS and (not isinstance(value, int) or value < _COUNTS[name]):
            what = f"`{name}` is {value}, which is not a whole number of at least {_COUNTS[name]}"
            raise UserError(what, where=where)
        if name in _POSITIVE and value <= 0:
            raise UserError(f"`{name}` is {value}, which is not above 0", where=where)
