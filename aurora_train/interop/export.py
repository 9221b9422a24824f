"""Writes a run as a Hugging Face folder: weights, config, tokenizer, chat template, generation config and card.

The folder is written beside its name and renamed when its proof holds (`interop/proof.py`): a folder that exists under
its own name was read back and compared with the run.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aurora_train.errors import UserError
from aurora_train.files import sync, write_json
from aurora_train.interop import families
from aurora_train.interop.families.family import Family
from aurora_train.interop.hf import INDEX
from aurora_train.interop.kept import ORIGIN, TEMPLATE
from aurora_train.interop.placing import Theirs, their_shapes, theirs
from aurora_train.interop.result import Result, told
from aurora_train.interop.tokenizer_files import special_tokens, tokenizer_json

_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPES = tuple(_SAFETENSORS)
SHARD_BYTES = 4 << 30
CARD = "README.md"


def refuse_target(folder: Path) -> None:
    """UserError if an export would overwrite something, or replace the folder in which the command runs."""
    if folder.resolve() == Path.cwd():
        raise UserError("this is the folder in which the command runs, and an export replaces the one that it is "
                        "written to", where=str(folder), hint="name another one with --to")  # fmt: skip
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("this folder exists and is not empty", where=str(folder), hint="name another one with --to")


def default_dtype(result: Result) -> str:
    """The dtype of a base that came from elsewhere, else bfloat16 for a run trained in it, else float32."""
    of_base = (result.facts.get(ORIGIN) or {}).get("dtype")
    if of_base in DTYPES:
        return of_base
    return "float32" if result.record["precision"] == "float32" else "bfloat16"


def beside(folder: Path) -> Path:
    """A new folder beside `folder`, in which an export is made. Its name is drawn: no other export has the same."""
    folder = folder.resolve()
    made = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        made.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(made)) from error
    return made


def put_in_place(made: Path, folder: Path) -> None:
    """Give a folder that was made beside its name that name, once its files are on the disk."""
    folder = folder.resolve()
    try:
        for path in (*made.iterdir(), made):
            sync(path)
        made.rename(folder)  # takes the place of an empty folder
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(folder)) from error


def write_folder(result: Result, folder: Path, dtype: str) -> Family:
    """Write a result into an empty folder. Returns the family as which it was written.

    Tensors that `result.dtypes` names are stored as it says, all others in `dtype`. Raises UserError for a model that
    no published family has, and for a disk that is full.
    """
    family = families.expressing(result.config, (result.facts.get(ORIGIN) or {}).get("family"))
    try:
        heads = result.config.heads
        shapes = their_shapes(family, result.shapes, heads)
        dtypes = {name: result.dtypes.get(name, dtype) for name in shapes}
        _write_weights(theirs(family, result.shapes, heads, result.read), shapes, folder, dtypes)
        tokens = special_tokens(result.facts)
        write_json(folder / "config.json", _config(result, family, dtype, tokens))
        ids = {name: value for name, value in tokens.ids.items() if value is not None}
        origin = result.facts.get(ORIGIN) or {}
        write_json(folder / "generation_config.json", origin.get("generation", {}) | ids)
        (folder / "tokenizer.json").write_text(tokenizer_json(result.facts), encoding="utf-8")
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_max_length": _reach(result), "model_input_names": ["input_ids", "attention_mask"],
            **origin.get("tokenizer", {}), **tokens.texts,
        })  # fmt: skip
        if TEMPLATE in result.facts:
            (folder / TEMPLATE).write_bytes(result.facts[TEMPLATE])
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(folder)) from error
    return family


def _reach(result: Result) -> int:
    """The longest row that the model is meant for."""
    if result.config.positions == "learned":
        return result.config.max_length
    return (result.facts.get(ORIGIN) or {}).get("max_length") or result.record["sequence"] or result.config.max_length


def _config(result: Result, family: Family, dtype: str, tokens) -> dict[str, Any]:
    config = families.write_config(result.config, family)
    reach = {} if result.config.positions == "learned" else {"max_position_embeddings": _reach(result)}
    # `torch_dtype` is for readers from before transformers 5.
    return config | reach | tokens.ids | {"vocab_size": result.vocabulary, "dtype": dtype, "torch_dtype": dtype}


def _write_weights(tensors: Theirs, shapes: dict[str, tuple[int, ...]], folder: Path, dtypes: dict[str, str]) -> None:
    shards = list(_shards(shapes, dtypes))
    index, total = {}, 0
    for number, names in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        names.sort(key=lambda one: (-_itemsize(dtypes[one]), one))  # as the library orders them
        total += _write_shard(tensors, {one: shapes[one] for one in names}, folder / name, dtypes)
        index |= dict.fromkeys(names, name)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _write_shard(tensors: Theirs, shapes: dict[str, tuple[int, ...]], path: Path, dtypes: dict[str, str]) -> int:
    """Write a safetensors file, one tensor in memory at a time. Returns the bytes of its tensors.

    The format: 8 bytes of length, a JSON header padded with spaces to a multiple of 8, and the tensors one after the
    other. The library writes the same bytes, but takes all tensors at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * _itemsize(dtypes[name])
        header[name] = {"dtype": _SAFETENSORS[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            array = np.ascontiguousarray(_as(tensors[name](), dtypes[name], name))
            assert array.shape == shape, name
            file.write(array.view(np.uint8).data if array.ndim else array.tobytes())
    return end


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _shards(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str]) -> Iterator[list[str]]:
    names, held = [], 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * _itemsize(dtypes[name])
        if names and held + num_bytes > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += num_bytes
    yield names


def _as(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    cast = array.astype(kind)
    if dtype == "float16" and not np.isfinite(cast).all() and np.isfinite(array).all():
        raise UserError(f"{name} has values beyond the range of float16", where="--dtype", hint="--dtype bfloat16")
    return cast


def write_card(result: Result, family: Family, folder: Path, dtype: str, proof: dict[str, Any]) -> None:
    """README.md: origin, licence and which proof the export has."""
    record = result.record
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"license": record["licence"]} if record["licence"] else {}
    head |= {"base_model": record["base"]} if record["base"] else {}
    source, how = Path(record["data"].get("source") or "").name, proof["kind"]  # not where it lay on this machine
    lines = [
        "---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "",
        f"# {record['run']}", "",
        f"A model of the family {family.title}, exported from step {record['step']} of the run `{record['run']}`"
        f" (recipe `{record['recipe']}`). Its weights are stored in {dtype}"
        + (f", {len(result.dtypes)} of its tensors in the dtype of its base." if result.dtypes else "."), "",
        *([f"It was trained on `{source}`, starting from `{record['base']}`." if record["base"] else
           f"It was trained on `{source}`."] if source else []), "",
        *_lineage(told(record)),
        "Licence: " + (f"that of its base, `{record['licence']}`." if record["licence"] else "not recorded."), "",
        "## Proof", "", f"**{how}**: {proof['says']}", "",
        "`aurora verify FOLDER` repeats it.", "",
    ]  # fmt: skip
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _lineage(origin: dict[str, Any]) -> list[str]:
    """What the weights were made from and with, as lines of the card."""
    parent, versions = origin["parent"], origin["versions"] or {}
    at = "" if not parent or parent["step"] is None else f" at step {parent['step']}"
    lines = [f"Started from: `{parent['from']}`{at} (sha256 {parent['digest']})."] if parent else []
    lines += [f"Code: sha256 {origin['code_sha256']}."] if origin["code_sha256"] else []
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines += [f"Versions: {named}."] if named else []
    return [one for line in lines for one in (line, "")]
