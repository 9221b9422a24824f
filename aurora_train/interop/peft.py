"""Reads a LoRA adapter of the PEFT library over its base: the base's tensors with the adapter added, row by row.

PEFT itself ignores keys that it does not know and tensors whose names lead nowhere, with a warning at most; such an
adapter then does nothing. Here both are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aurora_train.errors import UserError
from aurora_train.interop import families, hub
from aurora_train.interop.families.family import Family
from aurora_train.interop.placing import shape_of
from aurora_train.interop.source import OpenModel, Tensor, open_source
from aurora_train.nn.lora_config import scale_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The embedding's two matrices are parameters of its module; those of the other modules are modules with a weight.
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(?:([AB])(?:\.default)?\.weight|embedding_([AB])(?:\.default)?)")
# A tensor that is stored whole: the base's own, because its module has an adapter, or one trained as a whole.
_WHOLE = re.compile(r"base_model\.model\.(.+?)(\.base_layer|\.modules_to_save(?:\.default)?)?\.(weight|bias)")
# Settings that change what an adapter computes, and the value with which it is a plain LoRA.
_PLAIN = {
    "use_dora": False, "bias": "none", "lora_bias": False,
    "trainable_token_indices": None, "layer_replication": None,
}  # fmt: skip
# Settings by which an adapter was made, or that repeat what its tensors say.
_NEUTRAL = {
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_rslora",
}
# Beginnings of an adapter that leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ change it.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


class _Held(NamedTuple):
    """What an adapter's file holds, by the name of the base's tensor.

    Attributes:
        pairs: A and B.
        based: tensors of the base as they were in training, which PEFT stores beside an embedding's adapter.
        saved: tensors that were trained as a whole (`modules_to_save`).
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    based: dict[str, Tensor]
    saved: dict[str, Tensor]


def open_adapter(folder: Path) -> OpenModel:
    """The base of an adapter with the adapter added. UserError for an adapter or a base that cannot be read so."""
    from aurora_train.interop.hf import read_json, read_text, refuse_codes, tensors_of_file

    config = read_json(folder / CONFIG, required=True)
    where = str(folder / CONFIG)
    _refuse_other(config, where)
    base = open_source(base_of(folder))
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"there is no {WEIGHTS}", where=str(folder), hint="save the adapter with safe_serialization")
    family = families.of(base.config, str(base.path))
    held = _held(tensors_of_file(folder / WEIGHTS), base, family, str(folder / WEIGHTS))
    _refuse_unsaved(config, held, where)
    tensors, held = _parted(base, held, family, config, where)
    refuse_codes({name: tensors[name] for name in held.pairs}, str(base.path))
    changed = {}
    for name, (down, up) in held.pairs.items():
        rank, alpha = _number(config, name, "rank_pattern", "r", where), _number(config, name, "alpha_pattern",
                                                                                "lora_alpha", where)  # fmt: skip
        flips = _is_stored_by_input(family, name)
        _refuse_shapes(name, tensors[name], down, up, rank, flips, str(folder / WEIGHTS))
        scale = scale_of(alpha, rank, bool(config.get("use_rslora")))
        read = functools.partial(_merged, tensors[name], down, up, scale, flips)
        changed[name] = Tensor(tensors[name].shape, "float32", read)
    return dataclasses.replace(
        base, path=folder, kind="peft", tensors=tensors | changed,
        tokenizer=read_text(folder / "tokenizer.json") or base.tokenizer,
        chat_template=read_text(folder / "chat_template.jinja") or base.chat_template,
    )  # fmt: skip


def _parted(base: OpenModel, held: _Held, family: Family, config: dict, where: str) -> tuple[dict[str, Tensor], _Held]:
    """(the base's tensors with those that are stored whole in their places, what is to be added to them).

    The head of a tied base is a module of its own to PEFT: what changes one of the two leaves the other as it was, and
    the model is tied no more, unless both are changed alike, or `ensure_weight_tying` says that one adapter is both's.
    """
    stored = {family.meant(name): name for name in base.tensors}
    outer = {weight.ours[0]: weight.theirs for weight in family.outer}
    embedding, head = (stored.get(outer[one], outer[one]) for one in ("embedding", "head"))
    tensors = base.tensors | held.based
    changed = held.pairs.keys() | held.saved.keys()
    if changed & {embedding, head} and shape_of(base)[1].tied:
        tensors[head] = held.based.get(head, tensors[embedding])
        if config.get("ensure_weight_tying"):
            _refuse_unlike(held, embedding, head, where)
            del tensors[head]
            held = held._replace(**{part: {name: value for name, value in getattr(held, part).items() if name != head}
                                    for part in ("pairs", "saved")})  # fmt: skip
    return tensors | held.saved, held


