"""Reads a LoRA adapter of the PEFT library over its base: the base's tensors with the adapter added, row by row.

PEFT itself ignores keys that it does not know and tensors whose names lead nowhere, with a warning at most; such an
adapter then does nothing. Here both are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from aurora_train.errors import UserError
from aurora_train.interop import families, hub
from aurora_train.interop.source import Source, Tensor, open_source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")
# Settings that change what an adapter computes, and the value with which it is a plain LoRA.
_PLAIN = {
    "use_dora": False, "bias": "none", "modules_to_save": None, "lora_bias": False,
    "trainable_token_indices": None, "layer_replication": None,
}  # fmt: skip
# Settings by which an adapter was made, or that repeat what its tensors say.
_NEUTRAL = {
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "use_rslora",
}
# Beginnings of an adapter that leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ change it.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def open_adapter(folder: Path) -> Source:
    """The base of an adapter with the adapter added. UserError for an adapter or a base that cannot be read so."""
    from aurora_train.interop.hf import read_json, read_text, refuse_codes, tensors_of_file

    config = read_json(folder / CONFIG, required=True)
    where = str(folder / CONFIG)
    _refuse_other(config, where)
    base = open_source(base_of(folder))
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"there is no {WEIGHTS}", where=str(folder), hint="save the adapter with safe_serialization")
    parts = _pairs(tensors_of_file(folder / WEIGHTS), base, str(folder / WEIGHTS))
    refuse_codes({name: base.tensors[name] for name in parts}, str(base.path))
    flips = bool(config.get("fan_in_fan_out"))
    tensors = dict(base.tensors)
    for name, (down, up) in parts.items():
        rank = _of_module(config, name, "rank_pattern", "r")
        alpha = _of_module(config, name, "alpha_pattern", "lora_alpha")
        _refuse_shapes(name, base.tensors[name], down, up, rank, flips, str(folder / WEIGHTS))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        read = functools.partial(_merged, base.tensors[name], down, up, scale, flips)
        tensors[name] = Tensor(base.tensors[name].shape, "float32", read)
    return dataclasses.replace(
        base, path=folder, kind="peft", tensors=tensors,
        tokenizer=read_text(folder / "tokenizer.json") or base.tokenizer,
        chat_template=read_text(folder / "chat_template.jinja") or base.chat_template,
    )  # fmt: skip


def _refuse_other(config: dict[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"an adapter of type {config.get('peft_type')!r} is not supported", where=where,
                        why="supported is LORA")  # fmt: skip
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise UserError("the adapter names no rank `r`", where=where, why="PEFT would take 8, whatever it was")
    if config.get("init_lora_weights") not in _INITS:
        named = json.dumps(config["init_lora_weights"])
        raise UserError(f"`init_lora_weights: {named}` is not supported", where=where,
                        why="it changes the base's weights, which this folder does not hold",
                        hint="merge the adapter with PEFT's merge_and_unload, and import the result")  # fmt: skip
    unknown = dict.fromkeys(name for name in config if name not in _NEUTRAL)
    for name, plain in (unknown | _PLAIN).items():
        if config.get(name, plain) not in (plain, None, {}, [], False):
            value = json.dumps(config[name])
            raise UserError(f"`{name}: {value}` is not supported", where=where,
                            hint="merge the adapter with PEFT's merge_and_unload, and import the result")  # fmt: skip


def _of_module(config: dict[str, Any], tensor: str, patterns: str, common: str) -> Any:
    """A setting of one module: that of the first pattern that its name ends in, else the one for all modules."""
    module = tensor.removesuffix(".weight")
    own = (value for end, value in (config.get(patterns) or {}).items() if re.fullmatch(rf"(.*\.)?({end})", module))
    return next(own, config.get(common, 8))


def base_of(folder: Path) -> Path:
    """Where the base of an adapter lies. UserError if the adapter names none, and if it is not there."""
    from aurora_train.interop.hf import read_json

    where = str(folder / CONFIG)
    named = read_json(folder / CONFIG, required=True).get("base_model_name_or_path")
    if not named:
        raise UserError("the adapter names no base (`base_model_name_or_path`)", where=where)
    path = next((path for path in (Path(named), folder / named) if path.exists()), None)
    on_hub = hub.base_of(folder)
    path = path or (on_hub and on_hub.copy())
    if path is None:
        raise UserError(
            f"the adapter's base {named} is not here", where=where,
            hint="download it, and write its folder as base_model_name_or_path",
        )  # fmt: skip
    if path.resolve() == folder.resolve():
        raise UserError("the adapter's base is the adapter itself", where=where,
                        hint="write the folder of the base as base_model_name_or_path")  # fmt: skip
    return path


def _pairs(found: dict[str, Tensor], base: Source, where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by the name of the base's tensor. UserError for a tensor that leads nowhere, and for halves."""
    family = families.of(base.config, str(base.path))
    stored = {family.meant(name): name for name in base.tensors}  # PEFT has the modules' names, which may be others
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        match = _NAME.fullmatch(name)
        target = stored.get(family.meant(f"{match[1]}.weight")) if match else None
        if target is None:
            raise UserError(f"{name} belongs to no tensor of the base", where=where,
                            why="PEFT would leave it out without an error")  # fmt: skip
        halves.setdefault(target, {})[match[2]] = tensor
    for target, held in halves.items():
        if len(held) < 2:
            raise UserError(f"the adapter of {target} has only lora_{next(iter(held))}", where=where)
    if not halves:
        raise UserError("the adapter holds no tensor", where=where)
    if not any(np.any(held["B"].whole()) for held in halves.values()):
        raise UserError("every lora_B is zero: the adapter changes nothing", where=where)
    return {target: (held["A"], held["B"]) for target, held in halves.items()}


def _refuse_shapes(name: str, base: Tensor, down: Tensor, up: Tensor, rank: int, flips: bool, where: str) -> None:
    outputs, inputs = base.shape[::-1] if flips else base.shape
    for letter, tensor, wanted in (("A", down, (rank, inputs)), ("B", up, (outputs, rank))):
        if tensor.shape != wanted:
            raise UserError(
                f"lora_{letter} of {name} is of shape {list(tensor.shape)}, where rank {rank} means {list(wanted)}",
                where=where,
            )  # fmt: skip


def _merged(base: Tensor, down: Tensor, up: Tensor, scale: float, flips: bool, start: int, stop: int) -> np.ndarray:
    """Rows of W + scale B A, float32; with `fan_in_fan_out` W is stored as (in, out)."""
    if flips:
        change = down.whole().astype(np.float32).T[start:stop] @ up.whole().astype(np.float32).T
    else:
        change = up.read(start, stop).astype(np.float32) @ down.whole().astype(np.float32)
    return base.read(start, stop).astype(np.float32) + np.float32(scale) * change
