"""How the layers of a model differ, between the keys of config.json and the rows of `DecoderConfig`.

In both directions a model is a list of `Line`s, one for each layer, so that a period, a shorthand or a default on one
side never has to be understood by the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from aurora_train.errors import UserError
from aurora_train.interop.families.family import Family, yarn_mscale
from aurora_train.nn.decoder_config import LINEAR, DecoderConfig, RopeScaling

FULL, SLIDING, LINEAR_TYPE = "full_attention", "sliding_attention", "linear_attention"
_LLAMA3 = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}


class Line(NamedTuple):
    """One layer: its window (None: full attention), and its rotary positions, which `rotary` 0 turns off."""

    window: int | None
    theta: float
    rotary: float
    scaling: RopeScaling
    linear: bool = False


_LINEAR_LINE = Line(None, 10_000.0, 0.0, RopeScaling(), True)  # Gated DeltaNet has no positions


# ---- config.json -> ours


def read_rows(config: dict, family: Family, where: str) -> dict[str, Any]:
    """The fields of `DecoderConfig` that describe the layers: `window` or `layer_table`, and the rotary positions."""
    if family.shape["positions"] != "rope":
        return {}
    num_layers = config["num_hidden_layers"]
    types, window = _types(config, family, num_layers, where)
    on = _no_rope(config, family, num_layers, where)
    ropes = {kind: _rope(config, family, kind, where) for kind in dict.fromkeys(types)}
    lines = []
    for kind, turned in zip(types, on, strict=True):
        theta, rotary, scaling = ropes[kind]
        if kind == LINEAR_TYPE:
            lines.append(_LINEAR_LINE)
            continue
        line = Line(window if kind == SLIDING else None, theta, rotary, scaling)
        lines.append(line if turned else line._replace(rotary=0.0))
    return _fields(lines)


def _types(config: dict, family: Family, num_layers: int, where: str) -> tuple[list[str], int | None]:
    rows = family.rows
    window = config.get("sliding_window", rows.window) if rows.has_window else None
    if rows.window_if and not config.get(rows.window_if, False):
        window = None
    if rows.types is None:
        return [FULL if window is None else SLIDING] * num_layers, window
    types = config.get("layer_types") or rows.types(config)
    if not isinstance(types, list):
        raise UserError(f"layer_types is {types!r}, which is not a list", where=where)
    supported = (FULL, SLIDING, LINEAR_TYPE) if rows.linear else (FULL, SLIDING)
    unknown = [kind for kind in types if kind not in supported]
    if len(types) != num_layers or unknown:
        what = f"layer {types.index(unknown[0])} is of type {unknown[0]!r}" if unknown else (
            f"layer_types names {len(types)} layers, and num_hidden_layers is {num_layers}")  # fmt: skip
        raise UserError(what, where=where, why=f"the types that are supported are {', '.join(supported)}")
    if SLIDING in types and window is None:
        raise UserError("layer_types has layers with a window, and sliding_window names none", where=where)
    return types, window


def _no_rope(config: dict, family: Family, num_layers: int, where: str) -> list[int]:
    if not family.rows.no_rope:
        return [1] * num_layers
    interval = config.get("no_rope_layer_interval") or 4
    on = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(num_layers)]
    if len(on) != num_layers:
        raise UserError(f"no_rope_layers names {len(on)} layers, and num_hidden_layers is {num_layers}", where=where)
    return on


def _rope(config: dict, family: Family, kind: str, where: str) -> tuple[float, float, RopeScaling]:
    """(theta, share of a head that is turned, stretching) of the layers of one type."""
    rows, stored = family.rows, config.get("rope_parameters") or {}
    nested = {key: value for key, value in stored.items() if isinstance(value, dict)}
    if nested:
        found = dict(nested.get(kind) or {})
    elif rows.by_type and kind == SLIDING:
        found = {}  # the older keys stretch full layers alone
    else:
        found = dict(config.get("rope_scaling") or stored)
    older = config.get(rows.local_theta if rows.by_type and kind == SLIDING else "rope_theta")
    theta = found.get("rope_theta") or older or rows.theta[kind == SLIDING]
    rotary = found.get("partial_rotary_factor", config.get("partial_rotary_factor", rows.rotary))
    try:
        theta, rotary = float(theta), float(rotary)
    except (TypeError, ValueError):
        what = f"rope_theta is {theta!r} and partial_rotary_factor {rotary!r}, of which one is not a number"
        raise UserError(what, where=where) from None
    return theta, rotary, _scaling(found, config, where)


def _scaling(found: dict, config: dict, where: str) -> RopeScaling:
    kind = found.get("rope_type", found.get("type", "default"))
    reach = config.get("max_position_embeddings")
    # A key at the top level wins, as in the published code (Phi 3).
    original = config.get("original_max_position_embeddings") or found.get("original_max_position_embeddings") or reach
    kind = "longrope" if kind in ("su", "longrope") or (kind == "yarn" and "short_factor" in found) else kind
    try:
        if kind == "default":
            return RopeScaling()
        if kind == "linear":
            return RopeScaling(kind="linear", factor=float(found["factor"]))
        if kind == "llama3":
            bands = {ours: float(found[theirs]) for ours, theirs in _LLAMA3.items()}
            return RopeScaling(kind="llama3", original_length=int(original), **bands)
        if kind == "yarn" and found.get("truncate", True):
            return _yarn(found, reach, int(original))
        if kind == "longrope":
            factor = float(found.get("factor") or reach / original)
            return RopeScaling(
                kind="longrope", factor=factor, original_length=int(original),
                attention_factor=found.get("attention_factor"), short_factors=tuple(map(float, found["short_factor"])),
                long_factors=tuple(map(float, found["long_factor"])),
            )  # fmt: skip
    except KeyError as error:
        raise UserError(f"the rotary positions of type {kind} lack {error}", where=where) from error
    except (TypeError, ValueError, ZeroDivisionError) as error:  # of another type, or one that pydantic refuses
        raise UserError(f"the rotary positions of type {kind} cannot be read: {error}", where=where) from error
    raise UserError(
        f"rotary positions of type {kind!r} are not supported", where=where,
        why="supported are default, linear, llama3, longrope, and yarn with truncate: true",
    )  # fmt: skip


def _yarn(found: dict, reach: int | None, original: int) -> RopeScaling:
    factor = float(found.get("factor") or reach / original)
    magnitude, weights = found.get("attention_factor"), (found.get("mscale"), found.get("mscale_all_dim"))
    if magnitude is None and all(weights):
        magnitude = yarn_mscale(factor, weights[0]) / yarn_mscale(factor, weights[1])
    return RopeScaling(
        kind="yarn", factor=factor, original_length=original, attention_factor=magnitude,
        beta_fast=float(found.get("beta_fast") or 32), beta_slow=float(found.get("beta_slow") or 1),
    )  # fmt: skip


def _fields(lines: list[Line]) -> dict[str, Any]:
    """The fields of `DecoderConfig` of these layers, by the shortest period."""
    base = next((line for line in reversed(lines) if line.rotary), lines[-1])
    fields = {"rope_theta": base.theta, "rope_scaling": base.scaling.model_dump(mode="json")}
    period = next(p for p in range(1, len(lines) + 1) if len(lines) % p == 0 and lines == lines[:p] * (len(lines) // p))
    if period == 1 and base.rotary == 1.0:
        return fields | {"window": base.window, "layer_table": None}
    return fields | {"window": None, "layer_table": [_row(line, base) for line in lines[:period]]}


def _row(line: Line, base: Line) -> dict[str, Any]:
    if line.linear:
        return {"kind": LINEAR}
    row: dict[str, Any] = {} if line.window is None else {"kind": "window", "window": line.window}
    if line.rotary != 1.0:
        row["rotary"] = line.rotary
    if line.rotary and line.theta != base.theta:
        row["theta"] = line.theta
    if line.rotary and line.scaling != base.scaling:
        row["scaling"] = line.scaling.model_dump(mode="json")
    return row


# ---- ours -> config.json


def lines_of(config: DecoderConfig) -> list[Line]:
    """Every layer of a model of ours. UserError for a layer that no published family has."""
    lines = []
    for number in range(config.layers):
        row = config.rows[number % len(config.rows)]
        if row.kind == LINEAR and row.mlp:
            lines.append(_LINEAR_LINE)
            continue
        if row.kind not in ("full", "window") or not row.mlp:
            what = f"a layer of kind {row.kind}" if row.mlp else "a layer without an MLP"
            raise UserError(f"no published family has {what}", where="model.layer_table")
        rope = config.rope(row)
        if rope is None:
            lines.append(Line(row.window, config.rope_theta, 0.0, RopeScaling()))
        else:
            lines.append(Line(row.window, rope.theta, row.rotary, rope.scaling))
    return lines


def write_rows(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The keys of config.json that describe the layers, as far as the family has keys for them."""
    if family.shape["positions"] != "rope":
        return {}
    lines, rows = lines_of(config), family.rows
    windows = [line.window for line in lines if line.window is not None]
    keys: dict[str, Any] = {}
    if rows.has_window:
        keys["sliding_window"] = windows[0] if windows else (None if rows.types is None else rows.window)
    if rows.window_if:
        keys[rows.window_if] = bool(windows)
    if rows.types is not None:
        plain = [FULL if line.window is None else SLIDING for line in lines]
        keys["layer_types"] = [LINEAR_TYPE if line.linear else kind for line, kind in zip(lines, plain, strict=True)]
    if rows.no_rope:
        keys["no_rope_layers"] = [int(line.rotary > 0) for line in lines]
    turned = [line for line in lines if line.rotary] or lines
    full = next((line for line in reversed(turned) if line.window is None), turned[-1])
    if not rows.by_type:
        return keys | _written(full, family)
    local = next((line for line in turned if line.window is not None), None)
    by_type = {} if local is None else {SLIDING: _rope_keys(local, family)}
    older = {} if local is None or rows.local_theta == "rope_theta" else {rows.local_theta: local.theta}
    return keys | _written(full, family) | older | {"rope_parameters": {FULL: _rope_keys(full, family)} | by_type}