def _refuse_unsaved(config: dict[str, Any], held: _Held, where: str) -> None:
    """UserError for a module that is said to be stored whole and is not: PEFT would leave it as it is in the base."""
    modules = [name.rpartition(".")[0] for name in held.saved]
    for one in config.get("modules_to_save") or []:
        if not any(module == one or module.endswith(f".{one}") for module in modules):
            raise UserError(f"`modules_to_save: {json.dumps(one)}` is not in {WEIGHTS}", where=where,
                            hint="save the adapter with PEFT again")  # fmt: skip


def _refuse_unlike(held: _Held, embedding: str, head: str, where: str) -> None:
    """UserError if what is stored for a tied head, beside what is for the embedding, is not the same."""
    alike = True
    if head in held.pairs:
        down, up = (part.whole() for part in held.pairs[head])
        first, second = (part.whole().T for part in held.pairs.get(embedding, held.pairs[head]))
        alike = embedding in held.pairs and np.array_equal(down, second) and np.array_equal(up, first)
    if head in held.saved:
        whole = held.saved.get(embedding)
        alike = alike and whole is not None and np.array_equal(held.saved[head].whole(), whole.whole())
    if not alike:
        raise UserError("what is stored for embedding and head differs, although `ensure_weight_tying` is set",
                        where=where, why="they are stored apart, and PEFT would take one of them",
                        hint="save the adapter with PEFT again")  # fmt: skip


def _is_stored_by_input(family: Family, name: str) -> bool:
    """Whether a tensor is stored as (in, out): an embedding, and GPT-2's kernels. PEFT goes by the module as well."""
    name = family.meant(name)
    flat = [weight.theirs for weight in (*family.outer, *family.block) if not weight.transpose]
    return any(name == theirs or name.endswith(f".{theirs}") for theirs in flat)


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
    for name in ("use_rslora", "ensure_weight_tying"):
        if config.get(name) not in (True, False, None):
            raise UserError(f"`{name}` is {json.dumps(config[name])}, which is not true or false", where=where)
    if not isinstance(saved := config.get("modules_to_save") or [], list):
        raise UserError(f"`modules_to_save` is {json.dumps(saved)}, which is not a list", where=where)
    unknown = dict.fromkeys(name for name in config if name not in _NEUTRAL)
    for name, plain in (unknown | _PLAIN).items():
        if config.get(name, plain) not in (plain, None, {}, [], False):
            value = json.dumps(config[name])
            raise UserError(f"`{name}: {value}` is not supported", where=where,
                            hint="merge the adapter with PEFT's merge_and_unload, and import the result")  # fmt: skip


def _number(config: dict[str, Any], tensor: str, patterns: str, common: str, where: str) -> Any:
    """A setting of one module: that of the first pattern that its name ends in, else the one for all modules.

    UserError for a pattern that is no regular expression, and for a value that is no number above zero.
    """
    module, own = tensor.removesuffix(".weight"), config.get(patterns) or {}
    if not isinstance(own, dict):
        raise UserError(f"`{patterns}` is not a mapping from names of modules to numbers", where=where)
    try:
        ends = (value for end, value in own.items() if re.fullmatch(rf"(.*\.)?({end})", module))
        found = next(ends, config.get(common, 8))
    except re.error as error:
        raise UserError(f"`{patterns}` holds what is no regular expression: {error}", where=where) from error
    kinds = int if common == "r" else (int, float)
    if isinstance(found, bool) or not isinstance(found, kinds) or not 0 < found < math.inf:
        raise UserError(f"`{common}` of {module} is {json.dumps(found)}, which is no number above zero", where=where)
    return found


def base_of(folder: Path) -> Path:
    """Where the base of an adapter lies, which may be an adapter too.

    UserError if the adapter names none, if it is not there, and if the bases lead back to one of the adapters.
    """
    path, chain = _named_base(folder), [folder.resolve()]
    if path.resolve() == chain[0]:
        raise UserError("the adapter's base is the adapter itself", where=str(folder / CONFIG),
                        hint="write the folder of the base as base_model_name_or_path")  # fmt: skip
    at = path
    while (at / CONFIG).is_file():
        chain.append(at.resolve())
        at = _named_base(at)
        if at.resolve() in chain:
            circle = " -> ".join(one.name for one in (*chain[chain.index(at.resolve()) :], at.resolve()))
            raise UserError(f"adapters name each other as their base: {circle}", where=str(folder / CONFIG),
                            hint="write the folder of a whole model as base_model_name_or_path of one")  # fmt: skip
    return path


