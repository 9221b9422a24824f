"""Writes the adapters of a run as the PEFT library reads them, beside the open model that they were trained over.

Kernels that a family stores as one tensor (Phi's `qkv_proj`, GPT-2's `c_attn`) are one module to PEFT: their adapters
become one, whose rank is the sum of theirs and whose B has a block for each. PEFT has other names for an embedding's
adapter than for those of kernels. Where the embedding is also the head, the head is a module of its own to PEFT: it
gets the same adapter, transposed, and `ensure_weight_tying` keeps the two alike if PEFT trains them further.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aurora_train.config.yaml import read_file
from aurora_train.errors import UserError
from aurora_train.files import write_json
from aurora_train.interop import families, hub
from aurora_train.interop.export import write_tokenizer
from aurora_train.interop.families.family import Family
from aurora_train.interop.peft import CONFIG, WEIGHTS
from aurora_train.interop.placing import Opened, matched, places, theirs
from aurora_train.interop.result import Adapters, Result, lineage
from aurora_train.interop.source import located, open_source
from aurora_train.nn import nf4
from aurora_train.nn.lora_config import scale_of
from aurora_train.run import Run

_PREFIX = "base_model.model."
_TABLE = "embedding"


def over_base(result: Result, base: Path | None) -> tuple[Callable[[Result, Path, str], Family], str]:
    """(the function that writes a run's adapters into an empty folder, how exactly the run kept their base).

    `base`: the Hugging Face folder of the base, or its name on a hub; None for the one that the run's provenance names.
    The second value is a key of `proof.BOUNDS`: "float32" if the run kept the base's very values, else the dtype that
    it rounded them to.

    Raises UserError for a run without adapters, one whose base is not an open model, and one whose frozen parameters
    are not those of the base: PEFT would add the adapters to other weights.
    """
    if result.adapters is None:
        raise UserError("this run trained no adapters", where=result.record["run"],
                        hint="--format hf writes the whole model")  # fmt: skip
    opened = _opened(Path(located(base, where="--base")) if base else _base_of(result.record))
    kept, whole = _refuse_other_base(result, result.adapters, opened)
    return (lambda result, folder, _: _write(result, result.adapters, opened, whole, folder)), kept


def _write(result: Result, adapters: Adapters, base: Opened, whole: set[str], folder: Path) -> Family:
    """Write the adapters, and the parameters `whole` that were trained without one, over a base."""
    from safetensors.numpy import save_file

    modules = _modules(result, adapters, base.family)
    outer = {weight.ours[0]: weight.theirs.removesuffix(".weight") for weight in base.family.outer}
    if base.config.tied and outer[_TABLE] in modules:
        down, up = modules[outer[_TABLE]]
        modules[outer["head"]] = np.ascontiguousarray(up.T), np.ascontiguousarray(down.T)
    arrays = {}
    for module, pair in modules.items():
        form = "lora_embedding_{}" if module == outer[_TABLE] else "lora_{}.weight"
        arrays |= {f"{_PREFIX}{module}.{form.format(letter)}": array for letter, array in zip("AB", pair, strict=True)}
    saved = {_module(base.places[name].theirs) for name in whole}
    for tensor, read in theirs(base.family, result.shapes, result.config.heads, result.read).items():
        if _module(tensor) in saved:  # a bias beside its weight, too
            arrays[_PREFIX + tensor] = read().astype(np.float32)
    if base.config.tied and outer[_TABLE] in saved:
        arrays[f"{_PREFIX}{outer['head']}.weight"] = arrays[f"{_PREFIX}{outer[_TABLE]}.weight"].copy()
    try:
        save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, _config(adapters, modules, saved, base))
        write_tokenizer(result, folder)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(folder)) from error
    _refuse_other_sum(result, adapters, base, whole, matched(open_source(folder)))
    return base.family


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _refuse_other_sum(result: Result, adapters: Adapters, base: Opened, whole: set[str], found: Opened) -> None:
    """UserError unless the written folder reads back as the base with the adapters added, kernel by kernel."""
    if found.shapes != base.shapes:
        raise UserError("the adapters do not read back over their base as one model", where=str(found.source.path))
    for name in base.shapes:
        wanted = result.read(name) if name in whole else base.read(name)
        if name in adapters.names:
            wanted = wanted.astype(np.float32) + adapters.change(name)
        if not np.allclose(found.read(name).astype(np.float32), wanted.astype(np.float32), rtol=1e-5, atol=1e-6):
            raise UserError(f"the adapter of {name} does not read back as it was written",
                            where=str(found.source.path))  # fmt: skip


def _base_of(record: dict[str, Any]) -> Path:
    """The open model that a run's adapters were trained over: what it starts from, directly, by a run at step 0 that
    was imported from it, or by runs that trained adapters too, whose frozen base it then has."""
    for parent in lineage(record["parent"]):
        if parent["step"] is None and "hub" in parent and not Path(parent["from"]).exists():  # another cache by now
            return Path(located(f"{hub.HUB}{parent['hub']}@{parent['revision']}", where=record["run"]))
        if parent["step"] is None:
            if not Path(parent["from"]).exists():
                raise UserError(f"the base that the adapters were trained over is not here: {parent['from']}",
                                where=record["run"], hint="--base DIR names it where it is now")  # fmt: skip
            return Path(parent["from"])
        if parent["step"] and not _has_adapters(parent["from"]):
            raise UserError(
                f"the adapters were trained over step {parent['step']} of {parent['from']}, which PEFT cannot read",
                where=record["run"],
                hint=f"aurora export {parent['from']} --step {parent['step']} --to BASE, and give --base BASE; "
                "or --merge",
            )  # fmt: skip
    raise UserError(
        "its provenance names no open model that the adapters were trained over", where=record["run"],
        hint="--base DIR names the base, which `aurora export --format hf` may have written",
    )  # fmt: skip


def _has_adapters(folder: str) -> bool:
    file = Run(folder).config
    model = read_file(file).value.get("model") if file.is_file() else None
    return isinstance(model, dict) and bool(model.get("lora"))


def _opened(base: Path) -> Opened:
    opened = matched(open_source(base))
    if opened.source.kind != "hf":
        raise UserError(
            f"the base is of the kind {opened.source.kind}, and PEFT reads Hugging Face folders", where=str(base),
            hint="import it, export that run with --format hf, and name the folder with --base",
        )  # fmt: skip
    if opened.source.config is not families.text_config(opened.source.config):
        raise UserError(
            "the base is the text part of a larger model, whose modules PEFT knows under other names", where=str(base),
            hint="--format hf --merge; or export the base with --format hf, and name that folder with --base",
        )  # fmt: skip
    return opened


def _refuse_other_base(result: Result, adapters: Adapters, opened: Opened) -> tuple[str, set[str]]:
    """(the key of `proof.BOUNDS` for how a run kept its base, the parameters that it trained without an adapter).

    Those may be the embedding, the head and the last norm, which PEFT stores as a whole. UserError if any other differs
    from the base: then the run kept another base.
    """
    if opened.vocabulary != result.vocabulary and opened.config == result.config:
        raise UserError(
            f"the run's embedding has {result.vocabulary} rows, and its base {opened.vocabulary}",
            where=str(opened.source.path), why="an adapter of PEFT adds no rows for new tokens to its base",
            hint="--merge writes the whole model",
        )  # fmt: skip
    if families.essence(opened.config) != families.essence(result.config) or opened.shapes != result.shapes:
        raise UserError("the base is of another shape than the run's model", where=str(opened.source.path))
    kept, whole = "float32", set()
    for name in result.shapes:
        ours, base = adapters.stored(name), opened.read(name)
        if isinstance(ours, tuple):
            equal, kept = _encodes_to(base, ours), "nf4"
        else:
            rounded = base.astype(ours.dtype)
            equal = np.array_equal(ours, rounded)
            exact = np.array_equal(rounded.astype(np.float32), base.astype(np.float32))
            kept = kept if exact or kept == "nf4" else ours.dtype.name
        if not equal and "." not in name.removeprefix("final_norm.") and name not in adapters.names:
            whole.add(name)
        elif not equal:
            raise UserError(
                f"the run's {name} is not that of the base", where=str(opened.source.path),
                why="PEFT would add the adapters to weights that they were not trained over",
                hint="--base names the base they were trained over; --merge writes the whole model",
            )  # fmt: skip
    return kept, whole


def _encodes_to(kernel: np.ndarray, coded: tuple[np.ndarray, np.ndarray]) -> bool:
    import jax

    return all(np.array_equal(one, other) for one, other in zip(jax.jit(nf4.encode)(kernel), coded, strict=True))


def _modules(result: Result, adapters: Adapters, family: Family) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A [rank, in], B [out, rank]) of each module of the family, by its name."""
    pieces: dict[str, list[str]] = {}
    placed = places(family, result.shapes, result.config.heads)
    for name in sorted(adapters.names, key=lambda name: placed[name].start):
        pieces.setdefault(placed[name].theirs, []).append(name)
    number_of = {name: number for names in pieces.values() for number, name in enumerate(names)}

    def block(name: str) -> np.ndarray:
        """B of one kernel in the rows that are its own, as a kernel of the joined rank by its outputs."""
        rank = adapters.rank * len(pieces[placed[name].theirs])
        whole = np.zeros((rank, result.shapes[name][1]), np.float32)
        if name in number_of:
            first = adapters.rank * number_of[name]
            whole[first : first + adapters.rank] = adapters.pair(name)[1]
        return whole

    joined = theirs(family, result.shapes, result.config.heads, block)
    modules = {}
    for tensor, names in sorted(pieces.items()):
        down = np.concatenate([adapters.pair(name)[0].T for name in names])
        up = joined[tensor]() if placed[names[0]].transpose else joined[tensor]().T
        modules[tensor.removesuffix(".weight")] = np.ascontiguousarray(down), np.ascontiguousarray(up)
    return modules


def _config(adapters: Adapters, modules: dict, saved: set[str], base: Opened) -> dict[str, Any]:
    """adapter_config.json. A joined module has a rank of its own, and an alpha by which it is scaled like its parts.

    `saved`: the modules that are stored whole.
    """
    outer = {weight.theirs.removesuffix(".weight") for weight in base.family.outer}
    table = next(weight.theirs for weight in base.family.outer if weight.ours[0] == _TABLE)
    tied = base.config.tied and (_TABLE in adapters.names or _module(table) in saved)
    ends = {module: ".".join(module.split(".")[-1 if module in outer else -2 :]) for module in modules}
    ranks = {ends[module]: len(down) for module, (down, _) in modules.items() if len(down) != adapters.rank}
    alphas = {end: adapters.scale / scale_of(1.0, rank, adapters.rank_stabilised) for end, rank in ranks.items()}
    blocks = [name for name in adapters.names if base.places[name].theirs.removesuffix(".weight") not in outer]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", **_named(base.source.path.absolute()),
        "r": adapters.rank, "lora_alpha": adapters.alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": any(not base.places[name].transpose for name in blocks),
        "target_modules": sorted(set(ends.values())), "inference_mode": True,
        "use_rslora": adapters.rank_stabilised, "use_dora": False, "rank_pattern": ranks, "alpha_pattern": alphas,
        "modules_to_save": sorted(saved) or None,  # in full, because PEFT takes "norm" for the end of any name
    } | ({"ensure_weight_tying": True} if tied else {})  # fmt: skip


def _named(base: Path) -> dict[str, str | None]:
    """How adapter_config.json names a base: by name and commit if it is a hub's, where others find it; or by folder."""
    at = hub.origin(base)
    if at and hub.Model(at["hub"], at["revision"]).copy() == base and not Path(at["hub"]).exists():
        return {"base_model_name_or_path": at["hub"], "revision": at["revision"]}
    return {"base_model_name_or_path": str(base), "revision": None}