def _written(line: Line, family: Family) -> dict[str, Any]:
    """The keys of today and, for readers from before transformers 5, those of then."""
    keys = _rope_keys(line, family)
    older = {"rope_theta": line.theta}
    if line.scaling.kind != "none":
        older["rope_scaling"] = {name: value for name, value in keys.items() if name != "rope_theta"}
    if "partial_rotary_factor" in keys:
        older["partial_rotary_factor"] = line.rotary
    if line.scaling.kind == "longrope":
        older["original_max_position_embeddings"] = line.scaling.original_length
    return older | {"rope_parameters": keys}


def _rope_keys(line: Line, family: Family) -> dict[str, Any]:
    scaling, keys = line.scaling, {"rope_theta": line.theta}
    if (line.rotary, family.rows.rotary) != (1.0, 1.0):
        keys["partial_rotary_factor"] = line.rotary
    if scaling.kind == "none":
        return keys | {"rope_type": "default"}
    keys |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return keys
    keys["original_max_position_embeddings"] = scaling.original_length
    if scaling.attention_factor is not None:
        keys["attention_factor"] = scaling.attention_factor
    own = {
        "llama3": {theirs: getattr(scaling, ours) for ours, theirs in _LLAMA3.items()},
        "yarn": {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow},
        "longrope": {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)},
    }
    return keys | own[scaling.kind]