def _named_base(folder: Path) -> Path:
    from aurora_train.interop.hf import read_json

    where = str(folder / CONFIG)
    named = read_json(folder / CONFIG, required=True).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise UserError("the adapter names no base (`base_model_name_or_path`)", where=where)
    path = next((path for path in (Path(named), folder / named) if os.path.exists(path)), None)
    if path is not None:
        return path
    on_hub = hub.base_of(folder)
    path = on_hub and on_hub.copy()
    if path is None:
        fetched = f"`aurora import {on_hub} --to RUN --online` downloads it; or " if on_hub else ""
        raise UserError(
            f"the adapter's base {named} is not here", where=where,
            hint=f"{fetched}write the folder of a copy as base_model_name_or_path",
        )  # fmt: skip
    return path


def _held(found: dict[str, Tensor], base: OpenModel, family: Family, where: str) -> _Held:
    """An adapter's tensors in their places. UserError for one that leads nowhere, for halves, and for another shape."""
    stored = {family.meant(name): name for name in base.tensors}  # PEFT has the modules' names, which may be others
    tied_head = next(weight.theirs for weight in family.outer if weight.ours == ("head",))
    stored.setdefault(tied_head, tied_head)  # a module of its own to PEFT
    halves: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, dict[str, Tensor]] = {"based": {}, "saved": {}}
    for name, tensor in found.items():
        match, other = _NAME.fullmatch(name), _WHOLE.fullmatch(name)
        module, end = (match[1], "weight") if match else (other[1], other[3]) if other else ("", "")
        target = stored.get(family.meant(f"{module}.{end}"))
        if target is None:
            raise UserError(f"{name} belongs to no tensor of the base", where=where,
                            why="PEFT would leave it out without an error")  # fmt: skip
        if match:
            halves.setdefault(target, {})[match[2] or match[3]] = tensor
            continue
        if target in base.tensors and tensor.shape != base.tensors[target].shape:
            raise UserError(
                f"{name} is of shape {list(tensor.shape)}, and in the base of {list(base.tensors[target].shape)}",
                where=where, why="the adapter was trained over a base with other rows, such as those of new tokens",
                hint="merge the adapter with PEFT's merge_and_unload, and import the result",
            )  # fmt: skip
        whole["based" if other[2] == ".base_layer" else "saved"][target] = tensor
    for target, held in halves.items():
        if len(held) < 2:
            raise UserError(f"the adapter of {target} has only lora_{next(iter(held))}", where=where)
    if not halves and not whole["saved"]:
        raise UserError("the adapter holds no tensor", where=where)
    if not whole["saved"] and not any(all(np.any(half.whole()) for half in held.values()) for held in halves.values()):
        raise UserError("every lora_B is zero: the adapter changes nothing", where=where)
    return _Held({target: (held["A"], held["B"]) for target, held in halves.items()}, **whole)


def _refuse_shapes(name: str, base: Tensor, down: Tensor, up: Tensor, rank: int, flips: bool, where: str) -> None:
    outputs, inputs = base.shape[::-1] if flips else base.shape
    for letter, tensor, wanted in (("A", down, (rank, inputs)), ("B", up, (outputs, rank))):
        if tensor.shape != wanted:
            raise UserError(
                f"lora_{letter} of {name} is of shape {list(tensor.shape)}, where rank {rank} means {list(wanted)}",
                where=where,
            )  # fmt: skip


def _merged(base: Tensor, down: Tensor, up: Tensor, scale: float, flips: bool, start: int, stop: int) -> np.ndarray:
    """Rows of W + scale B A, float32; if it `flips`, W is stored as (in, out).

    The factors are contiguous, so that an embedding and a head with one adapter come out equal to the bit.
    """
    first, second = (down.whole().T[start:stop], up.whole().T) if flips else (up.read(start, stop), down.whole())
    change = np.ascontiguousarray(first, np.float32) @ np.ascontiguousarray(second, np.float32)
    return base.read(start, stop).astype(np.float32) + np.float32(scale) * change
